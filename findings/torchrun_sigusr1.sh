#!/bin/sh
# SIGUSR1, by which Slurm (--signal=USR1@120) and submitit warn of the end of a job, ends torchrun of torch 2.13.0 at
# once, while the processes that it has started go on without it, and hear nothing. SIGTERM is passed on to them.
# With --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 it passes on SIGUSR1 too.
#
# Output seen, on Python 3.11, Linux ("told": both processes had the signal):
#   torch 2.13.0 USR1: launcher 138, processes go on
#   torch 2.13.0 TERM: launcher 1, processes told TERM
#   torch 2.13.0 USR1 --signals-to-handle: launcher 1, processes told USR1
#
# Needs a network, or a mirror of PyPI, and 2 GB of disk for a while. Exits 1 if any line is another.
#     PYTHON=python3.11 sh findings/torchrun_sigusr1.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/work.py" <<'WORK'
import os
import signal
import sys
import time

place = f"{sys.argv[1]}/{os.environ['RANK']}"


def note(number, frame):
    open(place + ".told", "w").write(signal.Signals(number).name.removeprefix("SIG"))
    sys.exit(0)


for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, note)
open(place + ".pid", "w").write(str(os.getpid()))
time.sleep(30)
WORK
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

# try SIGNAL [flags of torchrun]: what the launcher and its two processes do after the signal
try() {
    signal=$1
    shift
    mkdir "$folder/run"
    "$folder/venv/bin/torchrun" --nproc-per-node 2 "$@" "$folder/work.py" "$folder/run" >/dev/null 2>&1 &
    launcher=$!
    while ! [ -s "$folder/run/0.pid" ] || ! [ -s "$folder/run/1.pid" ]; do sleep 0.5; done
    sleep 2
    kill "-$signal" "$launcher"
    code=0
    wait "$launcher" 2>/dev/null || code=$?
    sleep 2
    if [ -e "$folder/run/0.told" ] && [ -e "$folder/run/1.told" ]; then
        said="told $(cat "$folder/run/0.told")"
    elif kill -0 "$(cat "$folder/run/0.pid")" "$(cat "$folder/run/1.pid")" 2>/dev/null; then
        said="go on"
    else
        said="ended"
    fi
    kill -KILL "$(cat "$folder/run/0.pid")" "$(cat "$folder/run/1.pid")" 2>/dev/null || true
    rm -r "$folder/run"
    echo "torch 2.13.0 $signal${1:+ $1}: launcher $code, processes $said"
}

{
    try USR1
    try TERM
    try USR1 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
} | tee "$folder/seen"
cat >"$folder/expected" <<'EXPECTED'
torch 2.13.0 USR1: launcher 138, processes go on
torch 2.13.0 TERM: launcher 1, processes told TERM
torch 2.13.0 USR1 --signals-to-handle: launcher 1, processes told USR1
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }

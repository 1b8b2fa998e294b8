#!/bin/sh
# multiprocessing's resource tracker unblocks SIGINT and SIGTERM in the thread that starts it, also where the caller had
# blocked them: it blocks both while its process is forked and afterwards does not put the former mask back. So a block
# around the start of a fork server (to keep Ctrl-C from its imports) ends in the middle, as that starts the tracker
# first. Started before, the tracker leaves the mask alone.
#
# Output seen, on CPython 3.11.7, Linux (nothing has to be installed):
#   blocked before: SIGINT SIGTERM; after the tracker has started: none; when it runs already: SIGINT SIGTERM
#
# Exits 1 if the line is another.
#     PYTHON=python3.11 sh findings/python_resource_tracker_unblocks_signals.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/mask.py" <<'MASK'
import signal
from multiprocessing import resource_tracker

BOTH = {signal.SIGINT, signal.SIGTERM}


def blocked():
    now = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & BOTH
    return " ".join(sorted(signal.Signals(number).name for number in now)) or "none"


signal.pthread_sigmask(signal.SIG_BLOCK, BOTH)
before = blocked()
resource_tracker.ensure_running()
after = blocked()
signal.pthread_sigmask(signal.SIG_BLOCK, BOTH)
resource_tracker.ensure_running()
print(f"blocked before: {before}; after the tracker has started: {after}; when it runs already: {blocked()}")
MASK
"${PYTHON:-python3}" "$folder/mask.py" | tee "$folder/seen"
cat >"$folder/expected" <<'EXPECTED'
blocked before: SIGINT SIGTERM; after the tracker has started: none; when it runs already: SIGINT SIGTERM
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }

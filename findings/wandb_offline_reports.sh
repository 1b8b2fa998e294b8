#!/bin/sh
# wandb 0.31.0 in offline mode, of which its documentation says that nothing leaves the machine, looks for its maker's
# server to report of itself, from the process wandb-core that it starts. WANDB_ERROR_REPORTING=false, set before it is
# imported, stops that; WANDB_MODE=offline, or mode="offline", does not. wandb 0.31.0 has no Python class any more that
# reads a .wandb file (wandb.sdk.internal.datastore.DataStore of earlier versions).
#
# Output seen, on Python 3.11, Linux (the names that are looked up, whether or not there is a network):
#   wandb 0.31.0 offline: api.forge.coreweave.com
#   wandb 0.31.0 offline, WANDB_ERROR_REPORTING=false: none
#   wandb 0.31.0 DataStore: no
#
# Needs strace, and a network, or a mirror of PyPI. Exits 1 if any line is another.
#     PYTHON=python3.11 sh findings/wandb_offline_reports.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/log.py" <<'LOG'
import sys

import wandb

run = wandb.init(project="p", dir=sys.argv[1], mode="offline", settings=wandb.Settings(silent=True, console="off"))
run.log({"loss": 1.0})
run.finish()
LOG
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0

# names: the names that the process and its children look up, from the bytes of their DNS questions
names() {
    env "$@" strace -f -qq -s 100 -e trace=sendto,sendmmsg,sendmsg,write -o "$folder/calls" \
        "$folder/venv/bin/python" "$folder/log.py" "$folder" >/dev/null 2>&1
    grep -oE '\\3api\\5forge\\tcoreweave\\3com|sentry' "$folder/calls" | sort -u | sed 's/\\3api\\5forge\\tcoreweave\\3com/api.forge.coreweave.com/'
}

found=$(
    echo "wandb 0.31.0 offline: $(names A=b)"
    quiet=$(names WANDB_ERROR_REPORTING=false || true)
    echo "wandb 0.31.0 offline, WANDB_ERROR_REPORTING=false: ${quiet:-none}"
    "$folder/venv/bin/python" -c "import wandb.sdk.internal.datastore" 2>/dev/null && there=yes || there=no
    echo "wandb 0.31.0 DataStore: $there"
)
echo "$found"
[ "$found" = "wandb 0.31.0 offline: api.forge.coreweave.com
wandb 0.31.0 offline, WANDB_ERROR_REPORTING=false: none
wandb 0.31.0 DataStore: no" ]

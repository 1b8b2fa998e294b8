#!/bin/sh
# A process that multiprocessing's fork server has started does not use that server for its own children: it starts
# another one, without the modules that the first was told to preload. The docstring of ForkServer.ensure_running says
# otherwise ("a child process will just reuse the forkserver started by its parent, so ensure_running() will do
# nothing"); but a child is told neither the server's address nor its process id, and takes that for none that runs. The
# call set_forkserver_preload of the parent does not reach it either. So a child's children import again, each for
# itself, what preloading was to spare them.
#
# Output seen, on CPython 3.11.7, 3.12.1 and 3.13.0, Linux (nothing has to be installed):
#   processes of two levels have 2 servers; the module was loaded before the work began: True, then False
#
# Exits 1 if the line is another.
#     PYTHON=python3.11 sh findings/python_forkserver_in_a_child.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "" >"$folder/heavy.py"
cat >"$folder/nested.py" <<'NESTED'
import multiprocessing
import os
import sys

CONTEXT = multiprocessing.get_context("forkserver")


def work(seen, levels):
    seen.put((os.getppid(), "heavy" in sys.modules))
    if levels:
        child = CONTEXT.Process(target=work, args=(seen, levels - 1))
        child.start()
        child.join()


if __name__ == "__main__":
    CONTEXT.set_forkserver_preload(["heavy"])
    seen = CONTEXT.SimpleQueue()
    first = CONTEXT.Process(target=work, args=(seen, 1))
    first.start()
    first.join()
    servers, loaded = zip(seen.get(), seen.get())
    print(
        f"processes of two levels have {len(set(servers))} servers; "
        f"the module was loaded before the work began: {loaded[0]}, then {loaded[1]}"
    )
NESTED
(cd "$folder" && PYTHONPATH="$folder" "${PYTHON:-python3}" nested.py) | tee "$folder/seen"
cat >"$folder/expected" <<'EXPECTED'
processes of two levels have 2 servers; the module was loaded before the work began: True, then False
EXPECTED
cmp -s "$folder/seen" "$folder/expected" || { echo "this has changed" >&2; exit 1; }

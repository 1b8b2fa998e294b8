#!/usr/bin/env bash
# pytest-xdist 3.8.0 beside pytest 9.2.0: `--dist loadgroup` groups nothing, and says nothing.
#
# A worker writes the group behind a test's id by setting item._nodeid, from which the scheduler reads it. pytest 9.2 makes
# the id of another attribute: the assignment changes nothing that is read, and each test is a group of its own. Tests that
# share a mark xdist_group, because they must not run at the same time, run on several workers; fixtures of a module are
# made once on each. With pytest 9.1.1 all tests of a group run on one worker, as the documentation says.
#
# Runs in a folder of its own. Exit code 0: as written here; 1: it has changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/test_groups.py" <<'PYTHON'
import os
import time

import pytest


@pytest.mark.xdist_group("together")
@pytest.mark.parametrize("number", range(12))
def test_one_of_a_group(number, request):
    time.sleep(0.2)
    with open(os.environ["SEEN"], "a") as file:
        file.write(f"{os.environ['PYTEST_XDIST_WORKER']} {request.node.nodeid}\n")
PYTHON

workers_of() {
    python3 -m venv "$place/$1"
    "$place/$1/bin/pip" install -q "pytest==$1" pytest-xdist==3.8.0
    (cd "$place" && SEEN="$place/$1.txt" "$place/$1/bin/pytest" -q -n 2 --dist loadgroup test_groups.py >/dev/null)
    cut -d ' ' -f 1 "$place/$1.txt" | sort -u | wc -l
}

before=$(workers_of 9.1.1)
now=$(workers_of 9.2.0)
echo "workers that ran the twelve tests of one group: pytest 9.1.1: $before, pytest 9.2.0: $now"
test "$before" = 1 && test "$now" = 2
! grep -q "@together" "$place/9.2.0.txt" && test "$(grep -c "@together" "$place/9.1.1.txt")" = 12
echo "as written: pytest 9.2 keeps no group of pytest-xdist 3.8.0"

"""What `make test` relies on of pytest-xdist."""

from __future__ import annotations

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there is one worker")
def test_a_file_is_one_workers(request):
    """A worker tells the scheduler the group of a test behind its id."""
    assert request.node.nodeid.endswith("@test_workers_of_tests")

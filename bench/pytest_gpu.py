"""pytest -p bench.pytest_gpu: for a run on a GPU that may be cut off, its tests shared out among processes.

A failure is told in full as soon as it is known. A process that cannot use its GPU any more, as after an illegal
access, ends, and another one takes its place: all its other tests would fail at once.
"""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several, which share the cores
        torch.set_num_threads(2)
    else:  # the process that prints
        config.pluginmanager.register(Teller(config))


class Teller:
    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.config.get_terminal_writer().line(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


def pytest_runtest_setup() -> None:
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)

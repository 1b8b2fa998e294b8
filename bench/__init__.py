"""Benchmarks: python -m bench."""

import os

from fastbd.base.memory import keep_freed

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; read when torch is loaded
keep_freed()  # as a training does

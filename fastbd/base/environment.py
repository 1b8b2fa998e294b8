"""The circumstances of a number: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path


def environment() -> dict:
    """Versions, machine and commit: the circumstances of a number."""
    import numpy
    import PIL
    import torch

    from fastbd import __version__

    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists() and shutil.which("git"):  # an installed copy may lie inside somebody else's repository
        git = ["git", "-C", root, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "fastbd": __version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "threads": torch.get_num_threads(),
    }

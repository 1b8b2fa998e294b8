"""Runs whose model is to be exported, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from cleanings import START

from fastbd import cli
from fastbd.models import CLIP, create


def disturbed(model: CLIP) -> CLIP:
    """The model in eval mode, with all weights and statistics away from their initial zeros and ones."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                change = 0.05 * torch.randn(tensor.shape, generator=noise)
                tensor.add_(change.abs() if name.endswith("running_var") else change)
    return model.eval()


def made(study: Path, name: str, activation: str = "quickgelu") -> tuple[Path, CLIP]:
    """The folder of a run, without a step of training, and the model in it; to be called in the study's folder."""
    model = disturbed(create(name, 1, activation))
    folder = study / "runs" / f"{name.rpartition(':')[2]}-{activation}"
    if not folder.exists():
        torch.save(model.state_dict(), study / "weights.pt")
        words = ["pretrain", *START, "--model", name, "--weights", "weights.pt", "--activation", activation]
        assert cli.main([*words, "--out", str(folder)]) == 0
    return folder, model

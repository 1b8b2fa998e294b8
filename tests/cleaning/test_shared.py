from __future__ import annotations

import pytest
import torch
from cleanings import start

from fastbd import cli
from fastbd.cleaning.finetune import Finetune
from fastbd.commands import clean
from fastbd.dist import World
from fastbd.errors import UserError
from fastbd.run import Run


def test_a_method_for_one_process_is_refused_in_several(study, monkeypatch, tmp_path):
    monkeypatch.chdir(study)
    start(study)
    monkeypatch.setattr(Finetune, "shared", False)
    flags = ["--run", "runs/start", "--method", "finetune", "--batch-size", "24", "--out", str(tmp_path / "run")]
    config, several = cli.parse("clean", flags), World(0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="--method finetune works in one process: start it without torchrun"):
        Run(config, clean.task(config, several), several)
    assert not (tmp_path / "run").exists()

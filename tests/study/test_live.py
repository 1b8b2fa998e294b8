"""What is said of a study while it goes on."""

from __future__ import annotations

import io
import json

from rich.console import Console

from fastbd.study import live
from fastbd.study.grid import Study
from fastbd.study.ledger import Ledger

STUDY = Study(
    name="s", about="Why?", pretrain=({"objective": "mmcl"},), clean=({"lr": tuple(k / 1000 for k in range(1, 13))},)
)


def test_a_study_under_way(tmp_path):
    """Ten runs of 60 s are left of thirteen, and one process is at them since a moment ago."""
    ledger = Ledger(tmp_path / "s", STUDY)
    assert live.opening(ledger) == f"study 's': Why?\n1 pre-training, 12 cleanings; in {tmp_path / 's'}"
    for run in ledger.runs[:3]:
        run.config.out.mkdir(parents=True)
        row = {"step": 10, "epoch": 4.0, "top1": 0.25, "asr": 0.125}
        (run.config.out / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        run.product.write_text('{"seconds": 60}')
    with ledger.take() as claim:
        shown = io.StringIO()
        Console(file=shown, width=100).print(live.view(ledger))
        title, *lines = (line.strip() for line in shown.getvalue().splitlines() if line.strip())
    assert title == "1 running, 9 waiting, 3 finished; about 10 min left"
    cells = [line.split() for line in lines[2:]]
    assert cells[0] == [ledger.runs[0].name, "finished", "4.0", "25.0%", "12.5%", "60", "s"]
    assert [row[:2] for row in cells[3:]] == [[claim.run.name, "running"]]
    said = live.ending(ledger, ledger.runs[2], "finished")
    assert said == f"[3/13] {ledger.runs[2].name}: finished, top-1 25.0%, ASR 12.5%; about 10 min left"

"""docs/reliability.md, from the counts that the scripts beside this one have left in soak/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from soak.tally import RESULTS, SAME, SENTENCE, UNTOLD

SCRIPTS = {
    "kills": "Signals at random moments",
    "ledger": "A study that several processes share, under load",
    "disks": "Disks that are full",
    "flips_data": "Damaged data files",
    "flips_states": "Damaged checkpoints, weights and state files",
    "memory": "Memory over a long run",
}
"""The scripts and what their sections are called."""
INTRODUCTION = """\
# Reliability

Faults were injected into the program on purpose, and their ends counted. An end is good where it is one of two:

- **same bytes**: after the command was repeated or the run resumed, as the program says, there is what an undisturbed
  run makes. Each file is compared, all but times and dates: data, plans, weights, states of the optimizer and of random
  generators, metrics, log rows, labels, pictures.
- **one sentence**: the command ends with exit code 2 and one sentence that names the file and says what to do. Nothing
  is lost.

A third one is counted apart: **cannot be told**. The file has other content, in a format without a checksum (a digit of
a log, a `.beton` of an earlier version or of FFCV), and nothing could know.

The checksums of a `.beton`'s rows are compared when they are asked for: `--verify` does it before a training,
`doctor --data` at any time. Those of checkpoints, plans, row lists and `.pixels` are compared whenever one is read.

Everything else is a failure, a traceback too, and is listed below its table.

`make soak` injects all of it and writes this page; `make soak-NAME` runs one script, and `SHARE=0.1` behind either
injects a tenth. The test suite injects a small part each time.
"""
NOT_COVERED = (
    "GPUs: everything here ran on CPUs, without CUDA graphs, compiled steps or DALI.",
    "Loss of power: files and folders are synced to the disk, but no machine was switched off.",
    "Network file systems: locks and renames were those of a local one.",
    "Several processes that train one model (torchrun); a test of the suite kills one of two.",
    "`demo`, which runs the verbs one after another, and the start of Python before a command begins.",
    "Weights without checksums: safetensors, and what torch.save wrote before version 1.6.",
    "A data file that is cut short under a running training, which the system ends without a word.",
    "Several faults at once, and a second signal while the first is being answered.",
)
SHOWN = 20  # failures of one fault
LONGEST = 600  # characters of a failure


def page(records: dict[str, dict[str, Any]]) -> str:
    """The page as Markdown, from the scripts' records by their names."""
    others = [name for name in records if name not in SCRIPTS]
    sections = [section(name, records.get(name)) for name in (*SCRIPTS, *sorted(others))]
    not_covered = "\n".join(f"- {line}" for line in NOT_COVERED)
    return "\n".join([INTRODUCTION, *sections, f"## What is not covered\n\n{not_covered}\n"])


def section(name: str, record: dict[str, Any] | None) -> str:
    """What one script has counted."""
    title = f"## {SCRIPTS.get(name, name)}\n"
    if record is None:
        return f"{title}\nNot run: `make soak-{name}`.\n"
    lines = [
        title,
        f"`make soak-{name}`: commit {record['commit']}, {record['date']}, {record['machine']}; "
        f"share {record['share']:g}, seed {record['seed']}, {record['seconds']:,} s.\n",
        f"| fault | how it is injected | times | {SAME} | {SENTENCE} | {UNTOLD} | failures |",
        "| :---- | :---- | ----: | ----: | ----: | ----: | ----: |",
        *(row(tally) for tally in record["tallies"]),
    ]
    for tally in record["tallies"]:
        if tally["failures"]:
            lines += [f"\nFailures of: {plain(tally['fault'])}\n", *failures(tally["failures"])]
    return "\n".join(lines) + "\n"


def row(tally: dict[str, Any]) -> str:
    """A tally as a line of a table."""
    ends = tally["ends"]
    times, known = sum(ends.values()), [ends.get(end, 0) for end in (SAME, SENTENCE, UNTOLD)]
    cells = [tally["fault"], tally["how"], times, *known, times - sum(known)]
    return f"| {' | '.join(plain(f'{cell:,}' if isinstance(cell, int) else cell) for cell in cells)} |"


def failures(said: list[str]) -> list[str]:
    """List items; where there are too many, the last says how many more there are."""
    shown = [f"- {plain(line)}" for line in said[:SHOWN]]
    return shown + ([f"- and {len(said) - SHOWN:,} more"] if len(said) > SHOWN else [])


def plain(text: str) -> str:
    """The text on one line that Markdown leaves as it is, of absolute paths only the names."""
    text = " ".join(re.sub(r"(?<![\w.~])/(?:[^\s/'\":,]+/)+", "", text).split())
    text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return re.sub(r"([|*_<\[`])", r"\\\1", text)


def main() -> None:
    """Write the page of all records that there are."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    Path("docs/reliability.md").write_text(page(records))


if __name__ == "__main__":
    main()

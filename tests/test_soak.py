"""The suite's share of `make soak`: a few faults of each kind; and the page that is made of the counts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from soak import page
from soak.tally import SAME, SENTENCE, Tally
from tables import table

FOLDER = Path(__file__).parent / "soak"
SHARE = 0.01  # where a script names no SUITE_SHARE of its own; 0 leaves it out
SCRIPTS = [path.stem for path in sorted(FOLDER.glob("*.py")) if "\ndef inject(" in path.read_text()]
RECORD = {
    "commit": "1a2b3c4",
    "date": "2026-01-02",
    "machine": "2 cores, Python 3.11.7, torch 2.13.0",
    "seed": 0,
    "share": 0.5,
    "seconds": 1234,
}


@pytest.mark.parametrize("name", table(SCRIPTS, *(name for name in SCRIPTS if name != "kills")))
def test_faults_end_in_the_same_bytes_or_in_one_sentence(name, tmp_path):
    script = importlib.import_module(f"soak.{name}")
    share = getattr(script, "SUITE_SHARE", SHARE)
    if not share:
        pytest.skip("too long for the suite: make soak")
    tallies = list(script.inject(share, 0, tmp_path))
    assert [failure for tally in tallies for failure in tally.failures] == []
    assert sum(tally.ends.total() for tally in tallies) > 0


def record(*tallies: Tally) -> dict:
    """As it comes back from soak/NAME.json."""
    return json.loads(json.dumps(RECORD | {"tallies": [vars(tally) for tally in tallies]}))


def test_the_page_counts_each_fault_and_shows_its_failures():
    held = Tally("a bit of x.pt is flipped", "at random", Counter({SAME: 3, SENTENCE: 1997}))
    broke = Tally("SIGKILL of a|b", "kill -9")
    broke.count(SAME)
    broke.count("traceback", 'File "/some/where/soak-x/place/run/ckpt_last.pt", line 3,\nin f')
    shown = page.page({"flips_states": record(held), "kills": record(broke)})
    assert "| a bit of x.pt is flipped | at random | 2,000 | 3 | 1,997 | 0 | 0 |" in shown
    assert r"| SIGKILL of a\|b | kill -9 | 2 | 1 | 0 | 0 | 1 |" in shown
    assert '\n- traceback: File "ckpt\\_last.pt", line 3, in f\n' in shown and "/some" not in shown
    about = "commit 1a2b3c4, 2026-01-02, 2 cores, Python 3.11.7, torch 2.13.0; share 0.5, seed 0, 1,234 s."
    assert f"`make soak-kills`: {about}" in shown
    assert "Not run: `make soak-disks`." in shown and shown.count("Failures of") == 1


def test_the_page_says_how_many_failures_it_leaves_out_and_shows_scripts_that_it_does_not_know():
    broke = Tally("a fault", "somehow")
    for number in range(page.SHOWN + 7):
        broke.count("hung", f"number {number}")
    shown = page.page({"other": record(broke)})
    assert shown.count("- hung: number") == page.SHOWN and "- and 7 more" in shown and "## other" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/tmp/soak-1/run/x.pt: no", "x.pt: no"),
        ("'/a/b' and \"/c/d/e.json\"", "'b' and \"e.json\""),
        ("run/a.pt 3/4 and/or", "run/a.pt 3/4 and/or"),
        ("a|b *c* <d> `e`", r"a\|b \*c\* \<d> \`e\`"),
    ],
)
def test_text_on_the_page_holds_no_paths_and_no_markup(text, shown):
    assert page.plain(text) == shown


@pytest.mark.parametrize(("end", "code"), [(SAME, 0), (SENTENCE, 0), ("hung", 1)])
def test_a_script_leaves_its_counts_and_fails_where_an_end_is_bad(end, code, tmp_path):
    script = tmp_path / "one.py"
    script.write_text(
        "from soak.tally import Tally, main\n"
        "def inject(share, seed, folder):\n"
        "    tally = Tally('a fault', f'{share} {seed} {folder.is_dir()}')\n"
        f"    tally.count({end!r}, 'seen')\n"
        "    yield tally\n"
        "main('one', inject)\n"
    )
    command = [sys.executable, script, "--share", "0.5", "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(FOLDER.parent)}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    found = json.loads((tmp_path / "soak/one.json").read_text())
    failures = [f"{end}: seen"] if code else []
    assert found["tallies"] == [{"fault": "a fault", "how": "0.5 3 True", "ends": {end: 1}, "failures": failures}]
    assert (found["share"], found["seed"]) == (0.5, 3) and f"a fault: {{'{end}': 1}}" in done.stdout

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastbd.base.errors import UserError
from fastbd.base.files import crc_of
from fastbd.base.run_folder import find, on_common_set, read, read_config, run_of


def test_reads_what_was_written(fake_runs):
    run = read(fake_runs / "mmcl_ssl-cleanclip-1")
    assert (run.verb, run.method, run.pretrain_objective) == ("clean", "cleanclip", "mmcl_ssl")
    assert run.start == fake_runs / "mmcl_ssl" and run.model == read(fake_runs / "mmcl_ssl").model
    assert len(run.metrics) == len(run.attacks) == 11 and len(run.cleaned) == 10
    assert run.env["torch"] == "2.13.0" and run.config == {"lr": 1e-4, "schedule": "exact", "exempt": "vectors"}


def test_reads_what_a_sweep_writes(large):
    run = read(large / "mmcl-s1-cleanclip-mmcl_ssl-lr0.001")
    assert len(run.id) == 12 and run.recorded["command"].startswith("python -m fastbd clean")
    assert run.result["reason"] == "finished" and run.architecture == "demo"
    assert run.attack == "badnet, 16 px random, 320 of 4,000 pairs, to \u201cbanana\u201d"
    assert (len(run.cleaned), len(run.between), run.before["step"]) == (12, 11, 0)
    assert not any(e.get("subset") for e in run.cleaned)


def test_older_runs_have_neither_plan_nor_result(fake_runs):
    (fake_runs / "mmcl" / "plan.json").unlink()
    run = read(fake_runs / "mmcl")
    assert (run.attack, run.result, run.id) == ("", {}, "")


def test_a_folder_that_is_being_made_is_no_run_yet(fake_runs):
    (fake_runs / "mmcl").rename(fake_runs / "mmcl.0123abcd.tmp")
    assert len(find([fake_runs])) == 9


def test_finds_runs_once_in_folders_and_by_name(fake_runs):
    everything = find([fake_runs])
    assert len(everything) == 10
    assert len(find([fake_runs / "mmcl", fake_runs, fake_runs / ".." / fake_runs.name])) == 10
    assert [run.name for run in find([fake_runs / "mmcl_ssl", fake_runs / "mmcl"])] == ["mmcl_ssl", "mmcl"]


def test_no_run_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        read(tmp_path)
    with pytest.raises(UserError, match="contains none"):
        find([tmp_path])
    (tmp_path / "config.json").write_text('{"verb": "pretrain", "config": {}}')
    with pytest.raises(UserError, match="method"):
        read(tmp_path)
    (tmp_path / "config.json").write_text('{"verb": ')
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path)


def test_a_line_cut_short_is_dropped_only_at_the_end(fake_runs):
    metrics = fake_runs / "mmcl" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole[:-40])
    assert len(read(fake_runs / "mmcl").metrics) == 30
    metrics.write_text(whole.replace("}", "", 1))
    with pytest.raises(UserError, match="line 1 of"):
        read(fake_runs / "mmcl")


def test_repeated_steps_count_once(fake_runs, evaluation):
    run = fake_runs / "mmcl"
    before = read(run)
    with (run / "metrics.jsonl").open("a") as file:
        for step in (1200, 40):  # a later `evaluate` of another trigger; a step that a resumed run did again
            file.write(json.dumps(evaluation(step, step / 40, 0.5, 0.0)) + "\n")
    assert read(run).metrics == before.metrics


def test_other_evaluation_sets_are_left_out(fake_runs, evaluation):
    with (fake_runs / "mmcl" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(1200, 30, 0.9, 0.9) | {"set": "other"}) + "\n")
    runs = find([fake_runs])
    assert len(runs[0].metrics) == 32
    assert [len(run.metrics) for run in on_common_set(runs)] == [31] + [11] * 4 + [31] + [11] * 4
    assert {e["set"] for run in on_common_set(runs) for e in run.metrics} == {"demo-val"}


def test_evaluation_sets_of_one_name_and_other_content_are_left_out(fake_runs, evaluation):
    """Of rows before `content` was recorded nobody knows; where there is one alone, it is taken to be theirs."""
    path = fake_runs / "mmcl" / "metrics.jsonl"
    rows = [json.loads(line) | {"content": "aa"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [len(run.metrics) for run in on_common_set(find([fake_runs]))] == [31] + [11] * 4 + [31] + [11] * 4
    with path.open("a") as file:
        file.write(json.dumps(evaluation(1240, 31, 0.9, 0.9) | {"content": "bb"}) + "\n")
    assert {e.get("content") for run in on_common_set(find([fake_runs])) for e in run.metrics} == {None}


def test_a_pretraining_that_diverged_is_no_model(write_run, evaluation, tmp_path):
    for k, verb in enumerate(("pretrain", "clean")):
        about = {"verb": verb, "objective": "mmcl", "pretrain_objective": "mmcl"}
        write_run(tmp_path / str(k), about, [evaluation(0, 0.0, 0.5, 0.9)], [], {"reason": "diverged"})
    assert [run.verb for run in on_common_set(find([tmp_path]))] == ["clean"]


def test_a_pretraining_that_was_stopped_before_its_first_evaluation_is_no_model(fake_runs, write_run):
    about = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    write_run(fake_runs / "stopped", about, [], [])
    write_run(fake_runs / "ended", about, [], [], {"reason": "finished"})
    names = {run.name for run in on_common_set(find([fake_runs]))}
    assert "stopped" not in names and {"ended", "mmcl"} <= names


def test_runs_without_evaluation_are_the_users_mistake(write_run, tmp_path):
    write_run(tmp_path / "a", {"objective": "mmcl", "pretrain_objective": "mmcl"}, [], [])
    with pytest.raises(UserError, match="no.* evaluation"):
        on_common_set(find([tmp_path]))


def test_imports_no_torch_matplotlib_or_jinja():
    heavy = "('torch', 'matplotlib', 'jinja2')"
    code = f"import sys, fastbd.report.compare, fastbd.report.write; print(*(m in sys.modules for m in {heavy}))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


@pytest.fixture
def run_files(tmp_path, monkeypatch) -> None:
    """A run folder `run`, and weights of another program beside their own config.json in `other`."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/config.json", "run/env.json", "run/log.jsonl", "run/ckpt_last.pt", "run/ckpt_epoch_021.pt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("other").mkdir()
    for name in ("other/config.json", "other/model.safetensors", "RN50.pt", "ckpt_last.pt"):
        Path(name).touch()


def test_a_checkpoint_in_a_run_folder_means_that_run(run_files, monkeypatch):
    assert run_of(Path("run"), "--run") == (Path("run"), None)
    assert run_of(Path("nowhere"), "--run") == (Path("nowhere"), None)
    assert run_of(Path("run/ckpt_last.pt"), "--run") == (Path("run"), "last")
    assert run_of(Path("run/ckpt_epoch_021.pt"), "--run") == (Path("run"), "21")
    Path("best.pt").symlink_to("run/ckpt_epoch_021.pt")
    assert run_of(Path("best.pt"), "--run") == (Path("run").resolve(), "21")
    monkeypatch.chdir("run")
    assert run_of(Path("ckpt_last.pt"), "--run") == (Path("."), "last")


def test_any_other_file_is_not_a_run(run_files):
    for name in ("run/config.json", "run/log.jsonl"):
        with pytest.raises(UserError, match=f"^--run {name} is a file in a run folder: give the folder run\\.$"):
            run_of(Path(name), "--run")
    for name in ("RN50.pt", "ckpt_last.pt", "other/model.safetensors", "other/config.json", "/dev/null"):
        with pytest.raises(UserError, match=rf"--runs {name} is a file: .* pretrain --weights {name} --epochs 0\.$"):
            run_of(Path(name), "--runs")


def test_a_path_through_a_file_is_not_a_run(run_files):
    for name, said in (("RN50.pt/run", "there is no folder RN50.pt/run"), ("/dev/null", "it has no config.json")):
        with pytest.raises(UserError, match=said):
            read_config(Path(name))


def test_a_plan_that_is_not_one_is_named(tmp_path):
    about = {"verb": "pretrain", "config": {}, "method": None, "objective": "mmcl", "pretrain_objective": "mmcl"}
    (tmp_path / "config.json").write_text(json.dumps({**about, "start": None}))
    for plan in ('{"attacks": 3}', '{"attacks": [1]}', '{"attacks": [{"trigger": [], "pairs": 1}]}'):
        (tmp_path / "plan.json").write_text(plan)
        with pytest.raises(UserError, match=r"plan\.json is damaged"):
            read(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("start", 7), ("name", 3), ("eval_data", 5), ("classes", [])])
def test_a_text_that_is_none_is_named(fake_runs, name, value):
    path = fake_runs / "mmcl" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=rf"config\.json is damaged \({name} .* is not a text\): put a copy of it back"):
        read(fake_runs / "mmcl")


def test_a_plan_that_was_changed_is_named(fake_runs):
    path = fake_runs / "mmcl" / "plan.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps(plan | {"crc32": crc_of(plan)}))
    attack = read(fake_runs / "mmcl").attack
    assert "banana" in attack
    path.write_text(path.read_text().replace("banana", "canana"))
    with pytest.raises(UserError, match=r"mmcl/plan\.json is damaged or was changed: put a copy"):
        read(fake_runs / "mmcl")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("result.json", '{"seconds": "x"}'),
        ("metrics.jsonl", '{"step": 1, "top1": [1]}\n'),
        ("metrics.jsonl", '{"step": 1, "top1": 0.5, "top1_low": null}\n'),
        ("log.jsonl", '{"step": 1, "loss": {}}\n'),
        ("env.json", '{"cpu_cores": "two"}'),
        ("result.json", '{"devices": null}'),
        ("result.json", '{"rebound": 7}'),
    ],
)
def test_what_should_be_a_number_and_is_not_is_named(name, text, tmp_path):
    about = {"verb": "pretrain", "config": {}, "method": None, "objective": "mmcl", "pretrain_objective": "mmcl"}
    (tmp_path / "config.json").write_text(json.dumps({**about, "start": None}))
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} is damaged \(.* is not a number\): put a copy of it back, or go on"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("config.json", {"config": {"lr": "fast"}}, "lr 'fast' is not a number"),
        ("config.json", {"config": {"seed": []}}, "seed [] is not a number"),
        ("config.json", {"pretrain_objective": None}, "pretrain_objective None is not a text"),
        ("config.json", {"built": []}, "built [] is not an object"),
        ("env.json", {"commit": 7}, "commit 7 is not a text"),
        ("result.json", {"reason": []}, "reason [] is not a text"),
        (
            "result.json",
            {"rebound": {"rebound_max": 0.5, "rebound": {"steps": [], "asr": [0.1]}}},
            "its rebound is not a course of ASR along steps",
        ),
    ],
)
def test_what_a_report_reads_is_of_its_kind(name, changed, says, fake_runs):
    path = fake_runs / "mmcl" / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changed))
    with pytest.raises(UserError) as refused:
        read(fake_runs / "mmcl")
    assert str(refused.value) == f"{path} is damaged ({says}): put a copy of it back, or go on without this run."

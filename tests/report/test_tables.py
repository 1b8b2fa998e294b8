from __future__ import annotations

import json
import shutil

import pytest

from fastbd.base.run_folder import find
from fastbd.base.stats import over
from fastbd.report.groups import by_seed, cleaned_groups, cleaning_of, ends, groups, models, place_of, replicates
from fastbd.report.tables import best_of, costs, instability, rebounds, seconds, table

CLEAN = {"verb": "clean", "method": "cleanclip", "objective": "mmcl_ssl", "pretrain_objective": "mmcl"}


def cleaned(write_run, evaluation, folder, start, *points, **flags):
    """A run from (top-1, ASR) pairs in %, the first before cleaning; from a start that needs not exist."""
    rows = [evaluation(10 * k, k, top1 / 100, asr / 100) for k, (top1, asr) in enumerate(points)]
    return write_run(folder, CLEAN | {"start": str(start), "config": flags}, rows, [])


def test_models_that_differ_by_seed_are_one_row(large):
    rows = table(find([large]))
    assert [(row.group.model, row.group.method) for row in rows] == [
        (model, method)
        for model in ("MMCL", "MMCL+SSL")
        for method in ("CleanCLIP", "Finetuning (MMCL)", "Finetuning (SSL)", "PAR")
    ]
    assert {(len(row.group.runs), row.replicates, row.models) for row in rows} == {(18, 3, 3)}


def test_a_study_that_was_moved_reads_the_same(large, tmp_path):
    shutil.copytree(large, tmp_path / "moved")
    for path in (tmp_path / "moved").glob("*/config.json"):
        path.write_text(path.read_text().replace(str(large), "/gone"))
    for of in (groups, cleaned_groups):
        before, after = (of(find([folder])) for folder in (large, tmp_path / "moved"))
        assert [(g.model, g.method, len(g.runs)) for g in after] == [(g.model, g.method, len(g.runs)) for g in before]


def test_row_is_the_mean_over_seeds_of_the_best(write_run, evaluation, tmp_path):
    for seed, (before, *after) in enumerate([((50, 99), (40, 4), (45, 7)), ((60, 97), (54, 5), (55, 30))]):
        pre = {"objective": "mmcl", "pretrain_objective": "mmcl", "config": {"seed": seed, "epochs": 9}}
        start = write_run(tmp_path / f"s{seed}", pre, [evaluation(90, 9, before[0] / 100, before[1] / 100)], [])
        for k, point in enumerate(after):
            cleaned(write_run, evaluation, tmp_path / f"s{seed}-{k}", start, before, point, seed=seed, lr=k)
    (row,) = table(find([tmp_path]))
    strict, loose = row.best
    # Student's interval of top-1 goes from -8.5 to 118.5 %, and a share does not.
    assert (row.top1.mean, row.top1.low, row.top1.high) == (0.55, 0.0, 1.0)
    high = over([0.99, 0.97])
    assert (row.asr.mean, row.asr.low, row.asr.high) == (high.mean, high.low, 1.0)
    assert strict.top1.mean == over([0.40, 0.54]).mean and strict.reached == 2  # 5 % itself counts
    assert strict.kept == pytest.approx(over([0.8, 0.9]))
    assert loose.top1.mean == over([0.45, 0.54]).mean
    assert [point[0].name for point in loose.points] == ["s0-1", "s1-0"]
    # Areas by hand: corners (ASR, top-1) (4, 40), (7, 45), and (5, 54), (30, 55).
    assert row.area.mean == pytest.approx((0.03 * 0.40 + 0.93 * 0.45 + 0.25 * 0.54 + 0.70 * 0.55) / 2)
    assert best_of(find([tmp_path])) == {"mmcl/cleanclip": {"top1": pytest.approx(0.47), "asr": pytest.approx(0.045)}}


def test_a_seed_that_never_came_down_counts_as_nothing_kept(write_run, evaluation, tmp_path):
    for seed, asr in enumerate((3, 40)):
        pre = {"objective": "mmcl", "pretrain_objective": "mmcl", "config": {"seed": seed}}
        start = write_run(tmp_path / f"s{seed}", pre, [], [])
        cleaned(write_run, evaluation, tmp_path / f"s{seed}-c", start, (50, 99), (45, asr), seed=seed)
    (row,) = table(find([tmp_path]))
    assert (row.best[0].reached, row.replicates) == (1, 2)
    assert row.best[0].top1.mean == 0.45 and row.best[0].kept == over([0.9, 0.0])


def test_one_model_has_the_interval_of_its_images(fake_runs):
    row = table(find([fake_runs]))[0]
    found = row.best[0].points[0][1]
    assert row.best[0].top1 == (found["top1"], found["top1_low"], found["top1_high"], 1)


def test_best_evaluation_by_the_formula(fake_runs):
    mended, _, stubborn, _ = table(find([fake_runs]))
    run, point = mended.best[0].points[0]
    assert (run.name, point["epoch"]) == ("mmcl-cleanclip-1", 10)  # only the larger rate gets below 5 %
    assert mended.best[1].points[0][1]["asr"] > 0.05
    assert stubborn.best[0].reached == 0 and 0.05 < stubborn.lowest["asr"] < 0.10
    assert best_of(find([fake_runs]))["mmcl_ssl/cleanclip"] is None


def test_evaluations_on_part_of_the_images_count_nowhere(write_run, evaluation, tmp_path):
    rows = [evaluation(0, 0, 0.5, 0.9), evaluation(5, 0.5, 0.6, 0.0) | {"subset": True}, evaluation(10, 1, 0.4, 0.04)]
    write_run(tmp_path / "a", CLEAN | {"start": "/base"}, rows, [])
    (row,) = table(find([tmp_path]))
    assert row.best[0].top1.mean == 0.4 and instability(find([tmp_path])[0]) == (0, 0, False)


def test_seeds_of_the_cleaning_stand_in_for_models_only_where_there_is_one(write_run, evaluation, tmp_path):
    for start in ("a", "b"):
        write_run(tmp_path / start, {"objective": "mmcl", "pretrain_objective": "mmcl"}, [], [])
        for seed, top1 in enumerate((40, 44)):
            at = tmp_path / f"{start}-{seed}"
            cleaned(write_run, evaluation, at, tmp_path / start, (50, 99), (top1 + 10 * (start == "b"), 1), seed=seed)
    (group,) = groups(find([tmp_path]))
    drawn = replicates(group)
    assert (len(drawn), models(group)) == (4, 2)
    values = [runs[0].cleaned[0]["top1"] for runs in drawn]
    assert by_seed(zip(drawn, values, strict=True)) == pytest.approx([0.42, 0.52])
    assert by_seed(zip(drawn[:2], values[:2], strict=True)) == [0.40, 0.44]
    (alone,) = table([run for run in find([tmp_path]) if run.name.startswith("a")])
    assert (alone.models, alone.replicates, alone.best[0].top1.n) == (1, 2, 2)
    assert alone.top1.n == 1 and alone.top1.low < 0.5  # it was drawn once, whatever it was cleaned with


def test_what_sets_models_apart_is_named(write_run, evaluation, tmp_path):
    for weight in (0.5, 1.0):
        flags = {"ssl_weight": weight, "seed": 0, "lr": 1e-3}
        pre = {"objective": "mmcl_ssl", "pretrain_objective": "mmcl_ssl", "config": flags}
        write_run(tmp_path / f"w{weight}", pre, [evaluation(9, 9, 0.5, 0.9)], [])
    pre = {
        "objective": "mmcl",
        "pretrain_objective": "mmcl",
        "config": {"ssl_weight": 2.0},
        "data": "/data/other.beton",
    }
    write_run(tmp_path / "other", pre, [evaluation(9, 9, 0.5, 0.9)], [])
    found = groups(find([tmp_path]))
    assert [group.model for group in found] == ["MMCL", "MMCL+SSL, ssl weight 0.5", "MMCL+SSL, ssl weight 1"]
    assert [place_of(group, found) for group in found] == ["other.beton", "pairs.beton", "pairs.beton"]


def test_settings_that_are_compared_have_rows_of_their_own(write_run, evaluation, tmp_path):
    """Learning rates are searched over, and values that come once: those of a random search."""
    place = 0
    for tau in (0.0, 2.15):
        for lr in (1e-4, 3e-4):
            flags = {"seed": 0, "lr": lr, "tau": tau, "ssl_weight": 0.1 * place}
            cleaned(write_run, evaluation, tmp_path / f"c{place}", tmp_path / "start", (50, 99), (45, 1), **flags)
            place += 1
    found = {group.method: len(group.runs) for group in groups(find([tmp_path]))}
    assert found == {"CleanCLIP, tau 0": 2, "CleanCLIP, tau 2.15": 2}
    assert list(best_of(find([tmp_path]))) == ["mmcl/cleanclip (tau 0)", "mmcl/cleanclip (tau 2.15)"]


@pytest.mark.parametrize("rates", [(1e-4, 1e-4), (1e-4, 3e-4)], ids=["one rate", "rates differ too"])
def test_two_settings_are_two_rows_even_of_one_run_each(write_run, evaluation, tmp_path, rates):
    for tau, lr in zip((0.0, 2.15), rates, strict=True):
        flags = {"seed": 0, "lr": lr, "tau": tau}
        cleaned(write_run, evaluation, tmp_path / f"c{tau}", tmp_path / "start", (50, 99), (45, 1), **flags)
    assert [group.method for group in groups(find([tmp_path]))] == ["CleanCLIP, tau 0", "CleanCLIP, tau 2.15"]


def test_nothing_is_searched_at_one_learning_rate(write_run, evaluation, tmp_path):
    for tau in (0.0, 0.5, 1.0, 1.5, 2.0):
        flags = {"seed": 0, "lr": 1e-4, "tau": tau}
        cleaned(write_run, evaluation, tmp_path / f"c{tau}", tmp_path / "start", (50, 99), (45, 1), **flags)
    assert len(groups(find([tmp_path]))) == 5


def test_checkpoints_of_one_run_are_two_models(fake_runs, write_run, evaluation):
    cleaned(write_run, evaluation, fake_runs / "early", fake_runs / "mmcl", (50, 90), (50, 1), checkpoint="21")
    names = [
        group.model for group in groups(find([fake_runs])) if group.method == "CleanCLIP" and group.objective == "mmcl"
    ]
    assert sorted(names) == ["MMCL, checkpoint 21", "MMCL, checkpoint last"]


def test_a_model_is_known_by_its_weights(fake_runs, write_run, evaluation):
    """Wherever it lay when it was cleaned."""
    for name, start, weights in (("a", "mmcl", "aa"), ("b", "moved/mmcl", "aa"), ("c", "mmcl", "bb")):
        about = {"verb": "clean", "method": "par", "start": str(fake_runs / start), "start_weights": weights}
        about |= {"objective": "mmcl", "pretrain_objective": "mmcl", "config": {"lr": 1e-4, "seed": 0}}
        write_run(fake_runs / name, about, [evaluation(0, 0, 0.5, 0.9), evaluation(20, 1, 0.5, 0.01)], [])
    (row,) = [row for row in table(find([fake_runs])) if row.group.method == "PAR"]
    assert (row.models, row.replicates) == (2, 2)


def test_a_model_that_was_trained_on_after_it_was_cleaned_is_another(fake_runs, write_run, evaluation):
    """The cleaning of the half-trained one is in no row of the other."""
    for step, name, top1 in ((1200, "whole", 0.5), (100, "half", 0.2)):
        about = {"verb": "clean", "method": "par", "start": str(fake_runs / "mmcl"), "start_step": step}
        about |= {"objective": "mmcl", "pretrain_objective": "mmcl", "config": {"lr": 1e-4}}
        write_run(fake_runs / name, about, [evaluation(0, 0, top1, 0.9), evaluation(20, 1, top1, 0.01)], [])
        rows = {row.group.model: row for row in table(find([fake_runs])) if row.group.method == "PAR"}
        if step == 1200:
            assert list(rows) == ["MMCL"]
    assert {model: (row.models, row.top1.mean) for model, row in rows.items()} == {
        "MMCL, step 1200": (1, 0.5),
        "MMCL, step 100": (1, 0.2),
    }


def test_models_whose_pretraining_is_gone_are_not_taken_for_one(write_run, evaluation, tmp_path):
    for name in ("x", "y"):
        cleaned(write_run, evaluation, tmp_path / f"{name}-c", f"/gone/{name}", (50, 99), (45, 1), seed=0)
    assert [group.model for group in groups(find([tmp_path]))] == ["MMCL, folder x", "MMCL, folder y"]


def test_cleaning_sets_are_rows_of_their_own(write_run, evaluation, tmp_path):
    for rows, left in ((1000, 0), (1000, 5), (2000, 0)):
        flags = {"rows": rows, "poison_left": left, "seed": 0}
        cleaned(write_run, evaluation, tmp_path / f"{rows}-{left}", "/gone/x", (50, 99), (45, 1), **flags)
    assert [group.method for group in groups(find([tmp_path]))] == [
        "CleanCLIP, up to 1,000 pairs",
        "CleanCLIP, up to 1,000 pairs, 5 poisoned pairs left",
        "CleanCLIP, up to 2,000 pairs",
    ]


def test_a_model_that_no_run_cleans(fake_runs):
    (only,) = table(find([fake_runs / "mmcl"]))
    assert (only.group.method, only.lowest, only.area) == ("", None, None) and only.top1.mean == pytest.approx(
        0.577, abs=1e-3
    )


def test_instability_by_hand(write_run, evaluation, tmp_path):
    points = (50, 99), (45, 20), (44, 30), (46, 35), (40, 15), (39, 18)
    cleaned(write_run, evaluation, tmp_path / "a", "/base", *points)
    fell, rise, clear = instability(find([tmp_path])[0])
    assert fell == pytest.approx(2 / 5) and rise == pytest.approx(0.15)  # 20 to 30 and 15 to 18; 20 to 35
    assert clear


@pytest.mark.parametrize(("after", "clear"), [(92, False), (97, True)])
def test_a_rise_from_the_start_counts_as_every_other(after, clear, write_run, evaluation, tmp_path):
    """760 triggered images: Wilson's interval of 90 % is 87.7 to 91.9 %; of 92 % from 89.9, of 97 % from 95.5."""
    cleaned(write_run, evaluation, tmp_path / "a", "/base", (50, 90), (45, after), (44, 80))
    fell, rise, found = instability(find([tmp_path])[0])
    assert (fell, rise, found) == (1 / 2, pytest.approx((after - 90) / 100), clear)


def test_runs_that_diverged_or_have_not_ended_are_counted(write_run, evaluation, tmp_path):
    """Without a result.json a run has ended where its last evaluation is of its last epoch."""
    made = {"a": (1.0, 1, {"reason": "diverged"}), "b": (1e-4, 1, None), "c": (1e-4, 3, None), "d": (1e-3, 1, None)}
    for name, (lr, epoch, result) in made.items():
        config = CLEAN | {"start": "/base", "config": {"lr": lr, "epochs": 3, "seed": 0}}
        write_run(tmp_path / name, config, [evaluation(10 * epoch, epoch, 0.5, 0.9)], [], result)
    (group,) = groups(find([tmp_path]))
    assert cleaning_of(group) == "CleanCLIP; 1 of 4 runs diverged (lr 1e0) and 2 of 4 runs have not ended"
    assert ends(groups(find([tmp_path / name for name in "bc"]))[0]) == "1 of 2 runs has not ended (at epoch 1 of 3)"
    assert ends(groups(find([tmp_path / "a"]))[0]) == "the run diverged (lr 1e0)"
    assert cleaning_of(groups(find([tmp_path / "c"]))[0]) == "CleanCLIP"


def test_rebound_from_result_and_from_evaluate(large, write_run, evaluation, tmp_path):
    (found,) = rebounds(find([large / "mmcl-s0-par-mmcl-lr0.001"])[0])
    assert found["max"] == pytest.approx(2 * found["first"]) and found["steps"] == 100
    course = {"steps": [0, 100], "asr": [0.479, 0.904], "top1": [0.9, 0.9]}
    row = {"rebound_max": 0.904, "rebound_change": 0.425, "rebound_area": 0.84, "rebound": course, "rebound_lr": 0.0}
    write_run(
        tmp_path / "a", CLEAN | {"start": "/b"}, [evaluation(9, 9, 0.9, 0.479), evaluation(9, 9, 0.9, 0.479) | row], []
    )
    assert rebounds(find([tmp_path])[0]) == [
        {"first": 0.479, "max": 0.904, "change": 0.425, "mean": 0.84, "steps": 100, "lr": 0.0}
    ]


def test_costs_add_up(large):
    found = {(objective, part): cost for objective, part, cost in costs(find([large]))}
    assert found["mmcl", "Pre-training"].hours == pytest.approx(3 * 300 / 3600)
    assert found["mmcl_ssl", "PAR"].hours == pytest.approx(18 * 45 / 3600)
    total = found["", "Total"]
    assert (total.runs, total.device, total.estimated) == (150, "CPU", False)
    assert total.hours == pytest.approx((6 * 300 + 144 * 45) / 3600)
    assert total.evaluating == pytest.approx((6 * 30 + 144 * 9) / (6 * 300 + 144 * 45))


def test_cost_of_an_older_run_comes_from_its_log(write_run, evaluation, tmp_path):
    log = [{"step": 10, "loss": 1, "pairs_per_s": 100.0}, {"step": 20, "loss": 1, "pairs_per_s": 50.0}]
    config = {"objective": "mmcl", "pretrain_objective": "mmcl", "config": {"batch_size": 20}}
    write_run(tmp_path / "a", config, [evaluation(0, 0, 0.5), evaluation(20, 1, 0.5)], log)
    assert seconds(find([tmp_path])[0]) == (10 * 20 / 100 + 10 * 20 / 50, 2 * 1.5)
    assert costs(find([tmp_path]))[0][2].estimated


def test_two_attacks_are_told_apart_by_what_differs(write_run, evaluation, tmp_path):
    for name, trigger in (("a", {}), ("b", {"patch_size": 8})):
        start = write_run(tmp_path / name, {"objective": "mmcl", "pretrain_objective": "mmcl"}, [], [])
        run = cleaned(write_run, evaluation, tmp_path / f"{name}-c", start, (50, 99), (45, 1), seed=0)
        for folder in (start, run):
            plan = json.loads((folder / "plan.json").read_text())
            plan["attacks"][0]["trigger"] |= trigger
            (folder / "plan.json").write_text(json.dumps(plan))
    found = groups(find([tmp_path]))
    assert [place_of(group, found) for group in found] == ["16 px random", "8 px random"]
    assert list(best_of(find([tmp_path]))) == ["mmcl/cleanclip (16 px random)", "mmcl/cleanclip (8 px random)"]

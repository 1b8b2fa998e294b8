from __future__ import annotations

import json

import pytest

from fastbd.base.run_folder import find
from fastbd.base.stats import difference
from fastbd.report.finding import paragraphs, told
from fastbd.report.tables import table
from fastbd.report.verdict import comparisons


@pytest.fixture
def compared(write_run, evaluation, tmp_path):
    """Studies of models that start at top-1 50 %, from the (top-1, ASR) in % that each comes to, by objective."""

    def make(mmcl, mmcl_ssl, method="cleanclip", before=99):
        for objective, ends in (("mmcl", mmcl), ("mmcl_ssl", mmcl_ssl)):
            for seed, (top1, asr) in enumerate(ends):
                pre = {"objective": objective, "pretrain_objective": objective, "config": {"seed": seed}}
                start = write_run(tmp_path / f"{objective}{seed}", pre, [], [])
                rows = [evaluation(0, 0, 0.5, before / 100), evaluation(10, 1, top1 / 100, asr / 100)]
                config = pre | {"verb": "clean", "method": method, "objective": "mmcl_ssl", "start": str(start)}
                write_run(tmp_path / f"{objective}{seed}-{method}", config, rows, [])
        return table(find([tmp_path]))

    return make


# Kept, of 50 %: 98, 100, 102 %; 50, 52, 54 %; 96, 99, 102 %; none, 60, 90 %.
GOOD = [(49, 1), (50, 2), (51, 3)]
POOR = [(25, 1), (26, 1), (27, 1)]
ALIKE = [(48, 1), (49.5, 1), (51, 1)]
MIXED = [(50, 80), (30, 1), (45, 1)]


@pytest.mark.parametrize(
    ("mmcl", "other", "verdict", "says"),
    [
        (GOOD, POOR, "shows", "agrees with the published finding: CleanCLIP works after MMCL"),
        (POOR, GOOD, "shows", "does not agree with the published finding"),
        (GOOD, [(47, 1), (47.5, 1), (48, 1)], "shows", "in its direction; the difference is smaller than published"),
        (GOOD, ALIKE, "does not show", "does not agree with the published finding"),
        (GOOD, MIXED, "cannot tell", "the seeds differ too much to say, the difference being 50.0 points"),
        (MIXED[:1] * 2, MIXED[:1] * 3, "does not show", "it came down to ASR ≤ 5% after neither"),
        (GOOD[:1], POOR[:1], "cannot tell", "with one pre-trained model on a side nothing can be said about others"),
        (GOOD, POOR[:1], "cannot tell", "with one pre-trained model"),
    ],
)
def test_verdict_follows_the_rule(compared, mmcl, other, verdict, says):
    rows = compared(mmcl, other)
    (pair,) = comparisons(rows)
    kept = [[top1 / 50 if asr <= 5 else 0 for top1, asr in side] for side in (mmcl, other)]
    assert pair.difference == pytest.approx(difference(*kept), rel=1e-6) and pair.verdict == verdict
    ((claim, ground),) = paragraphs(rows)
    start = {"shows": "This study shows that", "does not show": "This study does not show that"}
    assert claim.startswith(start.get(verdict, "This study cannot tell whether")) and says in f"{claim} {ground}"


def test_failures_are_told_and_count_as_nothing(compared):
    ((claim, ground),) = paragraphs(compared(GOOD, [(50, 80), (50, 30), (50, 60)]))
    # Kept 100 % (98, 100, 102; t interval 100 +- 4.303 * 2 / sqrt(3)) less nothing of nothing.
    assert "100.0 points (95.0 to 105.0) more of the accuracy after MMCL than after MMCL+SSL." in claim
    assert "After MMCL it kept 100.0% (95.0–105.0) of the accuracy at ASR ≤ 5%." in ground
    assert "After MMCL+SSL none of 3 seeds came down to ASR ≤ 5%; the lowest ASR is 30.0%" in ground


def test_a_backdoor_that_had_not_landed_says_nothing(compared):
    ((claim, ground),) = paragraphs(compared(GOOD, POOR, before=49))
    assert "the backdoor had not landed in MMCL and MMCL+SSL" in claim and "published" not in ground
    assert "came down" not in ground and "After MMCL the backdoor had not landed" in ground


def test_a_backdoor_that_landed_with_some_seeds_is_said_so(compared, tmp_path):
    compared(GOOD, POOR)
    failed = tmp_path / "mmcl1-cleanclip" / "metrics.jsonl"
    failed.write_text(failed.read_text().replace('"asr": 0.99', '"asr": 0.2'))
    ((claim, ground),) = paragraphs(table(find([tmp_path])))
    assert "the backdoor had not landed in MMCL (with 1 of 3 seeds)" in claim
    assert "After MMCL the backdoor had landed with 2 of 3 seeds, so a mean over them shows nothing." in ground


def test_one_seed_points_nowhere(compared):
    ((claim, ground),) = paragraphs(compared(GOOD[:1], POOR[:1]))
    assert "cannot tell" in claim and "direction" not in ground and "published" not in ground


@pytest.fixture
def cleanings(write_run, evaluation, tmp_path):
    """A table of MMCL models, each cleaned by PAR once for each (top-1, ASR) in % of a kind.

    A kind is (size of the trigger, settings of the cleaning, top-1 in % before it, classes).
    """

    def make(kinds):
        for k, ((size, settings, before, classes), ends) in enumerate(kinds):
            for seed, (top1, asr) in enumerate(ends):
                pre = {"objective": "mmcl", "pretrain_objective": "mmcl", "config": {"seed": seed}}
                start = tmp_path / f"s{size}-{seed}"
                for made in [start] if not start.exists() else []:
                    attacked(write_run(made, pre, [], []), size)
                rows = [evaluation(0, 0, before / 100, 0.99), evaluation(10, 1, top1 / 100, asr / 100)]
                rows = [row | ({"n_classes": classes} if classes else {}) for row in rows]
                config = pre | {"verb": "clean", "method": "par", "start": str(start)}
                config |= {"config": {"seed": seed, "lr": 1e-4} | settings}
                attacked(write_run(tmp_path / f"clean{k}-{seed}", config, rows, []), size)
        return table(find([tmp_path]))

    def attacked(folder, size):
        plan = json.loads((folder / "plan.json").read_text())
        plan["attacks"][0]["trigger"]["patch_size"] = size
        (folder / "plan.json").write_text(json.dumps(plan))

    return make


def test_a_study_of_triggers_is_answered_by_them(cleanings):
    rows = cleanings([((16, {}, 50, 20), POOR), ((4, {}, 50, 20), GOOD), ((8, {}, 50, 20), ALIKE)])
    near, far = comparisons(rows)
    assert (near.names, near.verdict) == (("4 px random", "8 px random"), "does not show")  # 4 before 16, by size
    assert (far.names, far.verdict) == (("4 px random", "16 px random"), "shows")
    assert far.difference == pytest.approx(difference([0.98, 1.0, 1.02], [0.5, 0.52, 0.54]), rel=1e-6)
    (claim, ground), (other, _) = sorted(paragraphs(rows), key=lambda said: "does not" in said[0])
    assert claim.startswith("This study shows that what PAR keeps after MMCL depends on the attack: 48.0 points")
    assert claim.endswith("more of the accuracy with 4 px random than with 16 px random.")
    assert "With 16 px random it kept 52.0%" in ground and "published" not in ground
    assert "does not show that what PAR keeps after MMCL depends on the attack (4 px random against 8" in other


def test_settings_of_a_method_are_compared_by_name(cleanings):
    plain, pushed = (16, {"tau": 0.0}, 50, 20), (16, {"tau": 2.15}, 50, 20)
    (pair,) = comparisons(cleanings([(plain, GOOD), (pushed, POOR)]))
    assert (pair.axis.name, pair.method, pair.names) == ("settings of the cleaning", "PAR", ("tau 0", "tau 2.15"))
    assert pair.verdict == "shows"


def test_of_two_settings_each_is_compared_by_itself(cleanings):
    crossed = [(tau, gate) for tau in (0.0, 2.15) for gate in ("batch", "sample")]
    rows = cleanings([((16, {"tau": tau, "gate": gate}, 50, 20), GOOD) for tau, gate in crossed])
    pairs = comparisons(rows)
    assert [(pair.method, *pair.names) for pair in pairs] == [
        ("PAR, tau 0", "gate batch", "gate sample"),
        ("PAR, tau 2.15", "gate batch", "gate sample"),
        ("PAR, gate batch", "tau 0", "tau 2.15"),
        ("PAR, gate sample", "tau 0", "tau 2.15"),
    ]
    assert "what PAR, tau 0 keeps after MMCL depends on the settings of the cleaning" in paragraphs(rows)[0][0]


def test_settings_that_differ_in_two_are_not_compared(cleanings):
    low, high = ((16, {"tau": tau, "gate": gate}, 50, 20) for tau, gate in ((0.0, "batch"), (2.15, "sample")))
    assert comparisons(cleanings([(low, GOOD), (high, POOR)])) == []


def test_objectives_are_compared_at_the_same_settings(write_run, evaluation, tmp_path):
    for objective in ("mmcl", "mmcl_ssl"):
        for width in (1, 2):
            pre = {"objective": objective, "pretrain_objective": objective, "config": {"width": width}}
            start = write_run(tmp_path / f"{objective}{width}", pre, [], [])
            rows = [evaluation(0, 0, 0.5, 0.99), evaluation(10, 1, 0.5, 0.01)]
            config = pre | {"verb": "clean", "method": "par", "start": str(start), "config": {}}
            write_run(tmp_path / f"{objective}{width}-c", config, rows, [])
    pairs = comparisons(table(find([tmp_path])))
    assert [pair.names for pair in pairs] == [(f"MMCL, width {n}", f"MMCL+SSL, width {n}") for n in (1, 2)]


@pytest.mark.parametrize(
    ("before", "classes", "verdict"), [(9, 20, "cannot tell"), (50, 20, "shows"), (50, None, "shows")]
)
def test_a_model_near_chance_gives_no_verdict(cleanings, before, classes, verdict):
    """800 images: Wilson's interval of 9 % is 7.2 to 11.2 %, and guessing among 20 classes gives 5 %."""
    kinds = [((4, {}, before, classes), GOOD), ((16, {}, before, classes), POOR)]
    rows = cleanings(kinds)
    (pair,) = comparisons(rows)
    assert pair.verdict == verdict
    if verdict == "cannot tell":
        assert pair.why == "before cleaning the accuracy was near chance in MMCL"
        assert "near chance, which is 5.0%, so there was nothing to keep" in paragraphs(rows)[0][1]


def test_a_cleaned_model_near_chance_is_told(cleanings):
    """Of 800 images 9 % are right after one cleaning, 25 % after the other; guessing among 20 classes gives 5 %."""
    rows = cleanings([((4, {}, 50, 20), [(9, 1)]), ((16, {}, 50, 20), [(25, 1)])])
    fair, weak = (told(row) for row in rows)  # width 16 stands before width 4
    assert "9.0%" in weak and weak.endswith("18.0% of that before, near chance, which is 5.0%.")
    assert fair.endswith("50.0% of that before.")


def test_one_cleaned_model_of_several_near_chance_is_told(cleanings):
    (row,) = cleanings([((4, {}, 50, 20), [(25, 1), (9, 1), (25, 1)])])
    assert told(row).endswith("of the accuracy at ASR ≤ 5%, with a seed near chance, which is 5.0%.")


def test_levels_that_differ_in_two_things_are_not_compared(cleanings):
    rows = cleanings([((4, {"tau": 0.0}, 50, 20), GOOD), ((16, {"tau": 2.15}, 50, 20), POOR)])
    assert comparisons(rows) == []
    assert paragraphs(rows)[0][0] == (
        "No two cleanings here differ in one thing alone: attack and tau differ, "
        "so nothing can be put down to one of them."
    )


def test_what_two_methods_differ_in_besides_is_named(write_run, evaluation, tmp_path):
    for method, rows, lr in (("par", 500, 1e-4), ("cleanclip", 1000, 1e-3)):
        config = {
            "verb": "clean",
            "method": method,
            "objective": "mmcl",
            "pretrain_objective": "mmcl",
            "start": "/base",
        }
        config["config"] = {"rows": rows, "lr": lr, "epochs": 3, "seed": 0}
        write_run(tmp_path / method, config, [evaluation(0, 0, 0.5, 0.99), evaluation(9, 3, 0.5, 0.01)], [])
    ((claim, _),) = paragraphs(table(find([tmp_path])))
    assert "differ in one thing alone: method, pairs and lr differ" in claim


@pytest.fixture
def broken(write_run, evaluation, tmp_path):
    """Cleanings of one model by CleanCLIP at (lr, whether it was evaluated after its start), each of them diverged."""

    def make(*ends):
        for lr, evaluated in ends:
            config = {"verb": "clean", "method": "cleanclip", "objective": "mmcl_ssl", "pretrain_objective": "mmcl"}
            rows = [evaluation(0, 0, 0.5, 0.99), evaluation(9, 1, 0.4, 0.01)][: 1 + evaluated]
            config |= {"start": "/base", "config": {"lr": lr, "epochs": 3, "seed": 0}}
            write_run(tmp_path / f"{lr}", config, rows, [], {"reason": "finished" if evaluated else "diverged"})
        return table(find([tmp_path]))

    return make


def test_a_cleaning_that_diverged_says_so(broken):
    (row,) = broken((1e9, False))
    assert told(row) == "After MMCL the run diverged (lr 1e9), and no cleaned model was evaluated."


def test_of_several_cleanings_it_is_said_how_many_diverged(broken):
    (row,) = broken((1e9, False), (1e-3, True), (1e-4, True))
    assert told(row).startswith("After MMCL it came down to ASR")
    assert told(row).endswith(" 1 of 3 runs diverged (lr 1e9).")


def test_one_cleaning_that_was_evaluated_beside_another_that_was_not_is_no_comparison(broken, write_run, tmp_path):
    broken((1e9, False))
    start = find([tmp_path])[0]
    write_run(tmp_path / "par", start.recorded | {"method": "par", "name": "par"}, list(start.metrics), [])
    assert "No cleaning has been evaluated" in paragraphs(table(find([tmp_path])))[0][0]
    broken((1e-3, True))
    assert paragraphs(table(find([tmp_path])))[0][0].startswith("Only one of the cleanings here has been evaluated")


def test_the_paper_is_named_for_its_own_method_only(compared):
    ((claim, ground),) = paragraphs(compared(GOOD, POOR, method="par"))
    assert "what PAR keeps depends on the pre-training" in claim and "published" not in ground


def test_other_methods_come_after_the_papers_in_short(large):
    first, *_, (claim, short) = paragraphs(table(find([large])))
    assert "CleanCLIP" in first[0] and not claim
    assert all(short.count(name) == 1 for name in ("Finetuning (MMCL)", "Finetuning (SSL)", "PAR"))


def test_without_two_objectives_what_varies_is_compared(fake_runs):
    one = [run for run in find([fake_runs]) if run.pretrain_objective == "mmcl"]
    (claim, _), *_ = paragraphs(table(one))
    assert claim == (
        "This study cannot tell whether what is kept after MMCL depends on the cleaning method "
        "(CleanCLIP against Finetuning (MMCL)): with one pre-trained model on a side nothing can be said about others."
    )
    alone = [run for run in one if run.method != "finetune"]
    assert paragraphs(table(alone))[0][0].startswith("These runs clean one kind of model in one way")
    assert paragraphs(table(one[:1]))[0][0].startswith("Nothing was cleaned")


def test_other_data_or_attack_is_no_pair(write_run, evaluation, tmp_path):
    for objective, data in (("mmcl", "/data/a.beton"), ("mmcl_ssl", "/data/b.beton")):
        pre = {"objective": objective, "pretrain_objective": objective, "data": data}
        start = write_run(tmp_path / objective, pre, [], [])
        rows = [evaluation(0, 0, 0.5, 0.99), evaluation(10, 1, 0.5, 0.01)]
        write_run(tmp_path / f"{objective}-c", pre | {"verb": "clean", "method": "par", "start": str(start)}, rows, [])
    assert comparisons(table(find([tmp_path]))) == []

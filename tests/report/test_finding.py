from __future__ import annotations

import pytest

from fastbd.base.run_folder import find
from fastbd.base.stats import difference
from fastbd.report.finding import comparisons, paragraphs
from fastbd.report.tables import table


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
        (GOOD[:1], POOR[:1], "cannot tell", "with one seed nothing can be said about other seeds"),
        (GOOD, POOR[:1], "cannot tell", "with one seed"),
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


def test_the_paper_is_named_for_its_own_method_only(compared):
    ((claim, ground),) = paragraphs(compared(GOOD, POOR, method="par"))
    assert "what PAR keeps depends on the pre-training" in claim and "published" not in ground


def test_other_methods_come_after_the_papers_in_short(large):
    first, *_, (claim, short) = paragraphs(table(find([large])))
    assert "CleanCLIP" in first[0] and not claim
    assert all(short.count(name) == 1 for name in ("Finetuning (MMCL)", "Finetuning (SSL)", "PAR"))


def test_without_two_objectives_nothing_can_be_told(fake_runs):
    one = [run for run in find([fake_runs]) if run.pretrain_objective == "mmcl"]
    assert paragraphs(table(one))[0][0].startswith("This study cannot tell: no method has cleaned both an MMCL model")
    assert paragraphs(table(one[:1]))[0][0].startswith("Nothing was cleaned")


def test_other_data_or_attack_is_no_pair(write_run, evaluation, tmp_path):
    for objective, data in (("mmcl", "/data/a.beton"), ("mmcl_ssl", "/data/b.beton")):
        pre = {"objective": objective, "pretrain_objective": objective, "data": data}
        start = write_run(tmp_path / objective, pre, [], [])
        rows = [evaluation(0, 0, 0.5, 0.99), evaluation(10, 1, 0.5, 0.01)]
        write_run(tmp_path / f"{objective}-c", pre | {"verb": "clean", "method": "par", "start": str(start)}, rows, [])
    assert comparisons(table(find([tmp_path]))) == []

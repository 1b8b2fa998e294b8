from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastbd.study import plots
from fastbd.study.runs import find


def drawn(collections) -> set[tuple[float, float]]:
    return {(round(x, 6), round(y, 6)) for c in collections for x, y in np.asarray(c.get_offsets())}


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_scatter_shows_every_evaluation_in_percent(study):
    runs = find([study])
    axes = plots.scatter(runs).axes[0]
    stars = [c for c in axes.collections if c.get_sizes()[0] > 100]
    dots = [c for c in axes.collections if c.get_sizes()[0] < 100]
    assert drawn(stars) == {(99.4, 57.04), (99.4, 60.72)}  # 0.92 of the tops, once each though four runs start there
    cleaned = [e for run in runs if run.verb == "clean" for e in run.metrics if e["step"] > 0]
    assert len(dots) == 8 and sum(len(c.get_offsets()) for c in dots) == len(cleaned) == 80
    assert drawn(dots) == {(round(100 * e["asr"], 6), round(100 * e["top1"], 6)) for e in cleaned}
    assert {line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"} == {5, 10}


def test_one_colour_an_objective_and_one_marker_a_method(study):
    from matplotlib.colors import to_rgb

    runs = find([study])
    figure = plots.scatter(runs)
    dots = [c for c in figure.axes[0].collections if c.get_sizes()[0] < 100]
    cleaning = [run for run in runs if run.verb == "clean"]
    for run, dot in zip(cleaning, dots, strict=True):
        assert tuple(dot.get_facecolor()[0][:3]) == to_rgb(plots.COLOURS[run.pretrain_objective])
    shapes = {run.method: dot.get_paths()[0].vertices.shape for run, dot in zip(cleaning, dots, strict=True)}
    assert shapes["cleanclip"] != shapes["finetune"]
    assert legend(figure) == [
        "pre-trained with MMCL", "pre-trained with MMCL+SSL", "before cleaning", "CleanCLIP", "Finetuning",
    ]  # fmt: skip


def test_trajectories_have_bands_only_while_they_can_be_told_apart(study):
    runs = find([study])
    few = plots.trajectories(runs)
    top1, asr = few.axes
    assert len(top1.collections) == len(asr.collections) == 8
    line = asr.lines[0]
    assert list(line.get_xdata()) == list(range(11))
    assert line.get_ydata()[0] == pytest.approx(99.4) and (np.diff(line.get_ydata()) < 0).all()
    low, high = (f(asr.collections[0].get_paths()[0].vertices[:, 1]) for f in (min, max))
    assert 0 <= low < line.get_ydata().min() and line.get_ydata().max() < high <= 100
    many = plots.trajectories(runs + runs)
    assert not many.axes[0].collections and len(many.axes[0].lines) == 16


def test_curves_have_a_row_a_verb_and_a_column_a_part(study):
    figure = plots.curves(find([study]))
    assert [axes.get_title() for axes in figure.axes] == list(plots.LOSSES.values()) * 2
    assert [len(axes.lines) // 2 for axes in figure.axes] == [2, 2, 1, 1, 8, 8, 4, 4]
    figure = plots.curves(find([study / "mmcl"]))
    assert [axes.get_title() for axes in figure.axes] == ["Total loss", "MMCL (image-text)"]


def test_a_method_without_its_own_mark_is_shown(write_run, evaluation, tmp_path):
    config = {"verb": "clean", "method": "new", "objective": "new", "pretrain_objective": "new", "start": "/base"}
    write_run(tmp_path / "a", config, [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.2)], [])
    figure = plots.scatter(find([tmp_path]))
    dot, star = figure.axes[0].collections
    assert drawn([dot]) == {(20, 40)} and len(dot.get_paths()[0].vertices)
    assert legend(figure) == ["pre-trained with new", "before cleaning", "new"]


def test_running_mean_is_numpys_mean():
    x, y = plots._smooth(np.arange(100.0), np.sin(np.arange(100.0)))
    assert len(x) == 96 and x[0] == 2
    assert y[10] == pytest.approx(np.sin(np.arange(10.0, 15.0)).mean())


def test_png_is_150_dpi(study):
    image = Image.open(io.BytesIO(plots.png(plots.scatter(find([study])))))
    assert image.format == "PNG" and image.size == (960, 690)
    assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)


@pytest.mark.parametrize("draw", [plots.scatter, plots.trajectories, plots.curves])
def test_runs_with_little_in_them(draw, write_run, evaluation, tmp_path):
    config = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    write_run(tmp_path / "plain", config, [evaluation(0, 0, 0.0), evaluation(10, 1, 0.0)], [])
    write_run(tmp_path / "empty", config | {"verb": "clean", "method": "new", "start": "gone"}, [], [])
    (axes, *_) = draw(find([tmp_path])).axes
    assert plots.png(axes.figure)
    asr = draw(find([tmp_path])).axes[-1]
    assert [text.get_text() for text in asr.texts if text.get_text().startswith("No")]

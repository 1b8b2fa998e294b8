from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tables import table

from fastbd.base.run_folder import find
from fastbd.config.cards import OBJECTIVES
from fastbd.report import plots


def drawn(collections) -> set[tuple[float, float]]:
    return {(round(x, 6), round(y, 6)) for c in collections for x, y in np.asarray(c.get_offsets())}


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_scatter_shows_every_evaluation_in_percent(fake_runs):
    runs = find([fake_runs])
    axes = plots.scatter(runs).axes[0]
    stars = [c for c in axes.collections if c.get_sizes()[0] > 100]
    dots = [c for c in axes.collections if c.get_sizes()[0] < 100]
    assert drawn(stars) == {(99.4, 57.04), (99.4, 60.72)}  # 0.92 of the tops, once each though four runs start there
    cleaned = [e for run in runs if run.verb == "clean" for e in run.metrics if e["step"] > 0]
    assert len(dots) == 4 and sum(len(c.get_offsets()) for c in dots) == len(cleaned) == 80
    assert drawn(dots) == {(round(100 * e["asr"], 6), round(100 * e["top1"], 6)) for e in cleaned}
    assert {line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"} == {5, 10}


def test_one_colour_an_objective_and_one_marker_a_method(fake_runs):
    from matplotlib.colors import to_rgb

    runs = find([fake_runs])
    figure = plots.scatter(runs)
    dots = [c for c in figure.axes[0].collections if c.get_sizes()[0] < 100]
    looks = [(objective, method) for objective in ("mmcl", "mmcl_ssl") for method in ("cleanclip", "finetune")]
    for (objective, _), dot in zip(looks, dots, strict=True):
        assert tuple(dot.get_facecolor()[0][:3]) == to_rgb(OBJECTIVES[objective].colour)
    shapes = {method: dot.get_paths()[0].vertices.shape for (_, method), dot in zip(looks, dots, strict=True)}
    assert shapes["cleanclip"] != shapes["finetune"]
    assert legend(figure) == [
        "pre-trained with MMCL",
        "pre-trained with MMCL+SSL",
        "before cleaning",
        "CleanCLIP",
        "Finetuning",
    ]


def test_a_panel_a_method_on_the_same_axes(large):
    runs = find([large])
    axes = plots.methods(runs).axes
    assert [a.get_title() for a in axes] == ["CleanCLIP", "Finetuning (MMCL)", "Finetuning (SSL)", "PAR"]
    assert len({a.get_ylim() for a in axes}) == 1
    shown = [sum(len(c.get_offsets()) for c in a.collections if c.get_sizes()[0] < 100) for a in axes]
    assert shown == [36 * (12 + 11)] * 4  # 36 runs of 12 evaluations after the start and 11 between
    sizes = {(c.get_sizes()[0], len(c.get_offsets())) for c in axes[0].collections if c.get_sizes()[0] < 100}
    assert [count for _, count in sorted(sizes)] == [18 * 11, 18 * 12]  # those on part of the images are smaller


def test_a_panel_an_attack(fake_runs):
    for run in find([fake_runs]):
        if run.name.startswith("mmcl_ssl"):
            plan = run.path / "plan.json"
            plan.write_text(plan.read_text().replace("random", "corner"))
    titles = [axes.get_title() for axes in plots.methods(find([fake_runs])).axes if axes.get_title()]
    methods = ("CleanCLIP", "Finetuning (MMCL)")
    assert titles == [f"{method}\n16 px {at}" for method in methods for at in ("corner", "random")]


def test_a_panel_a_setting_that_is_compared(write_run, evaluation, tmp_path):
    about = {"verb": "clean", "method": "par", "objective": "mmcl", "pretrain_objective": "mmcl", "start": "/base"}
    for tau in (0.0, 2.15):
        for lr in (1e-4, 3e-4):
            rows = [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.2 + tau / 10)]
            write_run(tmp_path / f"{tau}-{lr}", about | {"config": {"lr": lr, "tau": tau, "seed": 0}}, rows, [])
    panels = [axes for axes in plots.methods(find([tmp_path])).axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["PAR, tau 0", "PAR, tau 2.15"]
    assert [drawn(axes.collections[:1]) for axes in panels] == [{(20, 40)}, {(41.5, 40)}]


def test_published_points_only_beside_the_same_classes(write_run, evaluation, tmp_path):
    config = {
        "verb": "clean",
        "method": "cleanclip",
        "objective": "mmcl",
        "pretrain_objective": "mmcl",
        "start": "/base",
    }
    rows = [evaluation(0, 0, 0.16, 0.9), evaluation(10, 1, 0.14, 0.02)]
    write_run(tmp_path / "demo", config, rows, [])
    write_run(tmp_path / "real", config, [row | {"class_list": "imagenet1k"} for row in rows], [])
    plain, peers = (plots.scatter(find([tmp_path / name])) for name in ("demo", "real"))
    assert (99.88, 16.0) not in drawn(plain.axes[0].collections)
    shown = drawn(peers.axes[0].collections)
    assert (99.88, 16.0) in shown and (56.5, 17.58) in shown and (64.6, 17.06) not in shown  # SSL alone is no CleanCLIP
    assert "published, other data" in legend(peers) and len(legend(plain)) == 3


def test_trajectories_have_bands_only_while_they_can_be_told_apart(fake_runs, large):
    asr, other, top1, _ = plots.trajectories(find([fake_runs])).axes
    assert [asr.get_title(), other.get_title(), top1.get_title()] == ["CleanCLIP", "Finetuning (MMCL)", ""]
    assert len(top1.collections) == len(asr.collections) == 4
    line = asr.lines[0]
    assert list(line.get_xdata()) == list(range(11))
    assert line.get_ydata()[0] == pytest.approx(99.4) and (np.diff(line.get_ydata()) < 0).all()
    low, high = (f(asr.collections[0].get_paths()[0].vertices[:, 1]) for f in (min, max))
    assert 0 <= low < line.get_ydata().min() and line.get_ydata().max() < high <= 100
    many = plots.trajectories(find([large]))
    assert not many.axes[0].collections
    line = many.axes[0].lines[0].get_ydata()
    assert np.isnan(line).sum() == 17 and len(line) == 18 * 13 + 17  # the 18 runs of a look, apart from one another


def test_curves_have_a_row_a_verb_and_a_column_a_part(fake_runs):
    figure = plots.curves(find([fake_runs]))
    assert [axes.get_title() for axes in figure.axes] == list(plots.LOSSES.values()) * 2
    assert [len(axes.lines) // 2 for axes in figure.axes] == [2, 2, 1, 1, 4, 4, 2, 2]
    figure = plots.curves(find([fake_runs / "mmcl"]))
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


def test_svg_is_the_same_each_time(fake_runs):
    first, second = (plots.svg(plots.scatter(find([fake_runs]))) for _ in range(2))
    assert first == second and b"Attack success rate (%)" in first


def test_png_is_150_dpi(fake_runs):
    image = Image.open(io.BytesIO(plots.png(plots.scatter(find([fake_runs])))))
    assert image.format == "PNG" and image.size == (960, 690)
    assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)


@pytest.mark.parametrize("draw", [plots.scatter, plots.methods, plots.trajectories, plots.curves])
def test_runs_with_little_in_them(draw, write_run, evaluation, tmp_path):
    config = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    write_run(tmp_path / "plain", config, [evaluation(0, 0, 0.0), evaluation(10, 1, 0.0)], [])
    write_run(tmp_path / "empty", config | {"verb": "clean", "method": "new", "start": "gone"}, [], [])
    (axes, *_) = draw(find([tmp_path])).axes
    assert plots.png(axes.figure)
    texts = [text.get_text() for axes in draw(find([tmp_path])).axes for text in axes.texts]
    assert any(text.startswith("No") for text in texts)


BACKENDS = ("module://matplotlib_inline.backend_inline", "module://nowhere", "nonsense")


@pytest.mark.parametrize("backend", table(BACKENDS, BACKENDS[0]))
def test_a_backend_of_the_environment_is_not_looked_at(backend, fake_runs):
    """As a notebook leaves one behind, which a process of its own may lack."""
    code = (
        "import os, sys; from pathlib import Path; from fastbd.base.run_folder import find\n"
        "from fastbd.report import plots\n"
        "figure = plots.scatter(find([Path(sys.argv[1])]))\n"
        "sys.stdout.buffer.write(plots.svg(figure) + plots.png(figure))\n"
        "assert os.environ['MPLBACKEND'] == sys.argv[2]\n"
    )
    environment = os.environ | {"MPLBACKEND": backend}
    command = [sys.executable, "-c", code, fake_runs, backend]
    drawn = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    figure = plots.scatter(find([fake_runs]))
    assert drawn == plots.svg(figure) + plots.png(figure)

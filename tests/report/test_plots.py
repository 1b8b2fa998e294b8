from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from fake_runs import write_study
from matplotlib.lines import Line2D
from PIL import Image
from tables import table

from fastbd.base.run_folder import find
from fastbd.config.cards import OBJECTIVES
from fastbd.report import plots
from fastbd.report.tables import table as tables_of


def marks(axes, *labels) -> list:
    """The lines of marks of an axes by their labels: full, part, start, published, front, chance."""
    return [line for line in axes.lines if line.get_label() in labels and len(line.get_xdata())]


def drawn(lines) -> set[tuple[float, float]]:
    return {(round(float(x), 6), round(float(y), 6)) for line in lines for x, y in line.get_xydata()}


def count(lines) -> int:
    return sum(len(line.get_xdata()) for line in lines)


def look_of(line) -> tuple:
    return line.get_color(), line.get_linestyle(), line.get_marker(), line.get_fillstyle()


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_scatter_shows_every_evaluation_in_percent(fake_runs):
    runs = find([fake_runs])
    axes = plots.scatter(runs).axes[0]
    stars, dots = marks(axes, "start"), marks(axes, "full")
    assert drawn(stars) == {(99.4, 57.04), (99.4, 60.72)}  # 0.92 of the tops, once each though four runs start there
    cleaned = [e for run in runs if run.verb == "clean" for e in run.metrics if e["step"] > 0]
    assert len(stars) == 2 and len(dots) == 8 and count(dots) == len(cleaned) == 80  # of 8 looks: at two rates
    assert drawn(dots) == {(round(100 * e["asr"], 6), round(100 * e["top1"], 6)) for e in cleaned}
    assert {line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"} == {5, 10}


def test_an_objective_a_method_and_a_rate_can_be_told_apart(fake_runs):
    """The objective by colour, and in grey print by the filling of marks; the method by its mark; the rate by shade."""
    runs = find([fake_runs])
    figure = plots.scatter(runs)
    dots = marks(figure.axes[0], "full")
    looks = {(line.get_marker(), line.get_fillstyle(), line.get_color()) for line in dots}
    assert len(looks) == 8
    assert {(mark, filling) for mark, filling, _ in looks} == {(m, f) for m in "o^" for f in ("full", "none")}
    full = {colour for _, filling, colour in looks if filling == "full"}
    assert OBJECTIVES["mmcl"].colour.lower() in full and len(full) == 2
    lighter = (full - {OBJECTIVES["mmcl"].colour.lower()}).pop()
    at = {round(x, 6) for line in dots if line.get_color() == lighter for x in line.get_xdata()}
    assert at == {round(100 * e["asr"], 6) for r in runs if "mmcl-" in r.name and "0.3" in r.name for e in r.cleaned}
    fronts = {line.get_linestyle() for line in marks(figure.axes[0], "front")}
    assert fronts == {"-", "--"}
    assert legend(figure) == [
        "pre-trained with MMCL",
        "pre-trained with MMCL+SSL",
        "before cleaning",
        "best points",
        "ASR 5% and 10%",
        "CleanCLIP",
        "Finetuning (MMCL)",
        "lr 3e-5",
        "lr 1e-4",
    ]


def test_the_legend_has_stars_and_lines_as_the_panels_have_them(fake_runs):
    """In scatters the line is that of the best points; in the others it is the course of a run."""
    runs = find([fake_runs])
    figure = plots.methods(runs)
    beside = figure.legends[0].findobj(Line2D)
    for name in ("start", "front"):
        drawn_as = {look_of(line) for axes in figure.axes for line in marks(axes, name)}
        assert len(drawn_as) == 2 and drawn_as <= {look_of(line) for line in beside}
    assert beside[0].get_marker() == "o" and beside[0].get_linestyle() == "None"
    assert plots.trajectories(runs).legends[0].findobj(Line2D)[0].get_linestyle() == "-"


def test_the_rate_of_the_best_point_is_written_beside_it(fake_runs):
    runs = find([fake_runs])
    texts = {text.get_text(): text.xy for text in plots.scatter(runs).axes[0].texts if hasattr(text, "xy")}
    best = tables_of(runs)[0].best[0].points[0]  # of MMCL: no other cleaning comes to 5 %
    assert texts == {"lr 1e-4": (100 * best[1]["asr"], 100 * best[1]["top1"])}


def test_a_panel_a_method_on_the_same_axes(large):
    runs = find([large])
    axes = plots.methods(runs).axes
    assert [a.get_title() for a in axes] == ["CleanCLIP", "Finetuning (MMCL)", "Finetuning (SSL)", "PAR"]
    assert len({a.get_ylim() for a in axes}) == 1
    shown = [(count(marks(a, "full")), count(marks(a, "part"))) for a in axes]
    assert shown == [(36 * 12, 36 * 11)] * 4  # 36 runs of 12 evaluations after the start and 11 between
    sizes = [{line.get_markersize() for line in marks(axes[0], label)} for label in ("part", "full")]
    assert max(sizes[0]) < min(sizes[1])


def test_a_panel_an_attack(fake_runs):
    for run in find([fake_runs]):
        if run.name.startswith("mmcl_ssl"):
            plan = run.path / "plan.json"
            plan.write_text(plan.read_text().replace("random", "corner"))
    methods = ("CleanCLIP", "Finetuning (MMCL)")
    for draw in (plots.methods, plots.trajectories):
        titles = [axes.get_title() for axes in draw(find([fake_runs])).axes if axes.get_title()]
        assert sorted(titles) == [f"{method}\n16 px {at}" for method in methods for at in ("corner", "random")]


def test_a_panel_a_setting_that_is_compared(write_run, evaluation, tmp_path):
    about = {"verb": "clean", "method": "par", "objective": "mmcl", "pretrain_objective": "mmcl", "start": "/base"}
    for tau in (0.0, 2.15):
        for lr in (1e-4, 3e-4):
            rows = [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.2 + tau / 10)]
            write_run(tmp_path / f"{tau}-{lr}", about | {"config": {"lr": lr, "tau": tau, "seed": 0}}, rows, [])
    panels = [axes for axes in plots.methods(find([tmp_path])).axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["PAR, tau 0", "PAR, tau 2.15"]
    assert [drawn(marks(axes, "full")) for axes in panels] == [{(20, 40)}, {(41.5, 40)}]
    courses = [axes.get_title() for axes in plots.trajectories(find([tmp_path])).axes]
    assert [title for title in courses if title] == ["PAR, tau 0", "PAR, tau 2.15"]
    together = plots.scatter(find([tmp_path]))
    assert [text for text in legend(together) if "tau" in text] == ["PAR, tau 0", "PAR, tau 2.15"]
    assert len({line.get_marker() for line in marks(together.axes[0], "full")}) == 2


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
    assert not marks(plain.axes[0], "published")
    shown = drawn(marks(peers.axes[0], "published"))
    assert (99.88, 16.0) in shown and (56.5, 17.58) in shown and (64.6, 17.06) not in shown  # SSL alone is no CleanCLIP
    assert "published, other data" in legend(peers) and len(legend(plain)) == 4


def test_trajectories_have_bands_only_while_they_can_be_told_apart(fake_runs, large):
    asr, other, top1, _ = plots.trajectories(find([fake_runs])).axes
    assert [asr.get_title(), other.get_title(), top1.get_title()] == ["CleanCLIP", "Finetuning (MMCL)", ""]
    assert len(top1.collections) == len(asr.collections) == 4
    line = marks(asr, "full")[0]
    assert list(line.get_xdata()) == list(range(11))
    assert line.get_ydata()[0] == pytest.approx(99.4) and (np.diff(line.get_ydata()) < 0).all()
    low, high = (f(asr.collections[0].get_paths()[0].vertices[:, 1]) for f in (min, max))
    assert 0 <= low < line.get_ydata().min() and line.get_ydata().max() < high <= 100
    many = plots.trajectories(find([large]))
    assert not many.axes[0].collections
    line = marks(many.axes[0], "full")[0].get_ydata()
    assert np.isnan(line).sum() == 2 and len(line) == 3 * 13 + 2  # the 3 seeds of a look, apart from one another


def test_curves_have_a_row_a_verb_and_a_column_a_part(fake_runs):
    figure = plots.curves(find([fake_runs]))
    titles = ["Total loss", "MMCL (image-text)", "SSL (image)", "SSL (text)"]
    assert [axes.get_title() for axes in figure.axes] == titles * 2
    assert [len(axes.lines) // 2 for axes in figure.axes] == [2, 2, 1, 1, 8, 8, 4, 4]
    figure = plots.curves(find([fake_runs / "mmcl"]))
    assert [axes.get_title() for axes in figure.axes if axes.axison] == ["MMCL (image-text)"]


def test_a_total_that_is_not_its_one_part_has_its_own_curve(write_run, tmp_path):
    log = [{"step": k, "epoch": k / 2, "loss": 2.0 / k, "mmcl": 1.0 / k} for k in (1, 2)]
    write_run(tmp_path / "weighted", {"objective": "mmcl", "pretrain_objective": "mmcl"}, [], log)
    titles = [axes.get_title() for axes in plots.curves(find([tmp_path])).axes]
    assert titles == ["Total loss", "MMCL (image-text)"]


def test_curves_are_drawn_of_more_than_one_row_and_have_names(write_run, tmp_path):
    """Up to four panels beside one another, and none that is empty."""
    config = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    par = config | {"verb": "clean", "method": "par", "start": "/base"}
    parts = {"mmcl": 1.0, "ssl_image": 1.0, "distance_image": 0.1, "distance_text": 0.2, "of_my_own": 0.3}
    log = [{"step": k, "epoch": k / 2, "loss": 2.0 - k, **parts} for k in (1, 2)]
    write_run(tmp_path / "base", config, [], [row | {"scale": 14.0} for row in log])
    write_run(tmp_path / "short", par, [], log[:1])
    figure = plots.curves(find([tmp_path]))
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == [
        "Total loss",
        "MMCL (image-text)",
        "SSL (image)",
        "Distance from the start (image)",
        "Distance from the start (text)",
        "of my own",
    ]
    assert {axes.get_xlabel() for axes in shown} == {"Epochs of pre-training"} and all(axes.lines for axes in shown)
    assert figure.get_figwidth() < 13 and "PAR" not in legend(figure)


def test_a_model_that_no_run_cleans_has_its_star(fake_runs, write_run, evaluation):
    config = {"objective": "siglip", "pretrain_objective": "siglip"}
    write_run(fake_runs / "other", config, [evaluation(k, k, 0.1 * k, 0.2 * k) for k in (1, 2, 3)], [])
    figure = plots.scatter(find([fake_runs]))
    assert drawn(marks(figure.axes[0], "start")) == {(99.4, 57.04), (99.4, 60.72), (60, 30)}
    assert "pre-trained with SigLIP" in legend(figure)


def test_a_single_rate_is_named(tmp_path):
    runs = find([write_study(tmp_path / "runs", rates=(1.0,))])
    figures = [draw(runs) for draw in (plots.scatter, plots.methods, plots.trajectories, plots.curves)]
    assert [[text for text in legend(figure) if text.startswith("lr")] for figure in figures] == [["lr 1e-4"]] * 4


def test_a_method_without_its_own_mark_is_shown(write_run, evaluation, tmp_path):
    config = {"verb": "clean", "method": "new", "objective": "new", "pretrain_objective": "new", "start": "/base"}
    write_run(tmp_path / "a", config, [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.2)], [])
    figure = plots.scatter(find([tmp_path]))
    (dot,) = marks(figure.axes[0], "full")
    assert drawn([dot]) == {(20, 40)} and dot.get_marker() not in ("", "None", None)
    assert legend(figure) == ["pre-trained with new", "before cleaning", "ASR 5% and 10%", "new"]


def at_chance(runs) -> dict[str, list]:
    """Per figure the places of the chance lines of each panel that is shown: (across, along)."""
    found = {}
    for draw in (plots.scatter, plots.methods, plots.trajectories):
        shown = [axes for axes in draw(runs).axes if axes.axison]
        found[draw.__name__] = [
            sorted((tuple(line.get_xdata()), tuple(line.get_ydata())) for line in marks(axes, "chance"))
            for axes in shown
        ]
    return found


def with_classes(root, count: int) -> None:
    for run in find([root]):
        rows = [json.dumps(e | {"n_classes": count}) for e in run.rows]
        (run.path / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def test_guessing_is_drawn_on_every_axis_of_accuracy_and_asr(fake_runs):
    with_classes(fake_runs, 16)
    found = at_chance(find([fake_runs]))
    level, both = (6.25, 6.25), (0, 1)
    assert found["scatter"] == [sorted([(level, both), (both, level)])]
    assert found["methods"] == [sorted([(level, both), (both, level)])] * 2
    assert found["trajectories"] == [[(both, level)]] * 4
    told = legend(plots.trajectories(find([fake_runs])))
    assert "chance 6.25%" in told and "ASR 5% and 10%" in told


def test_two_lines_within_a_hair_are_one_that_says_both(fake_runs):
    """Of ASR with 20 classes; that of top-1 stays."""
    with_classes(fake_runs, 20)
    found = at_chance(find([fake_runs]))
    assert found["scatter"] == [[((0, 1), (5, 5))]] and found["methods"] == [[((0, 1), (5, 5))]] * 2
    assert found["trajectories"] == [[], [], [((0, 1), (5, 5))], [((0, 1), (5, 5))]]
    told = legend(plots.scatter(find([fake_runs])))
    assert "ASR 5% (chance) and 10%" in told and "chance 5%" in told


def test_guessing_is_not_drawn_where_it_is_not_known(fake_runs):
    assert not any(line for panels in at_chance(find([fake_runs])).values() for line in panels)


def test_the_axis_holds_the_bands(write_run, evaluation, tmp_path):
    config = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    rows = [evaluation(k, k, 0.05) | {"top1_high": 0.2, "top1_low": 0.01} for k in (1, 2)]
    write_run(tmp_path / "a", config, rows, [])
    top1 = next(axes for axes in plots.trajectories(find([tmp_path])).axes if axes.get_label() == "top1")
    assert top1.get_ylim()[1] > 20 and top1.get_ylim()[0] <= 0


def test_many_panels_go_on_below(write_run, evaluation, tmp_path):
    about = {"verb": "clean", "method": "par", "objective": "mmcl", "pretrain_objective": "mmcl", "start": "/base"}
    for tau in range(6):
        for lr in (1e-4, 3e-4):
            rows = [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.1 + tau / 100)]
            write_run(tmp_path / f"{tau}-{lr}", about | {"config": {"lr": lr, "tau": tau, "seed": 0}}, rows, [])
    figure = plots.trajectories(find([tmp_path]))
    assert len([axes for axes in figure.axes if axes.axison]) == 12
    assert figure.get_figwidth() < 13 and len({axes.get_title() for axes in figure.axes}) == 7


def test_running_mean_is_numpys_mean():
    x, y = plots._smooth(np.arange(100.0), np.sin(np.arange(100.0)))
    assert len(x) == 96 and x[0] == 2
    assert y[10] == pytest.approx(np.sin(np.arange(10.0, 15.0)).mean())


def test_svg_is_the_same_each_time(fake_runs):
    first, second = (plots.svg(plots.scatter(find([fake_runs]))) for _ in range(2))
    assert first == second and b"Attack success rate (%)" in first


def test_png_is_150_dpi(fake_runs):
    image = Image.open(io.BytesIO(plots.png(plots.scatter(find([fake_runs])))))
    assert image.format == "PNG" and image.size == (960, 810)
    assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_a_legend_of_uneven_columns_fits_its_figure(write_run, evaluation, tmp_path):
    for method, lr in (("cleanclip", 1e-3), ("par", 1e-4)):
        about = {"verb": "clean", "method": method, "objective": "mmcl", "pretrain_objective": "mmcl", "start": "/base"}
        rows = [evaluation(k, k, 0.5, 0.9) | {"n_classes": 5} for k in (0, 1)]
        write_run(tmp_path / method, about | {"config": {"lr": lr, "seed": 0}}, rows, [])
    figure = plots.laid_out(plots.methods(find([tmp_path])))
    assert len(legend(figure)) == 6
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_panels_keep_their_height_under_a_long_legend(write_run, evaluation, tmp_path):
    about = {"verb": "clean", "method": "par", "objective": "mmcl", "pretrain_objective": "mmcl", "start": "/base"}
    heights = []
    for count in (1, 12):
        for tau in range(count):
            rows = [evaluation(0, 0, 0.5, 0.9), evaluation(10, 1, 0.4, 0.1)]
            path = tmp_path / str(count) / str(tau)
            write_run(path, about | {"config": {"lr": 10.0**-tau, "momentum": tau, "seed": 0}}, rows, [])
        figure = plots.laid_out(plots.beside({name: find([tmp_path / str(count)]) for name in "ab"}))
        heights.append(figure.axes[0].get_position().height * figure.get_figheight())
    assert heights[1] == pytest.approx(heights[0], rel=0.1)


def test_without_asr_there_is_a_course_of_top1_alone(write_run, evaluation, tmp_path):
    config = {"objective": "mmcl", "pretrain_objective": "mmcl"}
    write_run(tmp_path / "plain", config, [evaluation(k, k, 0.1 * k) for k in (1, 2)], [])
    (axes,) = plots.trajectories(find([tmp_path])).axes
    assert axes.get_ylabel() == plots.LABELS["top1"] and drawn(marks(axes, "full")) == {(1, 10), (2, 20)}


@pytest.mark.parametrize("draw", [plots.scatter, plots.methods, plots.curves])
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

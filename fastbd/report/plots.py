"""The report's figures: one colour a pre-training objective, one marker and line style a cleaning method."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbd.base.run_folder import LOGGED, Run, method_name, objective_name, slug
from fastbd.base.tradeoff import CEILINGS, Point, front
from fastbd.config.cards import facts
from fastbd.report import published
from fastbd.report.groups import apart, cleaned_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


def laid_out(figure: Figure) -> Figure:
    """Return the figure with its final layout, which matplotlib would find again for each file."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, the same each time; text stays text."""
    buffer = io.BytesIO()
    with _matplotlib().rc_context({"svg.hashsalt": "fastbd", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _matplotlib() -> ModuleType:
    """The library, loaded without a look at MPLBACKEND: a notebook leaves there what a process of its own may lack."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Return the function that draws in STYLE."""

    @wraps(draw)
    def styled(*arguments: Any) -> Figure:
        with _matplotlib().rc_context(STYLE):
            return draw(*arguments)

    return styled


@_styled
def scatter(runs: Sequence[Run]) -> Figure:
    """Top-1 against ASR (%): every evaluation of the cleaning runs, the objectives' fronts, stars for the starts."""
    figure, (axes,) = _panels(1, 1, width=6.4, height=4.6)
    cleaning = [run for run in runs if run.verb == "clean" and run.attacks]
    hollow = _cloud(axes, runs)
    if not any(run.attacks for run in runs):
        _note(axes, "No evaluation measured ASR.")
    _legend(figure, cleaning or runs, lines=False, hollow=hollow)
    return figure


@_styled
def methods(runs: Sequence[Run]) -> Figure:
    """The scatter with a panel for each cleaning method, and attack where there are several, on the same axes."""
    ways = [(group.method, run) for group in cleaned_groups(runs) for run in group.runs if run.attacks]
    cleaning = [run for _, run in ways]
    attacks = {run.attack for run in cleaning}
    panelled: dict[str, list[Run]] = {}
    for method, run in sorted(ways, key=lambda way: (way[0], way[1].attack)):
        panelled.setdefault("\n".join(filter(None, (method, apart(run.attack, attacks)))), []).append(run)
    figure, panels = _grid(max(1, len(panelled)))
    hollow = False
    for (title, some), axes in zip((panelled or {"": runs}).items(), panels, strict=True):
        hollow |= _cloud(axes, some)
        axes.set_title(title, fontsize=11)
    _same_height(panels)
    if not cleaning:
        _note(panels[0], "No cleaning measured ASR.")
    _legend(figure, cleaning or runs, marks=False, lines=False, hollow=hollow, named=False)
    return figure


@_styled
def trajectories(runs: Sequence[Run]) -> Figure:
    """ASR and top-1 (%) against epochs, a column a cleaning method; of pre-training where no run cleans.

    With 95 % intervals where a panel has few runs.
    """
    shown = [run for run in runs if run.verb == "clean" and run.metrics] or [run for run in runs if run.metrics]
    names = sorted({method_name(run) for run in shown}) or [""]
    alone = len(names) == 1
    shape, height = ((1, 2), 4.2) if alone else ((2, len(names)), 6.4)
    figure, panels = _panels(*shape, width=max(10, 3.1 * len(names)), height=height)
    verb = VERBS["clean" if any(run.verb == "clean" for run in shown) else "pretrain"]
    for at, (key, label) in enumerate(LABELS.items()):
        row = panels[at * len(names) : (at + 1) * len(names)]
        for name, axes in zip(names, row, strict=True):
            some = [run for run in shown if method_name(run) == name]
            banded = len(some) <= MAX_BANDS
            for alike in [[run] for run in some] if banded else _by_look(some):
                _course(axes, alike, key, banded)
            axes.set_title(name if at == 0 and not alone else "", fontsize=11)
            axes.set_xlabel(f"Epochs of {verb}" if at or alone else "")
            axes.locator_params(axis="x", integer=True)
            if key == "asr":
                axes.set_ylim(-3, 103)
                for ceiling in CEILINGS:
                    axes.axhline(100 * ceiling, color="0.35", lw=1, ls=":", zorder=1)
                if not any(run.attacks for run in some):
                    _note(axes, "No evaluation measured ASR.")
            else:
                _from_zero(axes, [e for run in shown for e in run.metrics])
        row[0].set_ylabel(label)
    _legend(figure, shown, marks=False, named=False)
    return figure


@_styled
def beside(studies: Mapping[str, Sequence[Run]]) -> Figure:
    """The scatter of several studies, a panel each, on the same axes."""
    figure, panels = _grid(len(studies))
    for (name, runs), axes in zip(studies.items(), panels, strict=True):
        _cloud(axes, runs)
        axes.set_title(name, fontsize=11)
    _same_height(panels)
    _legend(figure, [run for runs in studies.values() for run in runs], lines=False)
    return figure


def _cloud(axes: Axes, runs: Sequence[Run]) -> bool:
    """Draw runs as points of top-1 against ASR; whether published points, of the same classes, lie behind them."""
    cleaning = [run for run in runs if run.verb == "clean" and run.attacks]
    stars = {run.model: (run, e) for run in cleaning for e in run.attacks if e["step"] == 0}
    if not cleaning:
        stars = {run.model: (run, run.attacks[-1]) for run in runs if run.attacks}
    points = [e for run in cleaning for e in run.cleaned]
    size = 38 if len(points) <= 200 else 16
    peers = _peers(runs)
    if peers:
        axes.scatter(*_percent(peers, "asr", "top1"), s=30, facecolor="none", edgecolor="0.6", lw=0.8, zorder=1.5)
    for alike in _by_look(cleaning):
        look = dict(marker=_marker(alike[0].method), color=_colour(alike[0]), edgecolor="white", zorder=3)
        full, parts = ([e for run in alike for e in some(run)] for some in (lambda r: r.cleaned, lambda r: r.between))
        axes.scatter(*_percent(full, "asr", "top1"), s=size, alpha=0.75, linewidth=0.5, **look)
        if parts:
            axes.scatter(*_percent(parts, "asr", "top1"), s=size / 6, alpha=0.4, linewidth=0, **look)
    for objective in sorted({run.pretrain_objective for run in cleaning}):
        corners = front(e for run in cleaning if run.pretrain_objective == objective for e in run.cleaned)
        axes.step(*_percent(corners, "asr", "top1"), where="post", color=_colour(objective), lw=1, alpha=0.5, zorder=2)
    for run, evaluation in stars.values():
        axes.scatter(
            *_percent([evaluation], "asr", "top1"),
            s=260,
            marker="*",
            color=_colour(run),
            edgecolor="black",
            linewidth=0.8,
            zorder=4,
        )
    for ceiling in CEILINGS:
        axes.axvline(100 * ceiling, color="0.35", lw=1, ls=":", zorder=1)
    across = axes.get_xaxis_transform()
    axes.text(100 * CEILINGS[-1] + 1, 0.02, "ASR 5% and 10%", transform=across, color="0.35", fontsize=9)
    axes.set(xlabel="Attack success rate (%)", ylabel="Zero-shot top-1 accuracy (%)", xlim=(-2, 102))
    _from_zero(axes, points + [e for _, e in stars.values()] + peers)
    return bool(peers)


def _peers(runs: Sequence[Run]) -> list[Point]:
    """Published points of the same methods, and starts, for runs on the published classes; for others none."""
    if {e.get("class_list") for run in runs for e in run.metrics} != {published.CLASS_LIST}:
        return []
    same = {slug(run) for run in runs if run.verb == "clean"} | {""}
    known = [point for point in published.measured() if point["cleaning"] in same]
    return [{"top1": float(point["top1"]) / 100, "asr": float(point["asr"]) / 100} for point in known]


def _course(axes: Axes, runs: Sequence[Run], key: str, banded: bool) -> None:
    """Top-1 or ASR of runs that look alike against their epochs; evaluations on part of the images as small dots."""
    rows = [[e for e in run.metrics if e.get(key) is not None and not e.get("subset")] for run in runs]
    parts = [e for run in runs for e in run.metrics if e.get(key) is not None and e.get("subset")]
    look: dict[str, Any] = dict(lw=1.8, marker=_marker(runs[0].method), ms=4.5) if banded else dict(lw=1, alpha=0.6)
    courses = [([e["epoch"] for e in some], *_percent(some, key)) for some in rows]
    axes.plot(*_joined(courses), color=_colour(runs[0]), **look)
    if parts:
        epochs = [e["epoch"] for e in parts]
        axes.plot(epochs, *_percent(parts, key), color=_colour(runs[0]), ls="", marker=".", ms=2, alpha=0.4)
    bounded = [e for e in rows[0] if f"{key}_low" in e]
    if banded and bounded:
        low, high = _percent(bounded, f"{key}_low", f"{key}_high")
        axes.fill_between([e["epoch"] for e in bounded], low, high, color=_colour(runs[0]), alpha=0.15, lw=0)


@_styled
def curves(runs: Sequence[Run]) -> Figure:
    """Each part of the training loss against epochs: pre-training above, cleaning below."""
    logged = [run for run in runs if run.log]
    rows = [verb for verb in VERBS if any(run.verb == verb for run in logged)] or ["pretrain"]
    present = {key for run in logged for line in run.log for key in line} - LOGGED
    parts = sorted(present, key=lambda part: ([*LOSSES, part].index(part), part)) or ["loss"]
    figure, panels = _panels(len(rows), len(parts), width=3.2 * max(len(parts), 2), height=2.8 * len(rows) + 0.8)
    grid = iter(panels)
    for verb in rows:
        for part, axes in zip(parts, grid, strict=False):
            for alike in _by_look([run for run in logged if run.verb == verb]):
                lines = [
                    [(line["epoch"], line[part]) for line in run.log if line.get(part) is not None] for run in alike
                ]
                courses = [np.array(some, float).T for some in lines if some]
                if not courses:
                    continue
                axes.plot(*_joined(courses), color=_colour(alike[0]), lw=0.6, alpha=0.3)
                smooth = _joined([_smooth(*course) for course in courses])
                axes.plot(*smooth, color=_colour(alike[0]), ls=_dash(alike[0].method), lw=1.6)
            axes.set_title(LOSSES.get(part, part), fontsize=10)
            axes.set_xlabel(f"Epochs of {VERBS[verb]}")
            axes.locator_params(axis="x", integer=True)
    if not logged:
        _note(panels[0], "No training log.")
    _legend(figure, logged, marks=False)
    return figure


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches, without pyplot, so that nothing global is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """`count` panels of a scatter, up to three in a row."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    figure, panels = _panels(rows, columns, width=max(6.4, 3.6 * columns), height=3.3 * rows + 0.7)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _same_height(panels: Sequence[Axes]) -> None:
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)


def _legend(
    figure: Figure,
    runs: Sequence[Run],
    *,
    marks: bool = True,
    lines: bool = True,
    hollow: bool = False,
    named: bool = True,
) -> None:
    """Above the panels: colours of the objectives, the star where no lines are, marks and lines of the methods."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_colour(objective), lw=5, label=f"pre-trained with {objective_name(objective)}")
        for objective in sorted({run.pretrain_objective for run in runs})
    ]
    if not lines:
        handles.append(Line2D([], [], color="0.6", mec="black", marker="*", ms=13, ls="", label="before cleaning"))
    if hollow:
        label = "published, other data"
        handles.append(Line2D([], [], mec="0.6", mfc="none", marker="o", ms=6, ls="", label=label))
    for method in sorted({run.method for run in runs if run.method and named}):
        name = facts("method", method).title
        mark, line = _marker(method) if marks else "", _dash(method) if lines else ""
        handles.append(Line2D([], [], color="0.3", ms=6, label=name, marker=mark, ls=line))
    figure.legend(handles=handles, loc="outside upper left", ncols=int(figure.get_figwidth() // 2.4))


def _percent(rows: Iterable[Mapping[str, Any]], *keys: str) -> list[np.ndarray]:
    rows = list(rows)
    return [np.array([100 * row[key] for row in rows], float) for key in keys]


def _by_look(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of the same colour and marker, to be drawn at once: a sweep has hundreds."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault((run.pretrain_objective, run.method), []).append(run)
    return list(found.values())


def _joined(courses: Iterable[Sequence | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Curves as one that is broken between them."""
    gap = np.full((2, 1), np.nan)
    pieces = [piece for course in courses for piece in (np.array(course, float).reshape(2, -1), gap)]
    x, y = np.concatenate(pieces[:-1] or [gap], axis=1)
    return x, y


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a twentieth of the points."""
    width = max(1, len(y) // 20)
    window = np.ones(width) / width
    return np.convolve(x, window, "valid"), np.convolve(y, window, "valid")


def _from_zero(axes: Axes, rows: Iterable[Mapping[str, Any]]) -> None:
    axes.set_ylim(0, 108 * max((e["top1"] for e in rows), default=1.0) or 1)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="0.35")


def _colour(run: Run | str) -> str:
    objective = run if isinstance(run, str) else run.pretrain_objective
    return facts("objective", objective).colour


def _marker(method: str | None) -> str:
    return facts("method", method).marker if method else ""


def _dash(method: str | None) -> str:
    return facts("method", method).dash if method else "-"


MAX_BANDS = 8  # runs up to which interval bands can be told apart
VERBS = {"pretrain": "pre-training", "clean": "cleaning"}
LABELS = {"asr": "Attack success rate (%)", "top1": "Zero-shot top-1 accuracy (%)"}
LOSSES = {
    "loss": "Total loss",
    "mmcl": "MMCL (image-text)",
    "ssl_image": "SSL (image)",
    "ssl_text": "SSL (text)",
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "legend.frameon": False,
    "legend.fontsize": 10,
}

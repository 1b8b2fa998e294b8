"""The report's figures: one colour a pre-training objective, one marker and line style a cleaning method."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import TYPE_CHECKING

import numpy as np

from fastbd.study.pareto import CEILINGS, front
from fastbd.study.runs import Evaluation, Run, method_name, objective_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _styled(draw: Callable[[Sequence[Run]], Figure]) -> Callable[[Sequence[Run]], Figure]:
    @wraps(draw)
    def styled(runs: Sequence[Run]) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(runs)

    return styled


@_styled
def scatter(runs: Sequence[Run]) -> Figure:
    """Top-1 against ASR (%): every evaluation of the cleaning runs, the objectives' fronts, stars for the starts."""
    figure, (axes,) = _panels(1, 1, width=6.4, height=4.6)
    cleaning = [run for run in runs if run.verb == "clean" and run.attacks]
    stars = {(run.model, e["step"]): (run, e) for run in cleaning for e in run.attacks if e["step"] == 0}
    if not cleaning:
        stars = {run.model: (run, run.attacks[-1]) for run in runs if run.attacks}
    points = [e for run in cleaning for e in run.cleaned]
    size = 38 if len(points) <= 200 else 16
    for run in cleaning:
        axes.scatter(
            *_percent(run.cleaned, "asr", "top1"), s=size, marker=_marker(run.method), color=_colour(run),
            alpha=0.75, edgecolor="white", linewidth=0.5, zorder=3,
        )  # fmt: skip
    for objective in {run.pretrain_objective for run in cleaning}:
        corners = front(e for run in cleaning if run.pretrain_objective == objective for e in run.cleaned)
        axes.step(*_percent(corners, "asr", "top1"), where="post", color=_colour(objective), lw=1, alpha=0.5, zorder=2)
    for run, evaluation in stars.values():
        axes.scatter(
            *_percent([evaluation], "asr", "top1"), s=260, marker="*", color=_colour(run), edgecolor="black",
            linewidth=0.8, zorder=4,
        )  # fmt: skip
    for ceiling in CEILINGS:
        axes.axvline(100 * ceiling, color="0.35", lw=1, ls=":", zorder=1)
    beside = dict(transform=axes.get_xaxis_transform(), color="0.35", fontsize=9)
    axes.text(100 * CEILINGS[-1] + 1, 0.02, "ASR 5% and 10%", **beside)
    axes.set(xlabel="Attack success rate (%)", ylabel="Zero-shot top-1 accuracy (%)", xlim=(-2, 102))
    _from_zero(axes, points + [e for _, e in stars.values()])
    if not stars and not points:
        _note(axes, "No evaluation measured ASR.")
    _legend(figure, cleaning or runs, lines=False)
    return figure


@_styled
def trajectories(runs: Sequence[Run]) -> Figure:
    """Top-1 and ASR (%) against epochs of cleaning, with 95 % intervals; of pre-training where no run cleans."""
    shown = [run for run in runs if run.verb == "clean" and run.metrics] or [run for run in runs if run.metrics]
    figure, panels = _panels(1, 2, width=10, height=4.2)
    banded = len(shown) <= MAX_BANDS
    labels = {"top1": "Zero-shot top-1 accuracy (%)", "asr": "Attack success rate (%)"}
    verb = VERBS["clean" if any(run.verb == "clean" for run in shown) else "pretrain"]
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for run in shown:
            rows = [e for e in run.metrics if e.get(key) is not None]
            epochs, (values,) = [e["epoch"] for e in rows], _percent(rows, key)
            look = dict(lw=1.8, marker=_marker(run.method), ms=4.5) if banded else dict(lw=1, alpha=0.7)
            axes.plot(epochs, values, color=_colour(run), ls=_dash(run.method), **look)
            if banded:
                interval = _percent(rows, f"{key}_low", f"{key}_high")
                axes.fill_between(epochs, *interval, color=_colour(run), alpha=0.15, lw=0)
        axes.set(xlabel=f"Epochs of {verb}", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _from_zero(panels[0], [e for run in shown for e in run.metrics])
    panels[1].set_ylim(-3, 103)
    for ceiling in CEILINGS:
        panels[1].axhline(100 * ceiling, color="0.35", lw=1, ls=":", zorder=1)
    if not any(run.attacks for run in shown):
        _note(panels[1], "No evaluation measured ASR.")
    _legend(figure, shown, marks=banded)
    return figure


@_styled
def curves(runs: Sequence[Run]) -> Figure:
    """Each part of the training loss against epochs: pre-training above, cleaning below."""
    logged = [run for run in runs if run.log]
    rows = [verb for verb in VERBS if any(run.verb == verb for run in logged)] or ["pretrain"]
    parts = [part for part in LOSSES if any(part in line for run in logged for line in run.log)] or ["loss"]
    figure, panels = _panels(len(rows), len(parts), width=3.2 * max(len(parts), 2), height=2.8 * len(rows) + 0.8)
    grid = iter(panels)
    for verb in rows:
        for part, axes in zip(parts, grid, strict=False):
            for run in logged:
                lines = [line for line in run.log if line.get(part) is not None]
                if run.verb != verb or not lines:
                    continue
                epochs, values = (np.array([line[k] for line in lines], float) for k in ("epoch", part))
                axes.plot(epochs, values, color=_colour(run), lw=0.6, alpha=0.3)
                axes.plot(*_smooth(epochs, values), color=_colour(run), ls=_dash(run.method), lw=1.6)
            axes.set_title(LOSSES[part], fontsize=10)
            axes.set_xlabel(f"Epochs of {VERBS[verb]}")
            axes.xaxis.get_major_locator().set_params(integer=True)
    if not logged:
        _note(panels[0], "No training log.")
    _legend(figure, logged, marks=False)
    return figure


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches, without pyplot, so that nothing global is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _legend(figure: Figure, runs: Sequence[Run], *, marks: bool = True, lines: bool = True) -> None:
    """Above the panels: colours of the objectives, then marks and lines of the methods; the star where no lines are."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_colour(objective), lw=5, label=f"pre-trained with {objective_name(objective)}")
        for objective in sorted({run.pretrain_objective for run in runs})
    ]
    if not lines:
        handles.append(Line2D([], [], color="0.6", mec="black", marker="*", ms=13, ls="", label="before cleaning"))
    for method in sorted({run.method for run in runs if run.method}):
        look = dict(marker=_marker(method) if marks else "", ls=_dash(method) if lines else "")
        handles.append(Line2D([], [], color="0.3", ms=6, label=method_name(method), **look))
    figure.legend(handles=handles, loc="outside upper left", ncols=4 if lines else 3)


def _percent(rows: Iterable[Evaluation], *keys: str) -> list[np.ndarray]:
    rows = list(rows)
    return [np.array([100 * row[key] for row in rows], float) for key in keys]


def _smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a twentieth of the points."""
    width = max(1, len(y) // 20)
    window = np.ones(width) / width
    return np.convolve(x, window, "valid"), np.convolve(y, window, "valid")


def _from_zero(axes: Axes, rows: Sequence[Evaluation]) -> None:
    axes.set_ylim(0, 108 * max((e["top1"] for e in rows), default=1.0) or 1)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="0.35")


def _colour(run: Run | str) -> str:
    return COLOURS.get(run if isinstance(run, str) else run.pretrain_objective, "#7F7F7F")


def _marker(method: str | None) -> str:
    return MARKERS.get(method, "D") if method else ""


def _dash(method: str | None) -> str:
    return DASHES.get(method, ":") if method else "-"


MAX_BANDS = 8  # runs up to which interval bands can be told apart
VERBS = {"pretrain": "pre-training", "clean": "cleaning"}
LOSSES = {
    "loss": "Total loss",
    "mmcl": "MMCL (image-text)",
    "ssl_image": "SSL (image)",
    "ssl_text": "SSL (text)",
}
COLOURS = {"mmcl": "#0072B2", "mmcl_ssl": "#D55E00", "ssl": "#009E73"}  # Okabe and Ito's, safe for the colour-blind
MARKERS = {"cleanclip": "o", "finetune": "^"}
DASHES = {"cleanclip": "-", "finetune": "--"}
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

"""The report's figures; looks.py says how each run is drawn."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbd.base.evaluation import AttackedEvaluation
from fastbd.base.run_folder import LOGGED, Run, objective_name, slug
from fastbd.base.tradeoff import CEILINGS, Point, best, front
from fastbd.report import published
from fastbd.report.chance import chance, line_names, near
from fastbd.report.format import rate
from fastbd.report.groups import apart, cleaned_groups, groups
from fastbd.report.looks import Looks, colour, dash, fill, looks, shade

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
    figure, (axes,) = _panels(1, 1, width=6.4, height=4.4)
    look = looks(runs)
    _cloud(axes, runs, look)
    if not any(run.attacks for run in runs):
        _note(axes, "No evaluation measured ASR.")
    _legend(figure, [run for run in runs if run.attacks] or runs, look)
    return figure


@_styled
def methods(runs: Sequence[Run]) -> Figure:
    """The scatter with a panel for each way of cleaning (panelled), on the same axes."""
    found, look = panelled(runs), looks(runs)
    figure, panels = _grid(max(1, len(found)))
    for (title, some), axes in zip((found or {"": runs}).items(), panels, strict=True):
        _cloud(axes, some, look)
        axes.set_title(title, fontsize=11)
    _same_height(panels)
    if not found:
        _note(panels[0], "No cleaning measured ASR.")
    shown = [run for some in found.values() for run in some]
    _legend(figure, shown or runs, look, named=False)
    return figure


def panelled(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Cleaning runs that measured ASR, by the title of their panel.

    That is the way of cleaning, with its settings that are compared; where there are several, also the attack and the
    settings of the pre-training.
    """
    ways = [(group, run) for group in cleaned_groups(runs) for run in group.runs if run.attacks]
    attacks = {run.attack for _, run in ways}
    found: dict[str, list[Run]] = {}
    for group, run in sorted(ways, key=lambda way: (way[0].method, way[1].attack)):
        model = group.model if group.variant else ""
        found.setdefault("\n".join(filter(None, (group.method, apart(run.attack, attacks), model))), []).append(run)
    return found


@_styled
def trajectories(runs: Sequence[Run]) -> Figure:
    """ASR, where it was measured, above top-1 (%) against epochs, a column a way of cleaning; else of pre-training.

    With 95 % intervals where a panel has few runs.
    """
    cleaning, look = any(run.verb == "clean" and run.metrics for run in runs), looks(runs)
    found: Mapping[str, Sequence[Run]] = courses(runs)
    blocks = [list(found.items())[k : k + ACROSS] for k in range(0, len(found), ACROSS)] or [[("", [])]]
    across = len(blocks[0])
    keys = [key for key in LABELS if any(e.get(key) is not None for run in runs for e in run.metrics)] or ["top1"]
    if across == 1 == len(blocks):
        figure, panels = _panels(1, len(keys), width=max(6.4, 5.0 * len(keys)), height=4.2)
    else:
        down = len(keys) * len(blocks)
        figure, panels = _panels(down, across, width=max(6.4, 3.1 * across), height=3.0 * down)
    for axes in panels:
        axes.set_axis_off()
    guess = chance(e for some in found.values() for run in some for e in run.metrics)
    epochs = f"Epochs of {VERBS['clean' if cleaning else 'pretrain']}"
    for at, block in enumerate(blocks):
        for column, (title, some) in enumerate(block):
            for row, key in enumerate(keys):
                axes = panels[(len(keys) * at + row) * across + column]
                axes.set_axis_on()
                _course_panel(axes, some, key, look, guess)
                axes.set_title(title if row == 0 else "", fontsize=11)
                axes.set_xlabel(epochs if key == keys[-1] or across == 1 else "")
                axes.set_ylabel(LABELS[key] if column == 0 else "")
    _same_height([axes for axes in panels if axes.get_label() == "top1"])
    _legend(figure, [run for some in found.values() for run in some], look, named=False)
    return figure


def courses(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Evaluated runs by the title of their panel in trajectories: cleanings as in panelled(), or else pre-trainings."""
    found: dict[str, list[Run]] = {}
    cleaned = cleaned_groups(runs)
    attacks = {group.place[2] for group in cleaned}
    for group in cleaned:
        if some := [run for run in group.runs if run.metrics]:
            model = group.model if group.variant else ""
            title = "\n".join(filter(None, (group.method, apart(group.place[2], attacks), model)))
            found.setdefault(title, []).extend(some)
    evaluated = [run for run in runs if run.metrics]
    return found or ({"": evaluated} if evaluated else {})


def _course_panel(axes: Axes, runs: Sequence[Run], key: str, look: Looks, guess: float | None) -> None:
    banded = len(runs) <= MAX_BANDS
    for alike in [[run] for run in runs] if banded else _by_look(runs, look):
        _course(axes, alike, key, look, banded)
    axes.locator_params(axis="x", integer=True)
    axes.set_label(key)
    if key == "asr":
        axes.set_ylim(-3, 103)
        _asr_lines(axes.axhline, guess)
        if not any(run.attacks for run in runs):
            _note(axes, "No evaluation measured ASR.")
    else:
        _from_zero(axes, [e for run in runs for e in run.metrics], banded)
        _guess_line(axes.axhline, guess)


@_styled
def beside(studies: Mapping[str, Sequence[Run]]) -> Figure:
    """The scatter of several studies, a panel each, on the same axes."""
    figure, panels = _grid(len(studies))
    every = [run for runs in studies.values() for run in runs]
    look = looks(every)
    for (name, runs), axes in zip(studies.items(), panels, strict=True):
        _cloud(axes, runs, look)
        axes.set_title(name, fontsize=11)
    _same_height(panels)
    _legend(figure, every, look)
    return figure


def _cleaning(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.verb == "clean" and run.attacks]


def _cloud(axes: Axes, runs: Sequence[Run], look: Looks) -> None:
    """Draw runs as points of top-1 against ASR, with published points of the same classes behind them."""
    cleaning = _cleaning(runs)
    points = [e for run in cleaning for e in run.cleaned]
    peers = _peers(runs)
    if peers:
        axes.plot(*_percent(peers, "asr", "top1"), ls="", marker="+", ms=6, color="0.55", zorder=1.5, label="published")
    size = 6.5 if len(points) <= 200 else 4
    style: dict[str, Any]
    for alike in _by_look(cleaning, look):
        usual = {"marker": look.marker(alike[0])} | _mark(alike[0].pretrain_objective, look.colour(alike[0]))
        for some, label, ms, alpha in ((_full, "full", size, 0.8), (_part, "part", size / 2.4, 0.45)):
            rows = [e for run in alike for e in some(run)]
            style = usual | {"ms": ms, "alpha": alpha}
            axes.plot(*_percent(rows, "asr", "top1"), zorder=3, label=label, **style)
    for place, objective in enumerate(sorted({run.pretrain_objective for run in cleaning})):
        _front(axes, [run for run in cleaning if run.pretrain_objective == objective], objective, 5 - 17 * place)
    starts = _starts(runs)
    for objective, evaluation in starts:
        axes.plot(*_percent([evaluation], "asr", "top1"), ms=15, zorder=4, label="start", **_star(objective))
    axes.set(xlabel="Attack success rate (%)", ylabel="Zero-shot top-1 accuracy (%)", xlim=(-2, 102))
    _from_zero(axes, points + [e for _, e in starts] + peers)
    guess = chance(e for run in runs for e in run.metrics)
    _guess_line(axes.axhline, guess)
    _asr_lines(axes.axvline, guess)


def _front(axes: Axes, runs: Sequence[Run], objective: str, above: float) -> None:
    """The best points of an objective; `above` that which the tables name, by so many points, its learning rate."""
    points = [(run, e) for run in runs for e in run.cleaned]
    corners = front(e for _, e in points)
    if len(corners) > 1:
        axes.step(*_percent(corners, "asr", "top1"), where="post", zorder=2, label="front", **_line(objective))
    if found := best((e for _, e in points), CEILINGS[0]):
        told = next(run.config.get("lr") for run, e in points if e is found)
        if told:
            at = (100 * found["asr"], 100 * found["top1"])
            how: dict[str, Any] = dict(
                textcoords="offset points", fontsize=9, color=colour(objective), zorder=5, bbox=PAPER
            )
            axes.annotate(f"lr {rate(told)}", at, (4, above), **how)


def _star(objective: str) -> dict[str, Any]:
    """The style of the model before cleaning."""
    edge: dict[str, Any] = {"mec": "black", "mew": 0.9} if fill(objective) == "full" else {"mew": 2}
    return _mark(objective, colour(objective)) | {"marker": "*"} | edge


def _line(objective: str) -> dict[str, Any]:
    """The style of the line through an objective's best points."""
    return dict(color=colour(objective), ls=dash(objective), lw=1, alpha=0.6)


def _full(run: Run) -> Sequence[AttackedEvaluation]:
    return run.cleaned


def _part(run: Run) -> Sequence[AttackedEvaluation]:
    return run.between


def _starts(runs: Sequence[Run]) -> list[tuple[str, AttackedEvaluation]]:
    """(objective, evaluation) of each model before cleaning, and of each that no run cleans at its end."""
    found = {run.model: (run, run.attacks[-1]) for run in uncleaned(runs)}
    found |= {run.model: (run, e) for run in _cleaning(runs) for e in run.attacks if e["step"] == 0}
    return [(run.pretrain_objective, e) for run, e in found.values()]


def uncleaned(runs: Sequence[Run]) -> list[Run]:
    """Pre-trainings that measured ASR, and whose model none of the runs cleans."""
    return [run for group in groups(runs) if not group.method for run in group.runs if run.attacks]


def _peers(runs: Sequence[Run]) -> list[Point]:
    """Published points of the same methods, and starts, for runs on the published classes; for others none."""
    if {e.get("class_list") for run in runs for e in run.metrics} != {published.CLASS_LIST}:
        return []
    same = {slug(run) for run in runs if run.verb == "clean"} | {""}
    known = [point for point in published.measured() if point["cleaning"] in same]
    return [{"top1": float(point["top1"]) / 100, "asr": float(point["asr"]) / 100} for point in known]


def _course(axes: Axes, runs: Sequence[Run], key: str, look: Looks, banded: bool) -> None:
    """Top-1 or ASR of runs that look alike against their epochs; evaluations on part of the images as small dots."""
    rows = [[e for e in run.metrics if e.get(key) is not None and not e.get("subset")] for run in runs]
    parts = [e for run in runs for e in run.metrics if e.get(key) is not None and e.get("subset")]
    objective, tone = runs[0].pretrain_objective, look.colour(runs[0])
    style: dict[str, Any] = _mark(objective, tone) | {"ls": dash(objective)}
    style |= dict(lw=1.6, marker=look.marker(runs[0]), ms=4.5) if banded else dict(lw=1, alpha=0.7, marker="")
    axes.plot(*_joined([([e["epoch"] for e in some], *_percent(some, key)) for some in rows]), label="full", **style)
    if parts:
        epochs = [e["epoch"] for e in parts]
        axes.plot(epochs, *_percent(parts, key), color=tone, ls="", marker=".", ms=2, alpha=0.4, label="part")
    bounded = [e for e in rows[0] if f"{key}_low" in e]
    if banded and bounded:
        low, high = _percent(bounded, f"{key}_low", f"{key}_high")
        axes.fill_between([e["epoch"] for e in bounded], low, high, color=tone, alpha=0.15, lw=0)


@_styled
def curves(runs: Sequence[Run]) -> Figure:
    """Each part of the training loss against epochs, of pre-training and then of cleaning; no runs of a single row."""
    logged, look = [run for run in runs if len(run.log) > 1], looks(runs)
    rows = _loss_panels(logged)
    across, down = max(map(len, rows), default=1), max(1, len(rows))
    figure, panels = _panels(down, across, width=3.2 * max(across, 2), height=2.8 * down)
    for axes in panels:
        axes.set_axis_off()
    for at, row in enumerate(rows):
        for (verb, part), axes in zip(row, panels[at * across :], strict=False):
            axes.set_axis_on()
            for alike in _by_look([run for run in logged if run.verb == verb], look):
                _loss(axes, alike, part, look)
            axes.set_title(loss_name(part), fontsize=10)
            axes.set_xlabel(f"Epochs of {VERBS[verb]}")
            axes.locator_params(axis="x", integer=True)
    if not rows:
        _note(panels[0], "No training log.")
    _legend(figure, logged, look)
    return figure


def _loss_panels(logged: Sequence[Run]) -> list[list[tuple[str, str]]]:
    """Rows of up to ACROSS panels, each (verb, part of the loss)."""
    rows = []
    for verb in VERBS:
        lines = [line for run in logged if run.verb == verb for line in run.log]
        present = {key for line in lines for key, value in line.items() if value is not None} - LOGGED
        if len(present) == 2 and all(line.get(key) == line.get("loss") for line in lines for key in present):
            present.remove("loss")  # the one part that it has
        parts = sorted(present, key=lambda part: ([*LOSSES, part].index(part), part))
        rows += [[(verb, part) for part in parts[k : k + ACROSS]] for k in range(0, len(parts), ACROSS)]
    return rows


def loss_name(part: str) -> str:
    """The name, in words, of a part of the loss in log.jsonl."""
    return LOSSES.get(part, part.replace("_", " "))


def _loss(axes: Axes, runs: Sequence[Run], part: str, look: Looks) -> None:
    """A part of the loss of those runs, which look alike, that have it, and its running mean."""
    lines = [[(line["epoch"], line[part]) for line in run.log if line.get(part) is not None] for run in runs]
    found = [np.array(some, float).T for some in lines if some]
    if not found:
        return
    objective, tone = runs[0].pretrain_objective, look.colour(runs[0])
    axes.plot(*_joined(found), color=tone, lw=0.6, alpha=0.3)
    smooth = _joined([_smooth(*course) for course in found])
    style = _mark(objective, tone) | {"ls": dash(objective), "lw": 1.6, "ms": 4.5}
    marker = look.marker(runs[0]) if runs[0].verb == "clean" else ""
    axes.plot(*smooth, marker=marker, markevery=max(1, len(smooth[0]) // 6), **style)


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
    figure, panels = _panels(rows, columns, width=max(6.4, 3.6 * columns), height=3.3 * rows)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _same_height(panels: Sequence[Axes]) -> None:
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)


def _legend(figure: Figure, runs: Sequence[Run], look: Looks, *, named: bool = True) -> None:
    """Above the panels: objectives, what else has a label in a panel, ways of cleaning, learning rates.

    The figure grows by the legend's height, so that the panels keep theirs.
    """
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = {line.get_label() for axes in figure.axes for line in axes.lines}
    objectives = sorted({run.pretrain_objective for run in runs})
    entries: dict[str, Any] = {}  # by label: what stands beside it, a tuple where that is several things
    for name in objectives:
        joined = {} if {"start", "front"} & shown else {"ls": dash(name), "lw": 1.6}
        style = _mark(name, colour(name)) | joined
        entries[f"pre-trained with {objective_name(name)}"] = Line2D([], [], marker="o", ms=7, **style)
    if "start" in shown:
        entries["before cleaning"] = tuple(Line2D([], [], ms=12, **_star(name)) for name in objectives)
    if "front" in shown:
        entries["best points"] = tuple(Line2D([], [], **_line(name)) for name in objectives)
    if "published" in shown:
        entries["published, other data"] = Line2D([], [], color="0.55", marker="+", ms=6, ls="")
    told = line_names(chance([e]) for run in runs for e in run.metrics)
    styles = {"ceiling": CEILING, "chance": CHANCE}
    entries |= {told[name]: Line2D([], [], **styles[name]) for name in told if name in shown}
    marks = {look.name(run): look.marker(run) for run in runs if run.verb == "clean"} if named else {}
    entries |= {name: Line2D([], [], color="0.3", ms=6, ls="", marker=marks[name]) for name in sorted(marks)}
    if any(run.config.get("lr") in look.rates for run in runs):
        # A patch is wider than the square that is a method's mark.
        entries |= {f"lr {rate(lr)}": Patch(color=shade("#303030", look.depth(lr))) for lr in _few(look.rates)}
    columns = _columns([len(label) for label in entries], figure.get_figwidth())
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(entries) // columns))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper left",
        ncols=columns,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )


def _columns(lengths: Sequence[int], width: float) -> int:
    """How many columns of a legend with labels of such lengths fit `width` inches."""
    for columns in range(len(lengths), 1, -1):
        longest = [max(column) for column in np.array_split(lengths, columns)]  # as Matplotlib fills them
        if sum(0.08 * length + 0.75 for length in longest) <= width:
            return columns
    return 1


def _few(rates: Sequence[float]) -> list[float]:
    """Up to RATES of them, from the lowest to the highest."""
    places = np.linspace(0, len(rates) - 1, min(len(rates), RATES)).round().astype(int)
    return [rates[k] for k in places]


def _mark(objective: str, tone: str) -> dict[str, Any]:
    """The style of an objective's marks in a tone, without lines between them."""
    filling = fill(objective)
    edge = {"mec": "white", "mew": 0.4} if filling == "full" else {"mec": tone, "mew": 1.2}
    return {"color": tone, "fillstyle": filling, "markerfacecoloralt": "white", "ls": ""} | edge


def _asr_lines(line: Callable[..., Any], guess: float | None) -> None:
    """Thin lines at the ceilings of ASR, and where guessing would be unless a ceiling's is there already."""
    for ceiling in CEILINGS:
        line(100 * ceiling, label="ceiling", **CEILING)
    if not any(near(guess, ceiling) for ceiling in CEILINGS):
        _guess_line(line, guess)


def _guess_line(line: Callable[..., Any], guess: float | None) -> None:
    if guess is not None:
        line(100 * guess, label="chance", **CHANCE)


def _percent(rows: Iterable[Mapping[str, Any]], *keys: str) -> list[np.ndarray]:
    rows = list(rows)
    return [np.array([100 * row[key] for row in rows], float) for key in keys]


def _by_look(runs: Iterable[Run], look: Looks) -> list[list[Run]]:
    """Runs of the same colour and marker, to be drawn at once: a sweep has hundreds."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault((run.pretrain_objective, look.name(run), look.colour(run)), []).append(run)
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


def _from_zero(axes: Axes, rows: Iterable[Mapping[str, Any]], banded: bool = False) -> None:
    """Let the axis of top-1 begin at 0 and hold all rows, with their intervals where these are drawn."""
    keys = ("top1", "top1_high") if banded else ("top1",)
    highest = max((row[key] for row in rows for key in keys if row.get(key) is not None), default=1.0)
    axes.set_ylim(0, 108 * highest or 1)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="0.35")


MAX_BANDS = 8  # runs up to which interval bands can be told apart
PAPER = dict(facecolor="white", alpha=0.7, pad=0.5, lw=0)
ACROSS = 4  # panels in a row of trajectories, or of curves
LEGEND_ROW = 0.2  # inches
RATES = 6  # learning rates that a legend names
CEILING: dict[str, Any] = dict(color="0.35", lw=1, ls=":", zorder=1)
CHANCE: dict[str, Any] = dict(color="0.35", lw=0.7, ls=(0, (8, 3)), zorder=1.2)
VERBS = {"pretrain": "pre-training", "clean": "cleaning"}
LABELS = {"asr": "Attack success rate (%)", "top1": "Zero-shot top-1 accuracy (%)"}
LOSSES = {
    "loss": "Total loss",
    "mmcl": "MMCL (image-text)",
    "ssl_image": "SSL (image)",
    "ssl_text": "SSL (text)",
    "siglip": "SigLIP (image-text)",
    "cyclic": "Cyclic consistency",
    "cluster": "Clusters of images",
    "supervised": "Classes of images",
    "unlearn": "Unlearning",
    "distance_image": "Distance from the start (image)",
    "distance_text": "Distance from the start (text)",
    "safe": "Share of safe pairs",
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

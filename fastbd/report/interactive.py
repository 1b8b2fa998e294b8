"""The figures as a page of their own that answers to the pointer, by Bokeh: one file, which needs no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastbd.base.evaluation import AttackedEvaluation
from fastbd.base.run_folder import Run, objective_name
from fastbd.base.tradeoff import CEILINGS
from fastbd.report.chance import chance
from fastbd.report.format import MISSING, rate, share
from fastbd.report.looks import Looks, colour, fill, looks

if TYPE_CHECKING:
    from bokeh.plotting import figure as Figure

Way = tuple[str, str]  # pre-training objective, way of cleaning


def installed() -> bool:
    """Whether there is Bokeh to draw with."""
    return importlib.util.find_spec("bokeh") is not None


def page(runs: Sequence[Run], title: str) -> bytes:
    """The HTML file: top-1 against ASR, and both against epochs, of every evaluation of the cleaning runs.

    Of the pre-trainings where no run cleans. What is selected in one figure is so in all.
    """
    from bokeh.embed import file_html
    from bokeh.layouts import column
    from bokeh.models import Legend, LegendItem
    from bokeh.resources import INLINE

    shown = [run for run in runs if run.verb == "clean" and run.attacks] or [run for run in runs if run.attacks]
    look = looks(runs)
    guess = chance(e for run in shown for e in run.metrics)
    ways = _by_way(shown, look)
    scatter = _figure("Top-1 against attack success rate", "asr", "top1", guess, height=480 + 28 * len(ways))
    both = [_figure(AXES[key], "epoch", key, guess, height=340) for key in ("asr", "top1")]
    items = []
    for (objective, name), some in ways.items():
        marks = _draw(scatter, both, some, look)
        label = f"{objective_name(objective)}: {name}" if name else objective_name(objective)
        items.append(LegendItem(label=label, renderers=marks))
    scatter.add_layout(Legend(items=items, click_policy="hide", title="A click hides or shows"), "below")
    return file_html(column(scatter, *both, sizing_mode="stretch_width"), INLINE, title=title).encode()


def _by_way(runs: Sequence[Run], look: Looks) -> dict[Way, list[Run]]:
    found: dict[Way, list[Run]] = {}
    for run in runs:
        found.setdefault((run.pretrain_objective, look.name(run)), []).append(run)
    return dict(sorted(found.items(), key=lambda item: item[0][::-1]))


def _figure(title: str, x: str, y: str, guess: float | None, height: int) -> Figure:
    """An empty figure; dotted lines at the ceilings of ASR, dashed ones at what guessing gives."""
    from bokeh.models import HoverTool, Label, Range1d, Span
    from bokeh.plotting import figure

    tools = "pan,wheel_zoom,box_zoom,box_select,tap,reset,save"
    made = figure(title=title, tools=tools, height=height, sizing_mode="stretch_width")
    made.add_tools(HoverTool(tooltips=[(label, f"@{key}") for key, label in TOLD.items()]))
    if x == "asr":
        made.x_range = Range1d(start=-2, end=102)
    if y == "asr":
        made.y_range = Range1d(start=-2, end=102)
    made.xaxis.axis_label, made.yaxis.axis_label = AXES[x], AXES[y]
    ends: tuple[tuple[str, Any], ...] = ((x, "height"), (y, "width"))
    for axis, along in ends:
        for ceiling in CEILINGS if axis == "asr" else ():
            made.add_layout(Span(location=100 * ceiling, dimension=along, line_dash="dotted", line_color=GREY))
    if guess is not None:
        for along in ("width",) if x == "epoch" else ("width", "height"):
            made.add_layout(Span(location=100 * guess, dimension=along, line_dash="dashed", line_color=GREY))
        label = Label(x=0, y=100 * guess, x_units="screen", text=f"chance {100 * guess:.3g}%")
        label.text_font_size, label.text_color = "11px", GREY
        made.add_layout(label)
    return made


def _draw(scatter: Figure, both: Sequence[Figure], runs: Sequence[Run], look: Looks) -> list[Any]:
    """Draw runs of one way in all figures, from one source; the marks in the scatter, with which the others go."""
    from bokeh.models import ColumnDataSource

    points = [_point(run, e, look) for run in runs for e in run.attacks]
    source = ColumnDataSource({key: [point[key] for point in points] for key in points[0]})
    hollow: dict[str, Any] = (
        {} if fill(runs[0].pretrain_objective) == "full" else {"fill_color": None, "line_width": 1.5}
    )
    style: Any = {"marker": "mark", "size": 8, "color": "tone", "source": source, **hollow}
    marks = [scatter.scatter("asr", "top1", **style)]
    for figure, key in zip(both, ("asr", "top1"), strict=True):
        ends: dict[str, list[Any]] = {"epochs": [], "values": [], "tone": []}
        for run in runs:
            full = [e for e in run.attacks if not e.get("subset")]
            ends["epochs"].append([e["epoch"] for e in full])
            ends["values"].append([100 * e[key] for e in full])
            ends["tone"].append(look.colour(run))
        lines = figure.multi_line("epochs", "values", line_color="tone", source=ColumnDataSource(ends))
        dots = figure.scatter("epoch", key, **(style | {"size": 6}))
        for renderer in (lines, dots):
            marks[0].js_link("visible", renderer, "visible")
    return marks


def _point(run: Run, e: AttackedEvaluation, look: Looks) -> dict[str, Any]:
    lr, recovery = run.config.get("lr"), e.get("recovery")
    return {
        "asr": 100 * e["asr"],
        "top1": 100 * e["top1"],
        "epoch": e["epoch"],
        "mark": MARKERS.get(look.marker(run), "circle") if e["step"] or run.verb != "clean" else "star",
        "tone": look.colour(run) if e["step"] else colour(run.pretrain_objective),
        "run": run.name,
        "model": objective_name(run.pretrain_objective),
        "cleaning": look.name(run) or "not cleaned",
        "lr": rate(lr) if lr else MISSING,
        "seed": str(run.config.get("seed", MISSING)),
        "at": f"step {e['step']:,}, epoch {e['epoch']:.3g}" + (", part of the images" if e.get("subset") else ""),
        "scores": f"{share(e['top1'])}, {share(e['asr'])}",
        "recovery": MISSING if recovery is None else share(recovery),
    }


GREY = "#595959"
AXES = {"asr": "Attack success rate (%)", "top1": "Zero-shot top-1 accuracy (%)", "epoch": "Epochs"}
TOLD = {
    "run": "run",
    "model": "pre-training",
    "cleaning": "cleaning",
    "lr": "learning rate",
    "seed": "seed",
    "at": "at",
    "scores": "top-1, ASR",
    "recovery": "recovery",
}
MARKERS = {  # Bokeh's names of Matplotlib's marks
    "o": "circle",
    "^": "triangle",
    "v": "inverted_triangle",
    "s": "square",
    "D": "diamond",
    "d": "diamond",
    "P": "cross",
    "X": "x",
    "p": "hex",
    "h": "hex",
    "*": "star",
}

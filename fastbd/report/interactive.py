"""The figures as a page of their own that answers to the pointer, by Bokeh: one file, which needs no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastbd.base.evaluation import AttackedEvaluation
from fastbd.base.run_folder import Run, objective_name
from fastbd.base.tradeoff import CEILINGS
from fastbd.report.chance import chance, line_names, near
from fastbd.report.format import MISSING, percent, rate, share
from fastbd.report.looks import Looks, colour, dash, fill, looks
from fastbd.report.plots import uncleaned

if TYPE_CHECKING:
    from bokeh.models import LegendItem
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
    from bokeh.models import Legend
    from bokeh.resources import INLINE

    cleaning = [run for run in runs if run.verb == "clean" and run.attacks]
    shown = cleaning or uncleaned(runs)
    look = looks(runs)
    guess = chance(e for run in shown for e in run.metrics)
    ways = _by_way(shown, look)
    left = uncleaned(runs) if cleaning else []
    scatter = _figure("Top-1 against attack success rate", "asr", "top1", guess, height=500 + 28 * len(ways))
    both = [_figure(AXES[key], "epoch", key, guess, height=360) for key in ("asr", "top1")]
    items = [_draw(scatter, both, some, look) for some in ways.values()] + [_star(scatter, run, look) for run in left]
    legend = Legend(items=items, click_policy="hide", title="A click hides or shows", location="top_left")
    scatter.add_layout(legend, "below")
    figures = column(scatter, *both, sizing_mode="stretch_width")
    return file_html(figures, INLINE, title=title, template=TEMPLATE).encode()


def _by_way(runs: Sequence[Run], look: Looks) -> dict[Way, list[Run]]:
    found: dict[Way, list[Run]] = {}
    for run in runs:
        found.setdefault((run.pretrain_objective, look.name(run)), []).append(run)
    return dict(sorted(found.items(), key=lambda item: item[0][::-1]))


def _figure(title: str, x: str, y: str, guess: float | None, height: int) -> Figure:
    """An empty figure; dotted lines at the ceilings of ASR, dashed ones at what guessing gives."""
    from bokeh.models import DataRange1d, HoverTool, Range1d, Span, Title
    from bokeh.plotting import figure

    tools = "pan,wheel_zoom,box_zoom,box_select,tap,reset,save"
    made = figure(tools=tools, height=height, sizing_mode="stretch_width")
    made.add_tools(HoverTool(tooltips=[(label, f"@{key}") for key, label in TOLD.items()]))
    if x == "asr":
        made.x_range = Range1d(start=-2, end=102)
    made.y_range = Range1d(start=-2, end=102) if y == "asr" else DataRange1d(start=0)
    made.xaxis.axis_label, made.yaxis.axis_label = AXES[x], AXES[y]
    made.toolbar.logo = None
    names, drawn = line_names([guess]), set()
    ends: tuple[tuple[str, Any], ...] = ((x, "height"), (y, "width"))
    for axis, along in ends:
        ceilings = CEILINGS if axis == "asr" else ()
        guesses = () if axis == "epoch" or guess is None or any(near(guess, c) for c in ceilings) else (guess,)
        for name, dashes, places in (("ceiling", "dotted", ceilings), ("chance", "dashed", guesses)):
            for at in places:
                drawn.add(f"{dashes.capitalize()}: {names[name]}")
                made.add_layout(Span(location=100 * at, dimension=along, line_dash=dashes, line_color=GREY))
    told = [*sorted(drawn, reverse=True), *(["Star: not cleaned; lighter: lower learning rate"] if x == "asr" else [])]
    style: Any = {"text_font_style": "normal", "text_font_size": "11px", "text_color": GREY}
    made.add_layout(Title(text="\n".join(told), **style), "above")
    made.add_layout(Title(text=title), "above")
    return made


def _draw(scatter: Figure, both: Sequence[Figure], runs: Sequence[Run], look: Looks) -> LegendItem:
    """Draw runs of one way in all figures, from one source; the entry that hides them all, with the way's mark."""
    from bokeh.models import ColumnDataSource, LegendItem

    objective = runs[0].pretrain_objective
    points = [_point(run, e, look) for run in runs for e in run.attacks]
    style: Any = _style(objective, points)
    marks: Any = scatter.scatter("asr", "top1", **style)
    for figure, key in zip(both, ("asr", "top1"), strict=True):
        ends: dict[str, list[Any]] = {"epochs": [], "values": [], "tone": []}
        for run in runs:
            full = [e for e in run.attacks if not e.get("subset")]
            ends["epochs"].append([e["epoch"] for e in full])
            ends["values"].append([100 * e[key] for e in full])
            ends["tone"].append(look.colour(run))
        source, dashes = ColumnDataSource(ends), BOKEH_DASHES.get(str(dash(objective)), "dotdash")
        lines = figure.multi_line("epochs", "values", line_color="tone", line_dash=dashes, source=source)
        dots = figure.scatter("epoch", key, **(style | {"size": 6}))
        for renderer in (lines, dots):
            marks.js_link("visible", renderer, "visible")
    usual = next((at for at, point in enumerate(points) if point["mark"] != "star"), 0)
    name = look.name(runs[0])
    label = f"{objective_name(objective)}: {name}" if name else objective_name(objective)
    return LegendItem(label=label, renderers=[marks], index=usual)


def _star(scatter: Figure, run: Run, look: Looks) -> LegendItem:
    """Draw a model that no run cleans; the entry that hides it."""
    from bokeh.models import LegendItem

    objective = run.pretrain_objective
    points = [_point(run, run.attacks[-1], look) | {"mark": "star", "tone": colour(objective)}]
    marks: Any = scatter.scatter("asr", "top1", **_style(objective, points))
    return LegendItem(label=f"{objective_name(objective)}: not cleaned", renderers=[marks])


def _style(objective: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The marks of points of an objective, and their source."""
    from bokeh.models import ColumnDataSource

    source = ColumnDataSource({key: [point[key] for point in points] for key in points[0]})
    hollow: dict[str, Any] = {} if fill(objective) == "full" else {"fill_color": None, "line_width": 1.5}
    return {"marker": "mark", "size": 8, "color": "tone", "source": source, **hollow}


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
        "accuracy": percent(e["top1"], e, "top1"),
        "success": percent(e["asr"], e, "asr"),
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
    "accuracy": "top-1",
    "success": "ASR",
    "recovery": "recovery",
}
MARKERS = {  # Bokeh's names of Matplotlib's marks, or of others where it has none like them
    "o": "circle",
    "^": "triangle",
    "v": "inverted_triangle",
    "s": "square",
    "D": "diamond",
    "P": "plus",
    "X": "x",
    "p": "hex_dot",
    "h": "hex",
    "*": "star",
    "<": "triangle_dot",
    ">": "square_pin",
    "d": "diamond_cross",
    "8": "circle_x",
    "H": "square_dot",
}
BOKEH_DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}
TEMPLATE = """
{% block preamble %}<meta name="viewport" content="width=device-width, initial-scale=1">{% endblock %}
"""

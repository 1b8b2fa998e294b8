"""The studies that are shipped, and those of a file.

Each is a function of the preset: `demo` for the built-in set, others for the scale of the papers. Rates and numbers
that are called published are those of the papers' programs.
"""

from __future__ import annotations

import runpy
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbd.base.errors import UserError
from fastbd.config.presets import PRESETS
from fastbd.study.grid import Entry, Study, nearest, study_of

DEMO_RATES = (3e-4, 1e-3, 3e-3)
DEMO_PAR_RATES = (3e-5, 1e-4)  # they begin at ten times as much
TAUS = (0.0, 2.15)  # without the perturb term and as published: what PAR does is the difference
PAR_RATES = (1e-6, 3e-6, 1e-5)  # ours, around the published one
OPENAI_RATES = (1e-6, 3e-6, 1e-5, 3e-5)  # ours, for models that 400 million pairs have made
# Verma et al. name eight of their thirteen for CC3M; the other five are ours, between those.
CC3M_RATES = (1e-5, 4e-5, 8e-5, 1e-4, 4e-4, 8e-4, 1e-3, 4e-3)
CC3M_MORE = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3)
CC6M_RATES = (1e-7, 3e-7, 7e-7, 1e-6, 3e-6, 7e-6, 1e-5, 3e-5, 5e-5, 1e-4, 3e-4, 5e-4, 1e-3, 3e-3)
FEW_RATES = (5e-5, 1e-4, 5e-4, 1e-3)  # published with the weights of SSL, on CC6M


def demo(preset: str) -> Study:
    return Study(
        name="demo",
        about="Do fine-tuning, CleanCLIP and PAR remove a backdoor, and does it depend on the pre-training objective?",
        preset=preset,
        pretrain=_objectives(preset),
        clean=(
            *({"method": "finetune", "objective": loss, "lr": DEMO_RATES} for loss in ("mmcl", "ssl")),
            {"method": "cleanclip", "lr": DEMO_RATES},
            {"method": "par", "tau": TAUS, "lr": DEMO_PAR_RATES},
        ),
    )


def paper(preset: str) -> Study:
    more = () if preset != "paper-cc3m" else CC3M_MORE
    rates = _rates(preset)
    return Study(
        name="paper",
        about="Does it depend on the pre-training whether CleanCLIP removes a backdoor (Verma et al., table 1)?",
        preset=preset,
        attacks=({"trigger": "badnet"},),
        pretrain=_objectives(preset),
        clean=(
            {"method": "finetune", "objective": "mmcl", **_no_ssl(preset), "lr": rates + more},
            {"method": "finetune", "objective": "ssl", "lr": rates},
            {"method": "cleanclip", "lr": rates + more},
        ),
    )


def paper_200k(preset: str) -> Study:
    rows = 3_600 if preset == "demo" else 200_000
    return Study(
        name="paper-200k",
        about="Does twice the clean data help (Verma et al., table 1; they cleaned only the MMCL+SSL model so)?",
        preset=preset,
        attacks=({"trigger": "badnet"},),
        pretrain=_objectives(preset),
        clean=(
            {"method": "finetune", "objective": "ssl", "rows": rows, "lr": _rates(preset)},
            {"method": "cleanclip", "rows": rows, "lr": _rates(preset)},
        ),
    )


def poison_left(preset: str) -> Study:
    return Study(
        name="poison-left",
        about="Does cleaning still work when some poisoned pairs are left in the clean data (Verma et al.: 5, 10, 25)?",
        preset=preset,
        attacks=({"trigger": "badnet"},),
        pretrain=_objectives(preset),
        clean=({"method": "cleanclip", "poison_left": (0, 5, 10, 25), "lr": _rates(preset)},),
    )


def par(preset: str) -> Study:
    triggers = ("badnet", "badnet_stripes", "blended", "blended_stripes", "blended_triangles", "blended_text", "wanet")
    return Study(
        name="par",
        about="Which triggers does PAR remove where CleanCLIP and fine-tuning do not (arXiv 2412.00727, RN50)?",
        preset=preset,
        attacks=({"trigger": triggers},),
        pretrain=_objectives(preset),
        clean=(
            {"method": "finetune", "objective": "mmcl", **_no_ssl(preset), "lr": _few(preset)},
            {"method": "cleanclip", "lr": _few(preset)},
            {"method": "par", "tau": TAUS, "lr": DEMO_PAR_RATES if preset == "demo" else PAR_RATES},
        ),
    )


def ssl_weight(preset: str) -> Study:
    both = {"batch_size": 1024} if preset != "demo" else {}
    return Study(
        name="ssl-weight",
        about="Between MMCL (weight 0) and MMCL+SSL (weight 1) in pre-training, where does CleanCLIP begin to fail?",
        preset=preset,
        attacks=({"trigger": "badnet"},),
        pretrain=({"objective": "mmcl_ssl", **both, "ssl_weight": (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)},),
        clean=({"method": "cleanclip", "lr": _few(preset)},),
    )


def trigger(preset: str) -> Study:
    return Study(
        name="trigger",
        about="Does the size, place or kind of the trigger change which pre-training can be cleaned?",
        preset=preset,
        attacks=(
            {"trigger": "badnet", "patch_size": (4, 8, 16, 24)},
            {"trigger": "badnet", "location": ("four_corners", "corner", "centre")},
            {"trigger": ("badnet_fixed", "badnet_stripes", "yellow", "blended", "blended_triangles", "sig", "wanet")},
        ),
        pretrain=_objectives(preset),
        clean=({"method": "cleanclip", "lr": _few(preset)},),
    )


def shrink_perturb(preset: str) -> Study:
    return Study(
        name="shrink-perturb",
        about="Does shrinking and perturbing the weights first help (Verma et al.: 0.95 and 1e-4, ineffective)?",
        preset=preset,
        attacks=({"trigger": "badnet"},),
        pretrain=_objectives(preset),
        clean=(
            {
                "method": "shrink_perturb",
                "shrink": (0.8, 0.9, 0.95, 0.99),
                "perturb": (1e-5, 1e-4, 1e-3),
                "lr": _few(preset),
            },
        ),
    )


def weight_decay(preset: str) -> Study:
    decays = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
    return Study(
        name="weight-decay",
        about="Does heavy weight decay help cleaning (Verma et al.: 0.2 to 100, ineffective)?",
        preset=preset,
        attacks=({"trigger": "badnet"},),
        pretrain=_objectives(preset),
        clean=({"method": "cleanclip", "weight_decay": decays, "lr": _few(preset)},),
    )


def _objectives(preset: str) -> tuple[Entry, ...]:
    """MMCL and MMCL+SSL, at the published batches."""
    both = {"batch_size": 1024} if preset != "demo" else {}
    return {"objective": "mmcl"}, {"objective": "mmcl_ssl", **both}


def _no_ssl(preset: str) -> Entry:
    """The published batch of cleaning with one view."""
    return {"batch_size": 128} if preset != "demo" else {}


def _rates(preset: str) -> tuple[float, ...]:
    return {"demo": DEMO_RATES, "paper-cc3m": CC3M_RATES, "paper-cc6m": CC6M_RATES}.get(preset, OPENAI_RATES)


def _few(preset: str) -> tuple[float, ...]:
    return {"paper-cc3m": FEW_RATES, "paper-cc6m": FEW_RATES}.get(preset, _rates(preset))


def load(name: str | Path, preset: str | None = None) -> Study:
    """A shipped study by name, or that of a .toml or .py file; with a preset, at its scale.

    A .py file holds `study = Study(...)`. UserError, with the file, where there is no such study or it makes no sense.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"there is no preset '{preset}'{nearest(preset, PRESETS)}")
    if str(name) in STUDIES:
        make, usual = STUDIES[str(name)]
        return make(preset or usual)
    path = Path(name)
    if path.suffix not in READERS:
        raise UserError(f"there is no study '{name}'{nearest(str(name), STUDIES)} A file's name ends in .toml or .py.")
    if not path.is_file():
        raise UserError(f"there is no file {path}: give a study's file, or one of {', '.join(STUDIES)}.")
    try:
        study = READERS[path.suffix](path)
        return replace(study, preset=preset) if preset else study
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_toml(path: Path) -> Study:
    try:
        return study_of({"name": path.stem, "about": "", **tomllib.loads(path.read_text(encoding="utf-8"))})
    except ValueError as error:  # the message tells line and column
        raise UserError(f"this is not TOML: {error}.") from None
    except RecursionError:
        raise UserError("it is nested too deeply: take the inner levels out.") from None


def _read_python(path: Path) -> Study:
    try:
        found: Any = runpy.run_path(str(path)).get("study")
    except UserError:
        raise
    except Exception as error:
        line = getattr(error, "lineno", None) or _last_line(error, path)
        raise UserError(f"line {line} fails with {type(error).__name__}: {error}.") from None
    if not isinstance(found, Study):
        raise UserError("it must hold `study = Study(...)`; Study comes from fastbd.study.grid.")
    return found


def _last_line(error: BaseException, path: Path) -> int:
    """The line of the file that an error came from."""
    at, line = error.__traceback__, 0
    while at:
        line = at.tb_lineno if at.tb_frame.f_code.co_filename == str(path) else line
        at = at.tb_next
    return line


READERS: dict[str, Callable[[Path], Study]] = {".toml": _read_toml, ".py": _read_python}
# name -> (the study at a preset, the preset when none is asked for: published ones at theirs, open questions in small)
STUDIES: dict[str, tuple[Callable[[str], Study], str]] = {
    "demo": (demo, "demo"),
    "paper": (paper, "paper-cc3m"),
    "paper-200k": (paper_200k, "paper-cc6m"),
    "poison-left": (poison_left, "paper-cc3m"),
    "par": (par, "demo"),
    "ssl-weight": (ssl_weight, "demo"),
    "trigger": (trigger, "demo"),
    "shrink-perturb": (shrink_perturb, "paper-cc6m"),
    "weight-decay": (weight_decay, "paper-cc6m"),
}

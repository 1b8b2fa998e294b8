"""fastbd sweep: a whole study, shared out among any number of processes that see its folder."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from rich.live import Live

from fastbd.base import dist, files
from fastbd.base.console import console
from fastbd.base.dist import World
from fastbd.base.errors import Diverged, UserError, lacks_memory, machine_fault
from fastbd.base.evaluation import RecordedEvaluation
from fastbd.base.run_folder import find, on_common_set, read_config
from fastbd.base.signals import Stopped, stop_behind, stoppable
from fastbd.base.workers import preload
from fastbd.commands import clean, demo, poison, pretrain, report
from fastbd.commands.demo_data import located
from fastbd.config.cards import check_chosen
from fastbd.config.flags import CleanConfig, PoisonConfig, PretrainConfig, ReportConfig, SweepConfig
from fastbd.config.imports import told_by_outside_code
from fastbd.config.recipes import check_carried
from fastbd.data.resident import free_memory
from fastbd.data.shards import open_beton
from fastbd.models.clip import MODELS
from fastbd.report.tables import best_of
from fastbd.study import halting, live, search
from fastbd.study.engines import ENGINES, load_ray
from fastbd.study.grid import Planned, Study, command, expand, material, with_overrides
from fastbd.study.ledger import Claim, Ledger, check_place
from fastbd.study.patience import patiently
from fastbd.study.studies import load
from fastbd.training.folder import RunFolder
from fastbd.training.reuse import Kept
from fastbd.training.run import Run
from fastbd.training.task import Config

POLL = 2.0  # seconds between looks for a run, where others are at work
SMALL = 64  # px of a model's images, up to which runs on a CPU have one thread each, side by side
MEMORY = 2 << 30  # bytes that such a run may need, libraries and data with it
TRIES = 12  # of a run that lacks memory: with the pauses between them about 20 minutes


class Lost(Exception):
    """Another process has taken the run over; nothing more may be written for it."""


def run(config: SweepConfig) -> int:
    """Do what is left of the study, write its report; the last line is the result as JSON."""
    began = time.perf_counter()
    _check(config)
    engine, ledger = ENGINES[config.engine], open_ledger(config)
    if config.retry:
        ledger.retry()
    count = processes_of(config, ledger)
    if count != 1 and config.engine == "local":
        preload(__name__)
    if any(run.verb == "pretrain" and run.config.data == "demo" for run in ledger.runs):
        demo.demo_set()
    console.print(live.opening(ledger), markup=False)
    try:
        with _watched(ledger):
            engine(partial(_work_in, ledger.folder, config), ledger.folder, count, config.device)
    except Stopped as stopped:
        console.print(f"stopped; go on with: python -m fastbd sweep --out {quote(str(ledger.folder))}", markup=False)
        return stopped.exit_code
    except UserError as error:  # of a process that has died; the others may have done its work
        if patiently(ledger.left, ledger.folder):
            raise
        console.print(str(error), markup=False)
    return patiently(partial(_conclude, ledger, began), ledger.folder)


def processes_of(config: SweepConfig, ledger: Ledger) -> int:
    """Return --processes; on CPUs, where it is 0, one a core for models so small that a second thread helps little.

    0 leaves it to the engine. Each has a core for itself and at least MEMORY bytes.
    """
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    if config.processes or on_gpu or config.engine != "local":
        return config.processes
    models = {_model_of(run) for run in ledger.runs if run.verb != "poison"} - {None}
    if any(name not in MODELS or MODELS[name].image_size > SMALL for name in models):
        return 1
    trainings = sum(run.verb != "poison" and not run.finished for run in ledger.runs)
    return max(1, min(os.cpu_count() or 1, trainings, free_memory() // MEMORY))


def _model_of(run: Planned) -> str | None:
    """Name of the model that a run trains; None where that is the one of an earlier run of the study."""
    if isinstance(run.config, PretrainConfig):
        return run.config.model
    assert isinstance(run.config, CleanConfig) and run.config.run, "the only other training, of a model"
    return None if run.needs else str(read_config(run.config.run).get("model"))


def _conclude(ledger: Ledger, began: float) -> int:
    """Say what failed, write the report and print the result."""
    rows = ledger.table()
    states = [row.status.state for row in rows]
    for row in rows:
        if row.status.state == "failed":
            console.print(f"{row.run.name} failed: {row.status.reason}", markup=False)
    if "failed" in states:
        again = f"python -m fastbd sweep --out {quote(str(ledger.folder))} --retry"
        console.print(f"try what failed again with: {again}", markup=False)
    if blocked := states.count("blocked"):
        console.print(f"blocked by what failed: {blocked}", markup=False)
    page, best = _report(ledger.folder)
    result = {"runs": len(states), "finished": states.count("finished"), "report": page, "best": best}
    print(json.dumps({**result, "seconds": round(time.perf_counter() - began, 1)}))
    return 0 if states.count("finished") == len(states) and page else 1


def _check(config: SweepConfig) -> None:
    """Whether what the flags need is there, before anything takes its time."""
    if config.asha == 1:
        raise UserError("--asha 1 would end no run: give 2 or more, or 0.")
    if config.engine == "ray":
        load_ray()


def _report(folder: Path) -> tuple[str | None, dict]:
    """The page that is written, and the best of its runs; (None, {}) where nothing was evaluated."""
    folders, out = (folder / "runs",), folder / "report"
    try:
        best = best_of(on_common_set(find(folders)))
        report.run(ReportConfig(runs=folders, out=out))
    except UserError as error:
        console.print(f"there is no report: {error}", markup=False)
        return None, {}
    return str(out / "index.html"), best


def open_ledger(config: SweepConfig) -> Ledger:
    """The ledger in --out; of --study, where that is given, as the other flags change it."""
    if config.study is None:
        if config.out is None:
            raise UserError("sweep needs --study, a shipped one or a file, or --out, the folder of one to go on with.")
        files.check_out(config.out)
        ledger = Ledger(config.out, lease=config.lease)
        if not all(run.finished for run in ledger.runs):
            check_place(config.out)
        _check_left(ledger.runs)
        return ledger
    study = changed(load(config.study, config.preset), config)
    folder = config.out or Path("studies") / study.name
    files.check_out(folder)
    runs = expand(study, folder)
    _check_left(runs)
    _check_carried(runs)
    return Ledger(folder, study, lease=config.lease)


def _check_left(runs: Iterable[Planned]) -> None:
    """UserError where what one of the runs has still to read cannot be opened, or what it names is not to be had."""
    left = [run.config for run in runs if not run.finished]
    for config in left:
        check_chosen(config)
    named = {str(getattr(config, flag, None)) for config in left for flag in ("data", "eval_data")}
    for name in sorted(named - {"None", "demo"}):
        open_beton(name)


def _check_carried(runs: Iterable[Planned]) -> None:
    """UserError where a cleaning is to keep an optimizer's state that cannot be its own."""
    made = {run.id: vars(run.config) for run in runs}
    for run in runs:
        match run.config:
            case CleanConfig(run=Path() as start) as config if not run.finished:
                flags = made[run.needs[0]] if run.needs else read_config(start)["config"]
                check_carried(config, start.name if run.needs else start, flags)


def changed(study: Study, config: SweepConfig) -> Study:
    """The study with the flags of the command line."""
    if config.pretrained:
        study = replace(study, pretrain=(), attacks=(), pretrained=config.pretrained)
    if config.recipe:
        study = replace(study, recipe=config.recipe)
    return with_overrides(
        study,
        seeds=config.seeds,
        pretrain_epochs=config.pretrain_epochs,
        clean_epochs=config.clean_epochs,
        data=config.data,
        plan=config.plan,
        eval_data=config.eval_data,
        classes=config.classes,
        templates=config.templates,
        model=config.model,
        precision=config.precision,
    )


def _work_in(folder: Path, config: SweepConfig, device: str) -> None:
    """What each process does."""
    work(Ledger(folder, lease=config.lease), replace(config, device=device))


def work(ledger: Ledger, config: SweepConfig) -> None:
    """Do runs until none is left. Raises signals.Stopped after a signal, saved and let go."""
    world = dist.join(config.device)
    if world.size > 1:
        raise UserError("a sweep shares out its runs by itself: start it without torchrun, with --processes.")
    next_one = partial(_do_next, ledger, config, Kept(ledger.folder), world)
    with stoppable():  # also where no training is there to save first: between runs, while one is set up
        while patiently(next_one, ledger.folder):
            pass


def _do_next(ledger: Ledger, config: SweepConfig, kept: Kept, world: World) -> bool:
    """Do the next run, or wait for others at work; False where no run is left."""
    if claim := ledger.take():
        with claim:
            how = _do(claim, ledger, config, kept, world)
            with suppress(OSError):  # the run has ended, whatever becomes of the line
                console.print(live.ending(ledger, claim.run, how), markup=False)
    elif config.search and search.extend(ledger, config.search):
        pass
    elif ledger.left():
        time.sleep(POLL)
    else:
        return False
    return True


def _do(claim: Claim, ledger: Ledger, config: SweepConfig, kept: Kept, world: World) -> str:
    """The run that is claimed, and how it ended; an error in it ends no other. Raises one that is the machine's."""
    run = claim.run
    try:
        _clear(run, ledger.folder)
        if isinstance(run.config, PoisonConfig):
            poison.run(run.config)
            return "finished"
        how = _train(claim, run.config, ledger, config, kept, world)
    except Lost:
        return "taken over by another process"
    except (Exception, SystemExit) as error:  # which code from outside may end by
        if stop_behind(error):
            raise
        if fault := machine_fault(error):
            kept.clear()
            ledger.later = run.id
            ledger.short[run.id] = ledger.short[run.id] + 1 if lacks_memory(fault) else 0
            if ledger.short[run.id] < TRIES:
                raise
            error = _never_fits(fault)
        if not (isinstance(error, Diverged) and run.finished):
            return _failed(claim, error, kept, world)
        how = "diverged"
    if run.verb == "clean" and not config.keep_weights and claim.held():
        for path in run.out.glob("ckpt_*"):
            path.unlink(missing_ok=True)
    return how


def _clear(run: Planned, folder: Path) -> None:
    """Move to aside/ what an unfinished run has left that would keep it from being resumed, or from being begun."""
    there = run.product if any(run.out.glob("ckpt_*")) else run.out
    if not there.exists():
        return
    (folder / "aside").mkdir(exist_ok=True)
    name = "-".join(there.relative_to(folder).parts)
    names = (folder / "aside" / f"{name}.{k}.tmp" for k in count(1))  # .tmp: not a run for `find`
    aside = next(path for path in names if not path.exists())
    there.rename(aside)
    with suppress(OSError):
        console.print(f"{there} is not whole: it is made again, and what was there is {aside}", markup=False)


def _never_fits(fault: BaseException) -> UserError:
    """Return the failure of a run that lacked memory at each of its TRIES."""
    said = (str(fault) or type(fault).__name__).splitlines()[0]
    return UserError(
        f"there was not enough memory in {TRIES} tries ({said}): free some, or give a smaller --batch-size."
    )


def _failed(claim: Claim, error: BaseException, kept: Kept, world: World) -> str:
    """So that no other process takes the run and dies of it too. Raises where the GPU answers no more."""
    said = str(error) if isinstance(error, UserError) else told_by_outside_code(error)
    if said is None:
        console.print("".join(traceback.format_exception(error)), markup=False)
        said = traceback.format_exception_only(error)[0].splitlines()[0]
    if not isinstance(error, UserError):
        kept.clear()  # of a step that ended in its middle
    claim.fail(said)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return f"failed: {said}"


def _train(claim: Claim, settings: Config, ledger: Ledger, config: SweepConfig, kept: Kept, world: World) -> str:
    """Train from the last checkpoint, where there is one."""
    planned, settings = claim.run, replace(located(settings), track=config.track)
    if (planned.out / "config.json").is_file():
        settings = replace(settings, resume=planned.out)

    def guard() -> None:
        if claim.lost or not claim.held():
            raise Lost

    training = Run(
        settings,
        clean.task(settings, world) if isinstance(settings, CleanConfig) else pretrain.task(settings, world),
        world,
        kept,
        extra={"id": planned.id, "command": command(replace(planned.config, out=None))},
        enough=partial(_enough, _rules(planned, ledger, config)),
        folder=RunFolder(world, guard),
        quiet=True,
    )
    return training.train()


def _rules(planned: Planned, ledger: Ledger, config: SweepConfig) -> list[halting.Rule]:
    """What may end the run early."""
    if not isinstance(planned.config, CleanConfig):
        return []
    rules: list[halting.Rule] = [halting.collapsed] if config.stop_collapsed else []
    if config.asha:
        own, others = _but_for_rates(planned.config), [run for run in ledger.runs if run.id != planned.id]
        cleanings = [(run.out, run.config) for run in others if isinstance(run.config, CleanConfig)]
        alike = [out for out, cleaning in cleanings if _but_for_rates(cleaning) == own]
        rules.append(halting.asha(alike, config.asha))
    return rules


def _but_for_rates(config: CleanConfig) -> dict[str, Any]:
    """What two cleanings have in common of which one may be the better by its learning rate or warmup alone."""
    rest = {flag: value for flag, value in material(config).items() if flag not in ("lr", "warmup")}
    return {"run": config.run, **rest}


def _enough(rules: list[halting.Rule], rows: tuple[RecordedEvaluation, ...]) -> str | None:
    return next(filter(None, (rule(rows) for rule in rules)), None)


@contextmanager
def _watched(ledger: Ledger) -> Iterator[None]:
    """On a terminal, a table of the runs that is drawn anew every few seconds."""
    if not console.is_terminal:
        yield
        return
    view = partial(live.view, ledger)
    with Live(get_renderable=view, console=console, refresh_per_second=0.5, transient=True):
        yield

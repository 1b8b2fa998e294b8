"""fastbd sweep: a whole study, shared out among any number of processes that see its folder."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.live import Live

from fastbd import checkpoint, dist, log
from fastbd.commands import clean, demo, poison, pretrain, report
from fastbd.config import ReportConfig, SweepConfig
from fastbd.dist import World
from fastbd.engines import ENGINES
from fastbd.errors import Diverged, UserError
from fastbd.kept import Kept
from fastbd.loop import Stopped
from fastbd.run import Run
from fastbd.study import halting, live, search
from fastbd.study.grid import Planned, Study, command, with_overrides
from fastbd.study.ledger import Claim, Ledger
from fastbd.study.runs import find, on_common_set
from fastbd.study.studies import load
from fastbd.study.tables import best_of

POLL = 2.0  # seconds between looks for a run, where others are at work


class Lost(Exception):
    """Another process has taken the run over; nothing more may be written for it."""


def run(config: SweepConfig) -> int:
    """Do what is left of the study, write its report; the last line is the result as JSON."""
    began = time.perf_counter()
    engine, ledger = ENGINES[config.engine], open_ledger(config)
    if config.search:
        search.load()  # before anything takes its time
    if config.retry:
        ledger.retry()
    if any(run.verb == "pretrain" and run.config.data == "demo" for run in ledger.runs):
        demo.demo_set()
    log.console.print(live.opening(ledger), markup=False)
    try:
        with _watched(ledger):
            engine(partial(_work_in, ledger.folder, config), ledger.folder, config.processes, config.device)
    except Stopped as stopped:
        log.console.print(f"stopped and saved; go on with: python -m fastbd sweep --out {ledger.folder}", markup=False)
        return stopped.exit_code
    except UserError as error:  # of a process that has died; the others may have done its work
        if ledger.left():
            raise
        log.console.print(str(error), markup=False)
    states = [row.status.state for row in ledger.table()]
    folders, page = (ledger.folder / "runs",), ledger.folder / "report.html"
    report.run(ReportConfig(runs=folders, out=page))
    best = best_of(on_common_set(find(folders)))
    for row in ledger.table():
        if row.status.state == "failed":
            log.console.print(f"{row.run.name} failed: {row.status.reason}", markup=False)
    result = {"runs": len(states), "finished": states.count("finished"), "report": str(page), "best": best}
    print(json.dumps({**result, "seconds": round(time.perf_counter() - began, 1)}))
    return 0 if states.count("finished") == len(states) else 1


def open_ledger(config: SweepConfig) -> Ledger:
    """The ledger in --out; of --study, where that is given, as the other flags change it."""
    if config.study is None:
        if config.out is None:
            raise UserError("sweep needs --study, a shipped one or a file, or --out, the folder of one to go on with.")
        return Ledger(config.out, lease=config.lease)
    study = changed(load(config.study, config.preset), config)
    return Ledger(config.out or Path("studies") / study.name, study, lease=config.lease)


def changed(study: Study, config: SweepConfig) -> Study:
    """The study with the flags of the command line."""
    if config.pretrained:
        study = replace(study, pretrain=(), attacks=(), pretrained=config.pretrained)
    return with_overrides(
        study, seeds=config.seeds or None, pretrain_epochs=config.pretrain_epochs, clean_epochs=config.clean_epochs,
        data=config.data, plan=config.plan, eval_data=config.eval_data, classes=config.classes,
        templates=config.templates, model=config.model, precision=config.precision,
    )  # fmt: skip


def _work_in(folder: Path, config: SweepConfig, device: str) -> None:
    """What each process does."""
    work(Ledger(folder, lease=config.lease), replace(config, device=device))


def work(ledger: Ledger, config: SweepConfig) -> None:
    """Do runs until none is left. Raises loop.Stopped after a signal, saved and let go."""
    world = dist.join(config.device)
    if world.size > 1:
        raise UserError("a sweep shares out its runs by itself: start it without torchrun, with --processes.")
    kept = Kept()
    with _stoppable():
        while True:
            claim = ledger.take()
            if claim:
                with claim:
                    how = _do(claim, ledger, config, kept, world)
                    log.console.print(live.ending(ledger, claim.run, how), markup=False)
            elif config.search and search.extend(ledger, config.search):
                continue
            elif not ledger.left():
                return
            else:
                time.sleep(POLL)


@contextmanager
def _stoppable() -> Iterator[None]:
    """A signal raises Stopped also where no training is there to save first: between runs, or while one is set up."""

    def stop(signum: int, frame) -> None:
        raise Stopped(signum)

    wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, stop) for s in wanted}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _do(claim: Claim, ledger: Ledger, config: SweepConfig, kept: Kept, world: World) -> str:
    """The run that is claimed, and how it ended; a mistake in it ends no other."""
    try:
        if claim.run.verb == "poison":
            poison.run(claim.run.config)
            return "finished"
        return _train(claim, ledger, config, kept, world)
    except Diverged:
        return "diverged"
    except Lost:
        return "taken over by another process"
    except UserError as error:
        claim.fail(str(error))
        return f"failed: {error}"


def _train(claim: Claim, ledger: Ledger, config: SweepConfig, kept: Kept, world: World) -> str:
    """Train from the last checkpoint, where there is one."""
    planned = claim.run
    log.remove_unfinished(planned.config.out)
    begun = (planned.config.out / "config.json").is_file()
    settings = replace(planned.config, resume=planned.config.out) if begun else planned.config

    def guard() -> None:
        if claim.lost:
            raise Lost

    training = Run(
        settings, TASKS[planned.verb](settings, world), world, kept,
        extra={"id": planned.id, "command": command(replace(planned.config, out=None))},
        enough=partial(_enough, _rules(planned, ledger, config)), guard=guard, quiet=True,
    )  # fmt: skip
    reason = training.train()
    if planned.verb == "clean" and not config.keep_weights:
        checkpoint.path_of(training.folder, "last").unlink()
    return reason


def _rules(planned: Planned, ledger: Ledger, config: SweepConfig) -> list[halting.Rule]:
    """What may end the run early."""
    if planned.verb != "clean":
        return []
    rules: list[halting.Rule] = [halting.collapsed] if config.stop_collapsed else []
    if config.asha:
        alike = [r.config for r in ledger.runs if r.verb == "clean" and r.id != planned.id]
        alike = [c for c in alike if (c.run, c.method) == (planned.config.run, planned.config.method)]
        rules.append(halting.asha([c.out for c in alike], config.asha))
    return rules


def _enough(rules: list[halting.Rule], rows: tuple[dict, ...]) -> str | None:
    return next(filter(None, (rule(rows) for rule in rules)), None)


@contextmanager
def _watched(ledger: Ledger) -> Iterator[None]:
    """On a terminal, a table of the runs that is drawn anew every few seconds."""
    if not log.console.is_terminal:
        yield
        return
    view = partial(live.view, ledger)
    with Live(get_renderable=view, console=log.console, refresh_per_second=0.5, transient=True):
        yield


TASKS = {"pretrain": pretrain.task, "clean": clean.task}

"""fastbd sweep: a whole study, shared out among any number of processes that see its folder."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.live import Live

from fastbd import checkpoint, dist, log
from fastbd.commands import clean, demo, poison, pretrain, report
from fastbd.config import ReportConfig, SweepConfig
from fastbd.dist import World
from fastbd.errors import Diverged, UserError
from fastbd.kept import Kept
from fastbd.loop import Stopped
from fastbd.run import Run
from fastbd.study import halting, live
from fastbd.study.grid import Planned, Study, command, with_overrides
from fastbd.study.ledger import Claim, Ledger
from fastbd.study.studies import load

POLL = 2.0  # seconds between looks for a run, where others are at work


class Lost(Exception):
    """Another process has taken the run over; nothing more may be written for it."""


def run(config: SweepConfig) -> int:
    """Do what is left of the study, write its report; the last line is the result as JSON."""
    began = time.perf_counter()
    ledger = open_ledger(config)
    if config.retry:
        ledger.retry()
    if any(run.verb == "pretrain" and run.config.data == "demo" for run in ledger.runs):
        demo.demo_set()
    log.console.print(live.opening(ledger), markup=False)
    try:
        with _watched(ledger):
            _start(ledger, config)
    except Stopped as stopped:
        log.console.print(f"stopped and saved; go on with: python -m fastbd sweep --out {ledger.folder}", markup=False)
        return stopped.exit_code
    states = [row.status.state for row in ledger.table()]
    page = ledger.folder / "report.html"
    report.run(ReportConfig(runs=(ledger.folder / "runs",), out=page))
    best = {}
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


def _start(ledger: Ledger, config: SweepConfig) -> None:
    """A process for each GPU, or as many as asked for; this one where it is one."""
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if config.device == "auto" else []
    processes = config.processes or max(1, len(gpus))
    if processes == 1:
        work(ledger, config)
    else:
        devices = gpus or [config.device]
        _spread(ledger, [replace(config, device=devices[k % len(devices)]) for k in range(processes)])


def _spread(ledger: Ledger, configs: list[SweepConfig]) -> None:
    """Processes that work; a signal reaches all. UserError when one of them ends badly."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(configs))))
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_worker, args=(ledger.folder, k, config)) for k, config in enumerate(configs)]
    caught: list[int] = []

    def pass_on(signum: int, frame) -> None:
        caught.append(signum)
        for worker in workers:
            if worker.pid and worker.is_alive():
                os.kill(worker.pid, signal.SIGTERM)

    previous = {which: signal.signal(which, pass_on) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)
    if caught:
        raise Stopped(caught[0])
    if bad := [k for k, worker in enumerate(workers) if worker.exitcode]:
        raise UserError(
            f"process {bad[0]} of the sweep has died: see {ledger.folder / f'worker-{bad[0]}.log'}; go on with "
            f"python -m fastbd sweep --out {ledger.folder}"
        )


def _worker(folder: Path, number: int, config: SweepConfig) -> None:
    """What a process of several does; it writes to a log of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process passes it on once
    with open(folder / f"worker-{number}.log", "a", buffering=1) as file:
        log.console.file = file
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), contextlib.suppress(Stopped):
            work(Ledger(folder, lease=config.lease), config)


def work(ledger: Ledger, config: SweepConfig) -> None:
    """Do runs until none is left. Raises loop.Stopped after a signal, saved and let go."""
    world = dist.join(config.device)
    if world.size > 1:
        raise UserError("a sweep shares out its runs by itself: start it without torchrun, with --processes.")
    kept = Kept()
    while True:
        claim = ledger.take()
        if claim:
            with claim:
                log.console.print(live.ending(ledger, claim.run, _do(claim, ledger, config, kept, world)), markup=False)
        elif not ledger.left():
            return
        else:
            time.sleep(POLL)


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

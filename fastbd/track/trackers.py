"""The trackers of --track: what each is told of a run, in its own format.

A tracker is a class; one of your own has the same methods. Each is used in a process that trains nothing, so that its
library may take its time, its memory and its signals there.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from fastbd.base import files
from fastbd.base.run_folder import Run, study_folder_of

SAMPLES = "samples.png"


class Tracker(Protocol):
    """Tells one run to one tool. An error ends it, and neither the training nor another tracker."""

    def __init__(self, run: Run, kept: dict[str, Any]) -> None:
        """Begin; or go on, where `kept` holds what an earlier process has put there for the same run, as JSON values.

        `run` is what the run's folder holds at this moment.
        """
        ...

    def settings(self, settings: Mapping[str, float]) -> None:
        """Take numbers that stay as they are, such as eval/n, on how many images; each comes once, when it is known."""
        ...

    def add(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a row, with names such as train/loss and eval/asr; evaluations may come late.

        Those of settings() are left out, unless a row has another value.
        """
        ...

    def flush(self) -> None:
        """Put what was added where it lasts; what was added before is not told again."""
        ...

    def end(self, result: Mapping[str, Any]) -> None:
        """Take result.json, how the run ended; it is empty where the run was stopped and can be resumed."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard, by the writer of the package tensorboard, which needs no torch."""

    def __init__(self, run: Run, kept: dict[str, Any]):
        # TensorBoard looks for this module before it imports TensorFlow, where that is installed, which takes seconds.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
        from tensorboard.compat.proto import event_pb2, summary_pb2  # of which type checkers know no names
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = vars(event_pb2)["Event"]
        self._summary: Any = vars(summary_pb2)["Summary"]
        self._writer = EventFileWriter(str(run.path / "tensorboard"))
        if not kept.setdefault("begun", False):
            self._begin(run)
            kept["begun"] = True

    def _begin(self, run: Run) -> None:
        """Write the settings, also for the tab HPARAMS, and the pictures."""
        from PIL import Image
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self._write(hparams_pb(_flat(run.config)).SerializeToString())
        self._text("config", run.recorded)
        if (path := run.path / SAMPLES).exists():
            with Image.open(path) as image:
                width, height = image.size
            image = self._summary.Image(width=width, height=height, encoded_image_string=path.read_bytes())
            self._write(self._summary(value=[self._summary.Value(tag="samples", image=image)]).SerializeToString())

    def _text(self, tag: str, values: Any) -> None:
        """Write JSON values as a text for the tab TEXT, which reads Markdown."""
        from tensorboard.compat.proto import tensor_pb2
        from tensorboard.plugins.text.metadata import create_summary_metadata

        text = "\n".join(f"    {line}" for line in json.dumps(values, indent=2).splitlines())
        tensor = vars(tensor_pb2)["TensorProto"](dtype="DT_STRING", string_val=[text.encode()])
        about = create_summary_metadata(tag, "")
        value = self._summary.Value(tag=tag, metadata=about, tensor=tensor)
        self._write(self._summary(value=[value]).SerializeToString())

    def _write(self, summary: bytes, step: int = 0) -> None:
        event = self._event(wall_time=time.time(), step=step)
        event.summary.ParseFromString(summary)
        self._writer.add_event(event)

    def settings(self, settings: Mapping[str, float]) -> None:
        for name, value in settings.items():
            self._text(name, value)

    def add(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(self._summary(value=values).SerializeToString(), step)

    def flush(self) -> None:
        self._writer.flush()

    def end(self, result: Mapping[str, Any]) -> None:
        if result:
            self._text("result", result)
        self._writer.close()


class Wandb:
    """A run of Weights & Biases in RUN/wandb: offline, for `wandb sync`, unless WANDB_MODE says otherwise."""

    def __init__(self, run: Run, kept: dict[str, Any]):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it reports of itself even when it is offline
        import wandb

        begun, study = "id" in kept, study_folder_of(run.path)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        about = {name: value for name, value in run.recorded.items() if name != "config"}
        kept.setdefault("id", secrets.token_hex(4))
        self._kept = kept
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastbd"),
            dir=os.environ.get("WANDB_DIR", run.path),
            id=kept["id"],
            name=run.name,
            group=study.name if study else None,
            job_type=run.verb,
            config={**run.config, "about": about, "env": run.env},
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, x_stats_pid=os.getppid()),  # the training's
        )
        kept["url"] = self._run.url
        self._run.define_metric("*", step_metric="step")  # wandb's own steps must ascend, and evaluations may come late
        if not begun and (path := run.path / SAMPLES).exists():
            self._log({"samples": wandb.Image(str(path))})

    def _log(self, values: Mapping[str, Any]) -> None:
        self._kept["rows"] = self._kept.get("rows", -1) + 1
        self._run.log(dict(values), step=self._kept["rows"])

    def settings(self, settings: Mapping[str, float]) -> None:
        self._run.config.update(dict(settings))

    def add(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        self._log({"step": step, "epoch": epoch, **numbers})

    def flush(self) -> None:
        """Do nothing: a process of wandb's has what was added, and writes it when this one has died, too."""

    def end(self, result: Mapping[str, Any]) -> None:
        self._run.summary.update({f"result/{name}": value for name, value in result.items()})
        self._run.finish(exit_code=0 if result.get("reason", "diverged") != "diverged" else 1)


class Mlflow:
    """A run of MLflow in mlflow.db of the run's or the study's folder, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, run: Run, kept: dict[str, Any]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it reports how it is used
        import mlflow

        study, self._uri = study_folder_of(run.path), os.environ.get("MLFLOW_TRACKING_URI")
        self._store, self._metrics = (study or run.path).absolute(), []
        with self._alone():
            self._client = mlflow.MlflowClient(self._uri or f"sqlite:///{self._store / 'mlflow.db'}")
            if "run" in kept:
                self._client.update_run(kept["run"], status="RUNNING")
            else:
                kept["run"] = self._begin(run, study)
        self._id = kept["run"]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the processes of a study from the file of its runs meanwhile: SQLite's own wait for it is short."""
        if self._uri:
            yield
        else:
            with files.locked(self._store / ".mlflow.lock"):
                yield

    def _begin(self, run: Run, study: Path | None) -> str:
        """Make the run with its settings and pictures; returns its id."""
        client, name = self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or (study.name if study else "fastbd")
        found = client.get_experiment_by_name(name)
        place = None if self._uri else (self._store / "mlflow-artifacts").as_uri()
        experiment = found.experiment_id if found else client.create_experiment(name, artifact_location=place)
        tags = {"verb": run.verb, "method": run.method or "", "study": study.name if study else ""}
        made = client.create_run(experiment, run_name=run.name, tags={**tags, "folder": str(run.path.absolute())})
        client.log_batch(made.info.run_id, params=_params(run.config))
        client.log_dict(made.info.run_id, run.recorded, "settings.json")  # a config.json makes a folder one of a run
        for file in ("env.json", SAMPLES):
            if (run.path / file).exists():
                client.log_artifact(made.info.run_id, str(run.path / file))
        return made.info.run_id

    def settings(self, settings: Mapping[str, float]) -> None:
        with self._alone():
            self._client.log_batch(self._id, params=_params(settings))

    def add(self, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [Metric(_allowed(name), value, now, step) for name, value in numbers.items()]

    def flush(self) -> None:
        with self._alone():
            while self._metrics:
                self._client.log_batch(self._id, metrics=self._metrics[:MOST])
                del self._metrics[:MOST]

    def end(self, result: Mapping[str, Any]) -> None:
        how = {"": "KILLED", "diverged": "FAILED"}.get(result.get("reason", ""), "FINISHED")
        with self._alone():
            if result:
                self._client.log_dict(self._id, dict(result), "result.json")
                self._client.set_tag(self._id, "reason", result.get("reason"))
            self._client.set_terminated(self._id, how)


MOST = 1000  # metrics that a server takes at a time


def _params(settings: Mapping[str, Any]) -> list[Any]:
    """Return the settings as MLflow's parameters."""
    from mlflow.entities import Param

    return [Param(_allowed(name), str(value)) for name, value in settings.items()]


def _allowed(name: str) -> str:
    """Return the name without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with those as texts that are no number, such as lists."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}

"""The accuracies and costs of a run's rounds in TensorBoard, MLflow and Weights & Biases, as the run goes on.

The process that starts a run listens to its events and logs them; no result depends on it. With `--actors 0` this
process also trains, so the next round starts once a round has been logged; the driver actor of other runs does not
wait. Every command on a folder reports all rounds since round 0, from which a logger takes those that its record lacks:
an interrupted run that is resumed has each round once, and so has a run that was first without loggers."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from shutil import rmtree
from types import TracebackType
from typing import Any, Protocol
from uuid import uuid4

from fedsim.config import Config, flat
from fedsim.counts import Counts
from fedsim.errors import InputError, Stopped, first_line, shortened
from fedsim.events import Event, Note, Progress, RoundValues
from fedsim.fields import LOGGERS
from fedsim.files import write_text
from fedsim.reporting.metrics import curves
from fedsim.reporting.report import Report
from fedsim.reporting.tables import COLUMNS, TRAINED, ZERO_SHOT, score_table

FOLDER = "tensorboard"  # in that of the run
RUN_ID = "run_id"  # a file that names the run's record in MLflow and W&B; written first, so that none is made twice
COSTS = "loss", "bytes_up", "bytes_down", "seconds", "clock_s", "epsilon"  # columns of `Tables.rounds`
PROJECT = "fedsim"  # the experiment in MLflow, and the project in W&B, unless the environment names another
END_S = 20  # for the record of a run that was interrupted or has failed to be ended
CHECK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # MLflow tries for minutes


def round_values(report: Report, first: int) -> Iterator[RoundValues]:
    """An event for each round of a report from `first` on.

    Names: `accuracy/generalization`, `accuracy/personalization`, `accuracy/validation` and, where there are such rows,
    `accuracy/new`, `accuracy/neighbor` and `accuracy/attack_success`, in [0, 1], of evaluated rounds; the same below
    `zero_shot`, in round 0; and `round/` with each of `COSTS`. Values that are nan are left out.
    """
    for round in range(first, len(report.rounds) + 1):
        values = _costs(report, round) if round else _accuracies("zero_shot", ZERO_SHOT, 0, report.zero_shot, report)
        if round in report.counts:
            values |= _accuracies("accuracy", TRAINED, round, report.counts[round], report)
        yield RoundValues("round", round, {name: value for name, value in values.items() if not isnan(value)})


def check_loggers(names: tuple[str, ...]) -> None:
    """Raises InputError where a package or an account is missing, and Stopped where a server does not answer."""
    for name in names:
        if find_spec(package := LOGGERS[name]) is None:
            remedy = f"pip install {package}, or uv run --with {package} fedsim ..."
            raise InputError(f"logger {name} needs the package {package}, which is not installed: {remedy}")
    if "mlflow" in names and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        _check_mlflow(uri)
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        _check_wandb()


def mlflow_uri(folder: Path) -> str:
    """Where MLflow keeps its records: a server or store that the environment names, or a database in the folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"


class Loggers:
    """Passes the events of a run on, and logs the values of its rounds; a context manager.

    The loggers are opened at the first round, which is round 0, when the process that runs has taken the folder.

    Args:
        progress: where events go, and what became of a logger; with None, a logger that fails raises Stopped.
    """

    def __init__(self, config: Config, folder: Path, progress: Progress | None) -> None:
        self.config, self.folder, self.show = config, folder, progress
        self.loggers: dict[str, _Logger] | None = None
        # Ctrl-C, which reaches the main thread alone, would leave a database of MLflow locked by half a transaction.
        self.thread = ThreadPoolExecutor(1)

    def progress(self, event: Event) -> None:
        """Raises Stopped if a logger cannot be opened; once a round has been logged, a failure is only noted."""
        if not isinstance(event, RoundValues):
            self._show(event)
            return
        if self.loggers is None:
            self.loggers = {}
            for name in self.config.loggers:
                self._open(name)
        for name, logger in list(self.loggers.items()):
            try:
                self.thread.submit(logger.log, event.round, event.values).result()
            except Exception as error:  # of a server, a network or a disk
                del self.loggers[name]
                self._failed(name, f"in round {event.round}", error)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        for name, logger in (self.loggers or {}).items():
            try:
                self.thread.submit(logger.close, status).result(END_S if error else None)
            except Exception as problem:
                if error is None:  # of two errors, that of the run is shown
                    self._failed(name, "at its end", problem)
        self.thread.shutdown(wait=False)

    def _open(self, name: str) -> None:
        assert self.loggers is not None
        try:
            self.loggers[name] = self.thread.submit(LOGGER_OF[name], self.config, self.folder).result()
        except Exception as error:
            raise Stopped(f"logger {name} does not start: {_words(error)}; rerun the command without it") from None
        if where := self.loggers[name].where:
            self._show(Note(name, where))

    def _failed(self, name: str, when: str, error: Exception) -> None:
        if self.show is None:
            raise Stopped(f"logger {name} failed {when}: {_words(error)}; the same command resumes the run") from None
        remedy = "the run goes on without it, and the same command later logs what is missing"
        self.show(Note(name, f"logging failed {when} ({_words(error)}); {remedy}"))

    def _show(self, event: Event) -> None:
        if self.show:
            self.show(event)


class _Logger(Protocol):
    where: str  # the record, for the user; empty where the README says it

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Adds a round, whole or not at all, unless the record has it."""
        ...

    def close(self, status: str) -> None:
        """Ends the record with one of MLflow's words: FINISHED, KILLED, FAILED."""
        ...


class _EventFile:
    """For TensorBoard. The file is written again by each command, since every command reports all rounds."""

    where = ""

    def __init__(self, config: Config, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # not SummaryWriter: its thread would lose errors

        rmtree(folder / FOLDER, ignore_errors=True)
        (folder / FOLDER).mkdir()
        self.writer = EventsWriter(str(folder / FOLDER / "events"))

    def log(self, round: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] - is generated
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self.writer.write_event(Event(wall_time=time.time(), step=round, summary=scalar(name, value)))
        self.writer.flush()

    def close(self, status: str) -> None:
        self.writer.close()


class _MLflow:
    """A run of MLflow. The record itself is asked for what it has: MLflow would add a point a second time."""

    def __init__(self, config: Config, folder: Path) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new database is announced, across progress bars
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports] - of the user's

        self.client = MlflowClient(mlflow_uri(folder))
        experiment, id = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)), _run_id(folder)
        # A run may be continued with more rounds, but MLflow's parameters can never change.
        tags = {"fedsim.run": id, "fedsim.rounds": str(config.rounds)}
        found = self.client.search_runs([experiment], f"tags.`fedsim.run` = '{id}'")
        run = found[0] if found else self.client.create_run(experiment, tags=tags, run_name=folder.name)
        self.id = run.info.run_id
        self._describe(config, tags)
        self.logged = {
            (name, point.step) for name in run.data.metrics for point in self.client.get_metric_history(self.id, name)
        }
        self.where = f"run {self.id} in {_without_password(mlflow_uri(folder))}"

    def log(self, round: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now, new = int(time.time() * 1000), [name for name in values if (name, round) not in self.logged]
        if new:
            self.client.log_batch(self.id, metrics=[Metric(name, values[name], now, round) for name in new])

    def close(self, status: str) -> None:
        self.client.set_terminated(self.id, status)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self.client.create_experiment(name)
        except MlflowException:  # another run may have created it just now
            if found := self.client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _describe(self, config: Config, tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag  # pyright: ignore[reportMissingImports]

        fields = {name: value for name, value in flat(config.experiment()).items() if name != "rounds"}
        params = [Param(name, shortened(str(value), 400)) for name, value in fields.items()]
        self.client.update_run(self.id, status="RUNNING")
        self.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()])
        for begin in range(0, len(params), 100):  # MLflow takes no more in one call
            self.client.log_batch(self.id, params=params[begin : begin + 100])


class _WandB:
    """A run of W&B, whose record grows only at its end: rounds before its next step are in it.

    A record that an earlier command made offline cannot be continued. The new one has all rounds and replaces it.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - of the user's

        id, place = _run_id(folder), os.environ.get("WANDB_DIR", str(folder))
        for earlier in Path(place, "wandb").glob(f"offline-run-*-{id}*"):
            rmtree(earlier, ignore_errors=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=id,
            resume="allow",
            dir=place,
            reinit="create_new",  # not a run that the user's program has open
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.config.update(config.experiment(), allow_val_change=True)
        self.first = self.run.step
        self.where = str(Path(self.run.dir).parent) if self.run.offline else self.run.url or ""

    def log(self, round: int, values: Mapping[str, float]) -> None:
        if round >= self.first:
            self.run.log(dict(values), step=round, commit=True)

    def close(self, status: str) -> None:
        self.run.finish(exit_code=int(status != "FINISHED"))


LOGGER_OF: dict[str, Any] = {"tensorboard": _EventFile, "mlflow": _MLflow, "wandb": _WandB}


def _accuracies(prefix: str, model: str, round: int, counts: Counts, report: Report) -> dict[str, float]:
    lines = curves(score_table([(model, round, counts)], report.domains), report.held_out)
    return {f"{prefix}/{name}": float(lines[name].iloc[0]) for name in lines}


def _costs(report: Report, round: int) -> dict[str, float]:
    row = report.rounds[round - 1]
    return {f"round/{name}": float(row[COLUMNS["rounds"].index(name)]) for name in COSTS}


def _run_id(folder: Path) -> str:
    if not (folder / RUN_ID).exists():
        write_text(folder / RUN_ID, uuid4().hex)
    return (folder / RUN_ID).read_text(encoding="utf-8").strip()


@cache  # once a process, which may prepare many runs; an error is not remembered
def _check_mlflow(uri: str) -> None:
    with _environment(CHECK):
        try:
            from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

            MlflowClient(uri).search_experiments(max_results=1)
        except Exception as error:
            where = _without_password(uri)
            raise Stopped(f"MLflow does not answer at MLFLOW_TRACKING_URI, {where}: {_words(error)}") from None


@cache
def _check_wandb() -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    try:
        account = wandb.login(prompt=False, verify=True)
    except Exception as error:
        raise Stopped(f"W&B cannot be reached: {_words(error)}; WANDB_MODE=offline needs no server") from None
    if not account:
        raise InputError("logger wandb needs an account (wandb login, or WANDB_API_KEY), or WANDB_MODE=offline")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _words(error: Exception) -> str:
    return _without_password(first_line(error))


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@]*@", "//", text)

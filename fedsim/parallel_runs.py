"""Runs many experiments at once, one Ray task per run; `run` instead spreads the clients of one run."""

import atexit
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.clients import Population
from fedsim.cluster.placement import Sizing
from fedsim.cluster.session import joined, session
from fedsim.cluster.tasks import TaskCall, Tasks
from fedsim.config import Config
from fedsim.data import DATA_FIELDS, EncodedData, encode_data, features_key, rows_to_encode
from fedsim.errors import EXPECTED, InputError, listing
from fedsim.events import Progress, Step
from fedsim.memory import collect_seldom
from fedsim.methods import Method
from fedsim.prepare import Experiment, prepare, sizing_of
from fedsim.reporting.loggers import Loggers
from fedsim.reporting.report import Report
from fedsim.simulate import simulate


def run_all(
    configs: Sequence[Config],
    address: str | None = None,
    progress: Progress = lambda event: None,
    at_once: int | None = None,
) -> Iterator[tuple[int, Report]]:
    """Runs experiments side by side, each as `run` would with `actors=0`, to the same bits.

    A run gets `threads_per_actor` CPUs, and a share of a GPU if `gpus_per_actor` names one; `actors` and `address` of a
    config are ignored. The same configs resume interrupted runs; finished ones are returned at once. Data are read and
    encoded on this machine and sent to the others; each folder is written on the machine that executes the run.

    Args:
        configs: each with another folder. It is fastest to put the longest run first.
        address: of a cluster (default: the one that this process has joined, or else a private one).
        progress: called with a step of "runs" as they end.
        at_once: runs at a time, at most (default: as many as there is room for).

    Yields:
        The index of a config in `configs`, and its report, in the order in which the runs end. Closing the iterator
        ends the other runs; their checkpoints are intact.

    Raises:
        InputError: one of the configs cannot work; raised before any run starts. If runs fail, the error of the first
            of them in `configs` (InputError, Stopped, Diverged or another) is raised after all others have ended.
    """
    if at_once is not None and at_once < 1:
        raise InputError(f"at_once must be 1 or more, got {at_once}")
    return _run_all(_prepared(configs, address), address, progress, at_once)


def _prepared(configs: Sequence[Config], address: str | None) -> list[Experiment]:
    # In a cluster, this machine need not have the GPU that a run will have.
    execution = {"actors": 0, "address": "auto" if joined() else address}
    latest: dict[str, Experiment] = {}  # by data, which are loaded once
    owners: dict[Any, int] = {}
    experiments = []
    for index, config in enumerate(configs):
        config = config.model_copy(update=execution | {"out": config.folder().absolute()})
        if (other := owners.setdefault(config.out, index)) != index:
            raise InputError(f"runs {other} and {index} share the folder {config.out}; each needs its own out")
        data = repr([getattr(config, name) for name in DATA_FIELDS])
        latest[data] = prepare(config, latest.get(data))
        experiments.append(latest[data])
    return experiments


def _run_all(
    experiments: list[Experiment], address: str | None, progress: Progress, at_once: int | None
) -> Iterator[tuple[int, Report]]:
    waiting = [index for index, experiment in enumerate(experiments) if not experiment.done]
    ended = len(experiments) - len(waiting)
    progress(Step("runs", ended, len(experiments)))
    yield from ((index, experiment.done) for index, experiment in enumerate(experiments) if experiment.done)
    if not waiting:
        return
    failed: dict[int, Exception] = {}
    with ExitStack() as stack:
        ray = stack.enter_context(session(address, progress))
        # A caller that fails may hold this generator until the interpreter exits. Registered after Ray's own handler,
        # this one is called before it, while tasks can still be cancelled.
        atexit.register(stack.close)
        stack.callback(atexit.unregister, stack.close)
        tasks = Tasks(ray)
        calls = _calls(tasks, [experiments[index] for index in waiting], progress)
        outcomes = stack.enter_context(closing(tasks.run(_simulate, calls, at_once or len(calls))))
        for call, outcome in outcomes:
            index, ended = waiting[call], ended + 1
            progress(Step("runs", ended, len(experiments), experiments[index].folder.name))
            if isinstance(outcome, Exception):
                failed[index] = outcome
            else:
                yield index, outcome
    if failed:
        raise _error_of([(experiments[index], failed[index]) for index in sorted(failed)], len(experiments))


def _calls(tasks: Tasks, experiments: list[Experiment], progress: Progress) -> list[TaskCall]:
    """One for each experiment; data that several of them share are encoded and stored once.

    Raises:
        InputError: no machine has room for one of them.
    """
    shares = [tasks.share(_task_sizing(experiment)) for experiment in experiments]
    rows = [rows_to_encode(experiment.data.source, experiment.clients) for experiment in experiments]
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, experiment in enumerate(experiments):
        groups.setdefault((id(experiment.data), rows[index] is None), []).append(index)
    stored = {}
    for group in groups.values():
        data, keys = _encoded([experiments[index] for index in group], [rows[index] for index in group], progress)
        if tasks.several_machines:
            data = replace(data, source=data.source.inline())
        stored |= dict(zip(group, zip([tasks.store(data)] * len(group), keys, strict=True), strict=True))
    return [
        TaskCall((each.config, each.folder, each.method, *stored[index], each.clients), shares[index])
        for index, each in enumerate(experiments)
    ]


def _encoded(
    group: list[Experiment], rows: list[np.ndarray | None], progress: Progress
) -> tuple[EncodedData, list[str]]:
    """The data of experiments that share them, encoded for all of their methods and rows; and the key of each.

    Args:
        rows: those to encode, of each experiment; all of them None: all.
    """
    first, methods = group[0], [experiment.method for experiment in group]
    config, some = first.config, [own for own in rows if own is not None]
    union = np.unique(np.concatenate(some)) if some else None
    sizing = replace(_task_sizing(first), actors=None)
    data = encode_data(first.data, config, methods, sizing, progress, union)
    whole = data.source.representations.key
    if union is None:
        return data, [whole] * len(group)
    # As `run` names them, so that a run can be resumed by either.
    keys = {union.tobytes(): whole}
    for own in some:
        if own.tobytes() not in keys:
            keys[own.tobytes()] = features_key(first.data, config.cache_dir, own)
    return data, [keys[own.tobytes()] for own in some]


def _simulate(config: Config, folder: Path, method: Method, data: EncodedData, key: str, clients: Population) -> Report:
    """Runs in a task. Its arguments are an experiment's, one by one: the data come by reference.

    Args:
        key: of the features that `run` would encode; the data may have more rows, for other experiments.
    """
    collect_seldom()
    # The address is not written to config.yaml: `fedsim run` may find no cluster there.
    config = config.model_copy(update={"address": None})
    data = replace(data, source=replace(data.source, representations=replace(data.source.representations, key=key)))
    with Loggers(config, folder, None) as loggers:
        return simulate(Experiment(config, folder, method, data, clients), loggers.progress)


def _task_sizing(experiment: Experiment) -> Sizing:
    """The sizing of the one process that a run has; on the CPU unless it has a share of a GPU."""
    sizing = sizing_of(experiment.config)
    return replace(sizing, actors=1, gpus_per_actor=sizing.gpus_per_actor or 0.0)


def _error_of(failed: list[tuple[Experiment, Exception]], total: int) -> Exception:
    """One error for all runs that failed, in the order in which they were given."""
    first, cause = failed[0]
    message = f"{first.folder}: {cause}"
    if len(failed) > 1:
        others = listing(experiment.folder.name for experiment, _ in failed[1:])
        message = f"{len(failed)} of {total} runs failed; {message}; and {others}"
    expected = isinstance(cause, EXPECTED)
    error = (type(cause) if expected else RuntimeError)(message)
    error.__cause__ = None if expected else cause  # the traceback of an error that is no fault of the user
    return error

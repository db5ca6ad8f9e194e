"""Many runs side by side, a task of the cluster each; where `run` spreads the clients of one."""

from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from fedsim.clip.model import Frozen
from fedsim.cluster.calls import TRIES
from fedsim.cluster.nodes import nodes_of
from fedsim.cluster.placement import Placement, Sizing, plan
from fedsim.cluster.session import joined, session
from fedsim.config import Config
from fedsim.errors import EXPECTED, InputError, Stopped, listing
from fedsim.events import Progress, Step
from fedsim.prepare import DATA, Experiment, prepare, sizing_of
from fedsim.reporting.report import Report
from fedsim.representations import Encoded
from fedsim.simulate import encoded, simulate

ENDED_S = 10  # for interrupted runs to let go of their folders
# How a task tells of its process or machine: it has ended, its answer with it, or there was no memory left.
LOST = "WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError", "ObjectLostError", "OutOfMemoryError"


def run_all(
    configs: Sequence[Config],
    address: str | None = None,
    progress: Progress = lambda event: None,
    at_once: int | None = None,
) -> Iterator[tuple[int, Report]]:
    """Runs experiments side by side, each as `run` would with `actors=0`, to the same bits.

    A run has `threads_per_actor` CPUs to itself, and a share of a GPU where `gpus_per_actor` names one; `actors` and
    `address` of a config are not heeded. The same configs resume where they stopped; finished ones come back at once.
    Data are read and encoded here and travel; folders lie on the disks of whoever ran them.

    Args:
        configs: each with a folder of its own. Longest first is quickest.
        address: of a cluster; none given: a private one. Where this process has joined one already, that is used.
        progress: told of "runs" as they end.
        at_once: runs at a time at most; none given: as many as there is room for.

    Yields:
        The place of a config in `configs`, and its report, in the order in which they end. Whoever stops asking ends
        the others, whose checkpoints are whole.

    Raises:
        InputError: whatever of any config cannot work, at once and before any run starts. After all others have
            ended: of those that failed, what InputError, Stopped, Diverged or any other error says of the first.
    """
    if at_once is not None and at_once < 1:
        raise InputError(f"at_once wants 1 run or more, not {at_once}")
    return _run_all(_prepared(configs, address), address, progress, at_once)


def _prepared(configs: Sequence[Config], address: str | None) -> list[Experiment]:
    # Inside of a cluster, this machine need not have the GPU that a run will have.
    where = {"actors": 0, "address": "auto" if joined() else address}
    latest: dict[str, Experiment] = {}  # by data, which are loaded once
    owners: dict[Any, int] = {}
    experiments = []
    for place, config in enumerate(configs):
        config = config.model_copy(update=where | {"out": config.folder().absolute()})
        if (other := owners.setdefault(config.out, place)) != place:
            raise InputError(f"runs {other} and {place} share the folder {config.out}; each wants an out of its own")
        data = repr([getattr(config, name) for name in DATA])
        latest[data] = prepare(config, latest.get(data))
        # Its config.yaml is for `fedsim run` too, which may then find no cluster there.
        experiments.append(replace(latest[data], config=config.model_copy(update={"address": None})))
    return experiments


def _run_all(
    experiments: list[Experiment], address: str | None, progress: Progress, at_once: int | None
) -> Iterator[tuple[int, Report]]:
    todo = [place for place, experiment in enumerate(experiments) if not experiment.done]
    ended = len(experiments) - len(todo)
    progress(Step("runs", ended, len(experiments)))
    yield from ((place, experiment.done) for place, experiment in enumerate(experiments) if experiment.done)
    if not todo:
        return
    failed: list[tuple[Experiment, Exception]] = []
    with session(address, progress) as ray:
        calls = _calls(ray, [experiments[place] for place in todo], progress)
        with closing(_outcomes(ray, calls, at_once or len(todo))) as outcomes:
            for index, outcome in outcomes:
                place, ended = todo[index], ended + 1
                progress(Step("runs", ended, len(experiments), experiments[place].folder.name))
                if isinstance(outcome, Report):
                    yield place, outcome
                else:
                    failed.append((experiments[place], outcome))
    if failed:
        raise _told(failed, len(experiments))


@dataclass(frozen=True)
class _Call:
    """What a task is given: `args` of `_whole`, the last two by reference, and its share of a machine."""

    args: tuple
    share: Placement


def _calls(ray, experiments: list[Experiment], progress: Progress) -> list[_Call]:
    """One for each experiment; what those on the same data share is read, encoded and stored once.

    Raises:
        InputError: no machine has room for one of them.
    """
    nodes = nodes_of(ray, Sizing())
    shares = [plan(_sizing(experiment), 1, nodes)[0] for experiment in experiments]
    alike: dict[int, list[Experiment]] = {}
    for experiment in experiments:
        alike.setdefault(id(experiment.source), []).append(experiment)
    shared = {}
    for source, group in alike.items():
        methods = [experiment.method for experiment in group]
        whole = encoded(group[0], replace(_sizing(group[0]), actors=None), progress, methods)
        features = whole.source.inline() if len(nodes) > 1 else whole.source
        shared[source] = ray.put(features), ray.put(whole.frozen)
    return [
        _Call((replace(experiment, source=None), *shared[id(experiment.source)]), share)
        for experiment, share in zip(experiments, shares, strict=True)
    ]


def _outcomes(ray, calls: list[_Call], at_once: int) -> Generator[tuple[int, Report | Exception]]:
    """The index of each call with its report, or with why there is none, as they end."""
    # A run whose process or machine is lost begins again elsewhere, from its checkpoint where that is seen. Not left to
    # Ray, which begins again without end where memory is short.
    task = ray.remote(max_retries=0)(_whole)
    # A process that has met a GPU keeps its context, memory and limits: not for the next run.
    once = ray.remote(max_retries=0, max_calls=1)(_whole)
    lost = tuple(getattr(ray.exceptions, name) for name in LOST)
    waiting, losses = deque(range(len(calls))), Counter()
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                call = calls[waiting[0]]
                share = {"num_cpus": call.share.num_cpus, "num_gpus": call.share.num_gpus}
                either = once if call.share.num_gpus else task
                running[either.options(**share).remote(*call.args)] = waiting.popleft()
            (ref,), _ = ray.wait(list(running))
            index = running.pop(ref)
            try:
                outcome = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                outcome = error.cause or error
            except lost as error:
                losses[index] += 1
                if losses[index] < TRIES:
                    waiting.appendleft(index)
                    continue
                outcome = Stopped(f"ended {TRIES} processes ({_line(error)}); is there memory for it?")
            del ref  # or its report would stay until the next one is there
            yield index, outcome
    finally:
        for ref in running:  # on a cluster of others, they would keep their folders
            ray.cancel(ref, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=ENDED_S)


def _whole(experiment: Experiment, source: Encoded, frozen: Frozen | None) -> Report:
    return simulate(replace(experiment, source=source, frozen=frozen), lambda event: None)


def _sizing(experiment: Experiment) -> Sizing:
    """Of the one process that a run has; on the CPU unless a share of a GPU is asked for."""
    sizing = sizing_of(experiment.config)
    return replace(sizing, actors=1, gpus_per_actor=sizing.gpus_per_actor or 0.0)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _told(failed: list[tuple[Experiment, Exception]], total: int) -> Exception:
    """One error for all that failed."""
    first, error = failed[0]
    says = f"{first.folder}: {error}"
    if len(failed) > 1:
        others = listing(one.folder.name for one, _ in failed[1:])
        says = f"{len(failed)} of {total} runs failed; {says}; and {others}"
    known = isinstance(error, EXPECTED)
    told = (type(error) if known else RuntimeError)(says)
    told.__cause__ = None if known else error  # of what is no fault of the user, the place where it happened
    return told

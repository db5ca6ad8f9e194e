"""One experiment, top to bottom."""

import time
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedsim.checkpoint import Checkpoints
from fedsim.clip.model import Clip
from fedsim.cluster.driver import run_in_driver_actor
from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import open_pool
from fedsim.cluster.workers import Pool
from fedsim.config import Config
from fedsim.datasets import Images
from fedsim.encoding import encode
from fedsim.errors import InputError, Stopped
from fedsim.events import Note, Progress, Started, Step
from fedsim.federation import Federation
from fedsim.files import reason, remove_parts, write_tensors
from fedsim.folder import (
    CONFIG,
    alone_in,
    write_sealed,
)
from fedsim.formats import number, percent
from fedsim.methods import Method
from fedsim.prepare import (
    ADAPTER,
    FILES,
    PAGE,
    Experiment,
    assumptions,
    clip_of,
    data_notes,
    judged,
    prepare,
    reading,
    sizing_of,
)
from fedsim.reporting.facts import environment, to_yaml
from fedsim.reporting.page import write_page
from fedsim.reporting.parquet import write_tables
from fedsim.reporting.report import Report, holdings
from fedsim.reporting.tables import COLUMNS
from fedsim.rng import numpy_rng
from fedsim.state import ServerState
from fedsim.training.client_store import PrivateStore
from fedsim.training.flops import flops_of
from fedsim.training.task import Task, backbone_of, initial_params
from fedsim.training.worker import ClientWorker

ALREADY = Note("run", "already finished; nothing was run")


def run(config: Config, progress: Progress = lambda event: None) -> Report:
    """Runs one experiment; actors, crashes and interruptions change its speed, never its report.

    The same config in the same folder resumes where it stopped, and returns at once when it is done. So does one with
    more rounds, to the bits of a run that had them from the start.

    Raises:
        InputError: whatever of the config cannot work, before Ray starts.
    """
    experiment = prepare(config)
    if experiment.done:
        progress(ALREADY)
        return experiment.done
    progress(Started("run"))
    if config.actors == 0:
        return simulate(experiment, progress)
    return run_in_driver_actor(simulate, (experiment,), config.address, progress)


def simulate(experiment: Experiment, progress: Progress) -> Report:
    """Features, rounds, report: what the driver actor does."""
    config, folder = experiment.config, experiment.folder
    sizing = sizing_of(config)
    try:
        with alone_in(folder, "run"):
            experiment = encoded(experiment, sizing, progress)
            with open_pool(sizing, len(experiment.clients)) as pool:
                progress(Note("workers", pool.sizes))
                for report in rounds(experiment, pool):
                    if len(report.rounds):
                        progress(Step("training", len(report.rounds), config.rounds, _note(report)))
            _write(report, folder)
            return report
    except OSError as error:  # a disk is full, for example; here or in an actor
        raise Stopped(f"{reason(error)}; once that is mended, the same command resumes after the last round") from None


def encoded(experiment: Experiment, sizing: Sizing, progress: Progress, methods: Iterable[Method] = ()) -> Experiment:
    """The same with features for images; and whatever else its method reads, or any of some more methods."""
    config, source = experiment.config, experiment.source
    if notes := data_notes(experiment):
        progress(Note("data", notes))
    reads = {method.reads for method in (experiment.method, *methods)}
    if isinstance(source, Images):
        names = sorted({each.image for each in reads})
        arguments = config.prompt, config.cache_dir, sizing, progress
        source = encode(source, experiment.weights, *arguments, names, config.augment)
    frozen = experiment.frozen
    if not frozen and any(each.towers for each in reads):
        frozen = Clip(experiment.weights).frozen()
    return replace(experiment, source=source, frozen=frozen)


def rounds(experiment: Experiment, pool: Pool) -> Generator[Report]:
    """The report of an encoded experiment after each round, once that is in a checkpoint.

    The first is that of round 0, or of the round where an earlier run ended. Always the same object, which grows.
    """
    config, folder, features, clients = experiment.config, experiment.folder, experiment.source, experiment.clients
    private = PrivateStore(folder / "private")
    task = Task(experiment.method, config.server, config.seed, config.dtype, private, config.engine == "reference")
    checkpoints = Checkpoints(folder, experiment.identity())
    state, report = _resume(experiment, checkpoints) or _begin(experiment, task)
    if len(state.private):
        pool.check_shared_folder(folder)
    remove_parts(folder, FILES)
    # Not before: a folder would else be held by an experiment that the method or the rule has refused.
    write_sealed(folder / CONFIG, to_yaml(config.plain()))
    if state.round < config.rounds:
        (folder / PAGE).unlink(missing_ok=True)  # that of fewer rounds would pass for this run's
    workers = pool.workers(ClientWorker, features, clients, experiment.frozen)
    federation = Federation(config, task, features, clients, workers, state.params, experiment.splits)
    if not report.counts:
        report.add_zero_shot(federation.zero_shot())
        report.add_scores(0, federation.evaluate(state))
        checkpoints.save(state, report)
    if state.round == config.rounds and not (state.round in report.counts or report.last):
        report.last = federation.evaluate(state)  # it was interrupted here on its way to more rounds
        checkpoints.save(state, report)
    private.prune([state.private, report.private])
    report.conclude(state)
    yield report
    for turn in federation.turns(state.round):
        began = time.perf_counter()
        state, notes = federation.train(state, turn)
        flops = _flops(report, notes, config.method)
        report.add_round(turn, notes, (federation.down, federation.up), time.perf_counter() - began, flops)
        if turn.round % config.eval_every == 0:
            report.judge(state, federation.evaluate(state))
        elif turn.round == config.rounds:
            report.last = federation.evaluate(state)
        checkpoints.save(state, report)
        # Those of the last round stay: the run may be resumed with more rounds.
        private.prune([state.private, report.private])
        report.conclude(state)
        yield report


def _resume(experiment: Experiment, checkpoints: Checkpoints) -> tuple[ServerState, Report] | None:
    found = checkpoints.load()
    if found and found[1].facts["features"] != experiment.source.representations.key:
        raise InputError(f"the images or weights behind {experiment.folder} have changed; give another --out")
    return found


def _begin(experiment: Experiment, task: Task) -> tuple[ServerState, Report]:
    features = experiment.source
    backbone = backbone_of(features, reads=task.method.reads, clip=clip_of(experiment, task.method))
    params = initial_params(task, backbone, experiment.config.cohort or experiment.clients.trainers)
    sample = numpy_rng(task.seed, "flops").permutation(experiment.clients[0].train)[: task.method.batch_size]
    per_step, per_row = flops_of(task, backbone, features, sample)
    kept = experiment.clients.trainers if task.has_private_state(params) else 0
    slots, _ = task.server.init(task.of(params, "shared"))
    state = ServerState(0, params, slots, private=np.zeros(kept, np.int64))
    facts = {
        "images": f"{features.rows_per_client} a client, made on demand" if features.rows_per_client else len(features),
        "width": features.class_embeddings.vectors.shape[1],
        "logit_scale": features.class_embeddings.logit_scale,
        "skipped": experiment.skipped,
        "features": features.representations.key,
        "reads": reading(task.method),
        "augment": features.representations.views - 1,
        "unseen_test": features.unseen_test,
        "label_space": task.method.label_space,
        "trained_parameters": sum(v.numel() for v in task.of(params, "shared", "private").values()),
        "flops_per_step": per_step,
        "flops_per_row": per_row,
        "versions": environment(),
    }
    if assumed := assumptions(experiment):
        facts["data_notes"] = "; ".join(assumed)
    config, clients = experiment.config, experiment.clients
    names = config.experiment(), list(features.domains), list(features.classes)
    report = Report(*names, list(config.held_out), facts, adapter=state.params, private=state.private)
    shown = [*judged(config, clients), *range(clients.trainers, len(clients))]
    report.holdings = holdings(features, (clients[k] for k in shown))
    return state, report


def _flops(report: Report, notes: np.ndarray, method: Method) -> float:
    """Floating-point operations of a round's training, all clients together."""
    per_step, per_row = (report.facts[name] for name in ("flops_per_step", "flops_per_row"))
    rows = (notes["rows"] * method.local_epochs * (notes["steps"] > 0)).sum()
    return float(notes["steps"].sum() * per_step + rows * per_row)


def _note(report: Report) -> str:
    last, loss = report.last_round, report.rounds[-1][COLUMNS["rounds"].index("loss")]
    validation = percent(report.validation[last])
    return f"loss {number(loss)}  validation {validation}%  best round {report.chosen_round}"


def _write(report: Report, folder: Path) -> None:
    tables = report.tables()
    write_tables(tables, folder)
    about = {"round": report.chosen_round, "method": report.experiment["method"]}
    write_tensors(folder / ADAPTER, {name: tensor.numpy() for name, tensor in report.adapter.items()}, about)
    write_page(tables, folder / PAGE)

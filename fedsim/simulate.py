"""One experiment, top to bottom."""

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, islice, pairwise
from math import ceil
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fedsim.cache import check_writable
from fedsim.checkpoint import Checkpoints
from fedsim.clients import Population, held_out_ids, make_clients, sample_cohort
from fedsim.clip.checkpoints import EMBEDDED, Weights, find_weights, width_of
from fedsim.clip.model import Clip, Frozen, check_texts
from fedsim.cluster.driver import run_in_driver_actor
from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import open_pool
from fedsim.cluster.session import check_reachable
from fedsim.cluster.workers import Pool, Workers
from fedsim.config import EXECUTION, Config
from fedsim.counts import SPLITS, Counts, merge
from fedsim.datasets import Features, Images, Labelled
from fedsim.datasets._check import unreadable
from fedsim.errors import InputError, Stopped, counted, listing
from fedsim.events import Note, Progress, Started, Step
from fedsim.features import encode, feature_file, keep, text_file
from fedsim.files import reason, remove_parts, write_tensors
from fedsim.folder import (
    CHECKPOINT,
    CONFIG,
    alone_in,
    check_folder,
    read_sealed,
    refuse_another,
    start_again,
    write_sealed,
)
from fedsim.formats import number, percent
from fedsim.methods import Backbone, Method
from fedsim.methods.zero_shot import ZeroShot
from fedsim.params import Params, flatten
from fedsim.partitions import drawn
from fedsim.registry import name_of
from fedsim.reporting.page import write_page
from fedsim.reporting.report import ROUND_COLUMNS, TABLES, Report, environment, holdings, to_yaml, write_tables
from fedsim.rng import numpy_rng
from fedsim.schedule import Turn, check, check_trained, schedule
from fedsim.servers.fedavg import FedAvg
from fedsim.state import ServerState, advance, kept_past
from fedsim.training.client_store import PrivateStore
from fedsim.training.flops import flops_of
from fedsim.training.task import Task, backbone_of, initial_params, with_towers
from fedsim.training.worker import ClientWorker
from fedsim.updates import CLIENT_STATS, sum_chunks

CHUNKS, LARGEST_CHUNK = 16, 64  # of a cohort; and clients: enough to outweigh a call, few enough to do again
DATA = "dataset", "data_dir", "skip_unreadable", "backbone", "pretrained", "prompt", "augment", "cache_dir"
DEALT = "partition", "clients", "held_out", "partition_seed", "train_share", "shots", "new_classes"
BUILT = "method", "server", "cohort", "fleet", "deadline_s", "over_selection", *DEALT
PAGE, ADAPTER = "report.html", "adapter.safetensors"
FILES = CONFIG, CHECKPOINT, ADAPTER, *(f"{name}.parquet" for name in TABLES), PAGE  # of a finished run
ALREADY = Note("run", "already finished; nothing was run")
JUDGED = -1  # in the place of a round: who is judged is drawn once


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


@dataclass(frozen=True)
class Experiment:
    """A config that has been checked, and what was found while checking.

    Attributes:
        source: the data set as it was loaded, unreadable images left out; features once it is `encoded`.
        weights: the backbone's; None for features of one's own.
        clients: training clients first, then one per held-out domain.
        done: the report, where the folder holds a finished run.
        frozen: CLIP itself, once it is `encoded` for a method that trains through its towers.
        splits: the rows to judge by; with ("val",) test rows are not read, and held-out domains not judged.
    """

    config: Config
    folder: Path
    source: Images | Features
    skipped: list[str]
    weights: Weights | None
    clients: Population
    done: Report | None
    frozen: Frozen | None = None
    splits: tuple[str, ...] = SPLITS

    @cached_property
    def method(self) -> Method:
        """As the server rule has it trained."""
        return self.config.server.adapt(self.config.method)

    def identity(self) -> dict[str, Any]:
        """What decides the report, as plain values; judged by other rows it is another one."""
        return self.config.experiment() | ({} if self.splits == SPLITS else {"splits": list(self.splits)})


def prepare(config: Config, like: Experiment | None = None, splits: tuple[str, ...] = SPLITS) -> Experiment:
    """Checks all that can be checked before anything is started or written.

    Args:
        like: of the same data, which are then not loaded again; nor are clients made anew who would be the same.
    """
    folder = config.folder().absolute()
    check_folder(folder, "run")
    _check_experiment(folder, config)
    check_reachable(config.address)
    config.server.adapt(config.method)  # refuses what the rule cannot train
    if config.gpus_per_actor and config.address is None and not torch.cuda.is_available():
        raise InputError(f"--gpus-per-actor {config.gpus_per_actor:g}, but torch finds no GPU on this machine")
    if like and not _agree(DATA, config, like.config):
        like = None
    experiment = like or _load(config)
    if isinstance(experiment.source, Images) and config.data_dir and _is_inside(folder, config.data_dir):
        raise InputError(f"{folder} is inside --data-dir, where its files would pass for data; give another --out")
    _check_reads(experiment, config)
    clients = like.clients if like and _agree(DEALT, config, like.config) else _clients(config, experiment.source)
    _check_asked(config, clients)
    _check_share(config, experiment.source)
    _check_judged(config, clients)
    if config.method.batch_size < config.method.min_batch:
        least = config.method.min_batch
        raise InputError(f"--method.batch-size wants {least} or more with this method, not {config.method.batch_size}")
    experiment = replace(experiment, config=config, folder=folder, clients=clients, splits=splits)
    found = Checkpoints(folder, experiment.identity()).load()
    if not found and not (like and _agree(BUILT, config, like.config)):
        _try_out(experiment)
    if not like and isinstance(experiment.source, Features) and not experiment.source.block:
        experiment = replace(experiment, source=keep(experiment.source, config.cache_dir, _damaged))
    return replace(experiment, done=_finished(folder, config, *found) if found else None)


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
    if notes := _data_notes(experiment):
        progress(Note("data", notes))
    reads = {method.reads for method in (experiment.method, *methods)}
    if isinstance(source, Images):
        what = config.prompt, config.cache_dir, sizing, progress
        levels = sorted({one.image for one in reads})
        each = [encode(source, experiment.weights, *what, level, config.augment) for level in levels]
        source = replace(each[0], kept={level: file for one in each for level, file in one.kept.items()})
    frozen = experiment.frozen
    if not frozen and any(one.towers for one in reads):
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
    federation = _Federation(config, task, features, clients, workers, state.params, experiment.splits)
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


class _Federation:
    """The workers, and the clients that they train and evaluate."""

    def __init__(
        self,
        config: Config,
        task: Task,
        features: Features,
        clients: Population,
        workers: Workers,
        params: Params,
        splits: Sequence[str],
    ) -> None:
        self.config, self.task, self.clients, self.workers, self.splits = config, task, clients, workers, splits
        self.away = list(range(clients.trainers, len(clients))) if "test" in splits else []
        self.domains = held_out_ids(features, config.held_out)
        self.sent = list(task.of(params, "shared", "server"))
        self.down, self.up = task.payload(params, config.cohort or clients.trainers)
        self.personal = bool(task.of(params, "private"))
        self.rows = np.full(clients.trainers, -1, np.int64)  # train rows, once somebody has asked for them

    def turns(self, done: int) -> Iterator[Turn]:
        """The rounds that are left."""
        turns = schedule(self.config, self.clients.trainers, self._train_rows, self.down, self.up)
        return islice(turns, done, self.config.rounds)

    def train(self, state: ServerState, turn: Turn) -> tuple[ServerState, np.ndarray]:
        """The next state, from the sum over those whose work counts, chunk by chunk in order; and their notes."""
        chunks = []
        for version, group in groupby(turn.trained, key=itemgetter(1)):
            written = [(client, self._written(state, client)) for client, _ in group]
            chunks += [(version, chunk) for chunk in self._chunks(written)]
        if not chunks:
            return replace(state, round=turn.round, past=kept_past(state, self.sent, turn.needed)), np.empty(
                0, CLIENT_STATS
            )
        past = state.past | {state.round: {}}
        sent = {version: flatten(state.params | (past[version] if self.sent else {})) for version, _ in chunks}
        broadcast = self.task.server.broadcast(state.slots, self.task.of(state.params, "shared"))
        what = self.task, turn.round, sent, flatten(broadcast)
        total = sum_chunks(self.workers.map("train", chunks, *what), self.clients.trainers)
        if not np.isfinite(total.delta).all():
            raise InputError(
                f"training diverged: in round {turn.round} an update is not finite; try a smaller --method.lr"
            )
        if len(state.private):
            private = state.private.copy()
            private[total.clients["client"]] = turn.round
            state = replace(state, private=private)
        return advance(self.config.server, state, total, self.sent, turn.needed, self.task.seed), total.clients

    def evaluate(self, state: ServerState) -> Counts:
        """Counts of all clients: by the shared model, or each by its own where it has private tensors."""
        ids = [*judged(self.config, self.clients), *([] if self.personal else self.away)]
        chunks = self._chunks([(client, self._written(state, client) * self.personal) for client in ids])
        also = self.away if self.personal else []
        return self._judged(chunks, self.task, state.params, also)

    def zero_shot(self) -> Counts:
        plain = Task(ZeroShot(), FedAvg(), self.task.seed, self.task.dtype)
        chunks = self._chunks([(client, 0) for client in [*judged(self.config, self.clients), *self.away]])
        return self._judged(chunks, plain, {}, [])

    def _judged(self, chunks: list, task: Task, params: Params, also: list[int]) -> Counts:
        what = task, flatten(params), also, self.domains, self.splits
        return merge(self.workers.map("evaluate", chunks, *what))

    def _train_rows(self, clients: Sequence[int]) -> np.ndarray:
        for client in clients:
            if self.rows[client] < 0:
                self.rows[client] = len(self.clients[client].train)
        return self.rows[list(clients)]

    def _written(self, state: ServerState, client: int) -> int:
        return int(state.private[client]) if client < len(state.private) else 0

    def _chunks(self, clients: list[Any]) -> list[list[Any]]:
        # Never by the number of actors: sums are rounded chunk by chunk.
        if size := self.config.chunk:
            return [clients[first : first + size] for first in range(0, len(clients), size)]
        count = max(min(CHUNKS, len(clients)), ceil(len(clients) / LARGEST_CHUNK))
        ends = [len(clients) * k // count for k in range(count + 1)]
        return [clients[first:last] for first, last in pairwise(ends)]  # as even as can be, for nobody to wait long


def _load(config: Config) -> Experiment:
    """The data, and the weights to encode them with; clients are still nobody."""
    try:
        source = config.dataset.load(config.data_dir)
    except OSError as error:  # a folder that this user may not read, say
        raise InputError(f"--data-dir cannot be read: {error.filename}: {error.strerror}") from None
    skipped: list[str] = []
    if not (isinstance(source, Features) and source.block):  # which is made on demand, and never cached
        check_writable(config.cache_dir)
    if isinstance(source, Features):
        if config.backbone or config.pretrained:
            raise InputError(
                "features of one's own have their encoder behind them; leave --backbone and --pretrained out"
            )
        weights = None
    else:
        weights = _weights(config)
        if not text_file(source.classes, weights, config.prompt, config.cache_dir).exists():
            check_texts(weights, [config.prompt.format(name) for name in source.classes])
        if not feature_file(source, weights, config.cache_dir, _damaged).exists():
            source, skipped = _readable(source, config.skip_unreadable)
    return Experiment(config, Path(), source, skipped, weights, Population([], []), None)


def _damaged(file: Path) -> None:
    print(f"fedsim: {file} is damaged; it is written again", file=sys.stderr)  # nothing shows progress yet


def _check_reads(experiment: Experiment, config: Config) -> None:
    """What a method reads of images must be there to be read."""
    if experiment.weights:
        return
    method = config.server.adapt(config.method)
    if method.reads.towers or method.reads.image != "features":
        raise InputError(
            f"method {name_of(config.method)} computes with CLIP itself ({_reading(method)}) and wants a data set of "
            f"images; {name_of(config.dataset)} has features alone"
        )
    if config.augment:
        raise InputError(f"--augment {config.augment} wants a data set of images; these are features")


def _try_out(experiment: Experiment) -> None:
    """Builds what is to be trained, on texts of no meaning: what does not fit is said before anything is computed."""
    config, weights, source = experiment.config, experiment.weights, experiment.source
    method = experiment.method
    clip = _clip_of(experiment, method)
    if clip and method.reads.image == "tokens":
        clip.check_tokens()
    width = width_of(weights) if weights else source.x.shape[1]
    texts = Backbone(torch.eye(len(source.classes), width), 1.0, source.classes, config.prompt)
    backbone = with_towers(texts, method.reads, clip)
    clients = experiment.clients
    task, cohort = Task(method, config.server, config.seed, config.dtype), config.cohort or clients.trainers
    payload = task.payload(initial_params(task, backbone, cohort), cohort)
    check_trained(config, method, clients.trainers, partial(_train_rows, clients), *payload)


def _train_rows(clients: Population, ids: Sequence[int]) -> np.ndarray:
    return np.array([len(clients[client].train) for client in ids], np.int64)


def _clip_of(experiment: Experiment, method: Method) -> Clip | None:
    """CLIP itself, where a method trains through its towers."""
    if not method.reads.towers:
        return None
    return experiment.frozen.open() if experiment.frozen else Clip(experiment.weights)


def _is_inside(folder: Path, other: Path) -> bool:
    # Resolved, since `images/../runs` is not in `images`, and what is below a link to it is.
    return folder.resolve().is_relative_to(other.resolve())


def _agree(fields: Iterable[str], config: Config, other: Config) -> bool:
    return all(getattr(config, name) == getattr(other, name) for name in fields)


def _reading(method: Method) -> str:
    return f"image {method.reads.image}, text {method.reads.text}"


def _check_experiment(folder: Path, config: Config) -> None:
    """Refuses a folder that holds another experiment; more rounds, or fewer, are the same one."""
    file = folder / CONFIG
    if file.exists():
        # As plain values: a custom method can be compared, but not made from its name.
        theirs = yaml.safe_load(read_sealed(file, start_again(folder)))
        theirs = {name: value for name, value in theirs.items() if name not in EXECUTION}
        refuse_another(folder, theirs | {"rounds": config.rounds}, config.experiment())


def _finished(folder: Path, config: Config, state: ServerState, report: Report) -> Report | None:
    """The report of a run that has done all its rounds and written what it found."""
    if state.round < config.rounds or not all((folder / name).exists() for name in FILES):
        return None
    report.conclude(state)
    return report


def _weights(config: Config) -> Weights:
    if config.backbone is None and config.pretrained is None:
        return find_weights(*EMBEDDED)
    if config.backbone == EMBEDDED[0]:
        return find_weights(config.backbone, config.pretrained or EMBEDDED[1])
    if config.backbone is None:
        raise InputError(f"--pretrained {config.pretrained} wants a --backbone, such as ViT-B-32")
    return find_weights(config.backbone, config.pretrained or "")


def _readable(images: Images, skip: bool) -> tuple[Images, list[str]]:
    bad = unreadable(images)
    if not bad:
        return images, []
    if not skip:
        index, reason = bad[0]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(f"{images.names[index]}{more} cannot be read ({reason}); --skip-unreadable leaves them out")
    left = images.take(np.setdiff1d(np.arange(len(images)), [index for index, _ in bad]))
    there = set(zip(left.domain.tolist(), left.y.tolist(), strict=True))
    cells = dict.fromkeys((images.domain[index], images.y[index]) for index, _ in bad)
    if empty := [f"{images.domains[d]}/{images.classes[c]}" for d, c in cells if (d, c) not in there]:
        raise InputError(f"--skip-unreadable leaves no image in: {listing(empty)}; {bad[0][1]}")
    return left, [images.names[index] for index, _ in bad]


def _data_notes(experiment: Experiment) -> str:
    """What the user is told of the data: what was left out, or taken for granted."""
    skipped = experiment.skipped
    unread = [f"left out {counted(len(skipped), 'unreadable image')}: {listing(skipped, 4)}"] if skipped else []
    return "; ".join([*_assumptions(experiment), *unread])


def _assumptions(experiment: Experiment) -> list[str]:
    """What is taken for granted of the data and of the weights."""
    weights = experiment.weights
    return [*experiment.source.notes, *([weights.note] if weights and weights.note else [])]


def _clients(config: Config, rows: Labelled) -> Population:
    return make_clients(
        rows,
        config.partition,
        config.clients,
        config.held_out,
        config.partition_seed,
        config.train_share,
        shots=config.shots,
        new_classes=config.new_classes,
    )


def _check_asked(config: Config, clients: Population) -> None:
    """Nobody can be asked who is not there."""
    for what, asked in {"a cohort": config.cohort, "eval_clients": config.eval_clients}.items():
        if asked and asked > clients.trainers:
            raise InputError(f"{what} of {asked} from {clients.trainers} clients; at most all of them can train")
    check(config, clients.trainers)


def _check_share(config: Config, rows: Labelled) -> None:
    """Refuses a share by which nothing is cut; the default is what everybody has."""
    if config.train_share != Config.model_fields["train_share"].default and not drawn(rows).any():
        raise InputError(
            f"--train-share {config.train_share:g} has no effect: {name_of(config.dataset)} says itself which rows are "
            "for training, validation and test; leave it out"
        )


def _check_judged(config: Config, clients: Population) -> None:
    """Refuses a run that would have no row to evaluate on, or no row of a domain that it is to be evaluated on."""
    for name, rows in zip(config.held_out, clients.away, strict=False):
        if not len(rows):
            raise InputError(f"held-out domain {name} has no test rows")
    ids = judged(config, clients)
    if len(clients) == clients.trainers and not any(len(c.val) + len(c.test) for c in map(clients.__getitem__, ids)):
        raise InputError(
            f"nothing can be evaluated: none of {len(ids)} clients has validation or test rows, and no domain is held "
            "out; take fewer clients or a smaller --train-share"
        )


def judged(config: Config, clients: Population) -> list[int]:
    """Ids of the training clients whose own rows are judged; the same in every round."""
    return sample_cohort(clients.trainers, config.eval_clients, config.partition_seed, JUDGED)


def sizing_of(config: Config) -> Sizing:
    """What the pool of a run may use."""
    return Sizing(
        config.actors,
        config.gpus_per_actor,
        config.gpu_gb_per_actor,
        config.threads_per_actor,
        config.call_timeout_s,
    )


def _resume(experiment: Experiment, checkpoints: Checkpoints) -> tuple[ServerState, Report] | None:
    found = checkpoints.load()
    if found and found[1].facts["features"] != _identity(experiment.source):
        raise InputError(f"the images or weights behind {experiment.folder} have changed; give another --out")
    return found


def _begin(experiment: Experiment, task: Task) -> tuple[ServerState, Report]:
    features = experiment.source
    backbone = backbone_of(features, reads=task.method.reads, clip=_clip_of(experiment, task.method))
    params = initial_params(task, backbone, experiment.config.cohort or experiment.clients.trainers)
    sample = numpy_rng(task.seed, "flops").permutation(experiment.clients[0].train)[: task.method.batch_size]
    per_step, per_row = flops_of(task, backbone, features, sample)
    kept = experiment.clients.trainers if task.has_private_state(params) else 0
    slots, _ = task.server.init(task.of(params, "shared"))
    state = ServerState(0, params, slots, private=np.zeros(kept, np.int64))
    facts = {
        "images": f"{features.block} a client, made on demand" if features.block else len(features),
        "width": features.x.shape[1],
        "logit_scale": features.logit_scale,
        "skipped": experiment.skipped,
        "features": _identity(features),
        "reads": _reading(task.method),
        "augment": features.augment,
        "unseen_test": features.unseen_test,
        "label_space": task.method.label_space,
        "trained_parameters": sum(v.numel() for v in task.of(params, "shared", "private").values()),
        "flops_per_step": per_step,
        "flops_per_row": per_row,
        "versions": environment(),
    }
    if assumed := _assumptions(experiment):
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


def _identity(features: Features) -> str:
    return features.file.stem if features.file else "made on demand"


def _note(report: Report) -> str:
    last, loss = report.last_round, report.rounds[-1][ROUND_COLUMNS.index("loss")]
    validation = percent(report.validation[last])
    return f"loss {number(loss)}  validation {validation}%  best round {report.chosen_round}"


def _write(report: Report, folder: Path) -> None:
    write_tables(report, folder)
    about = {"round": report.chosen_round, "method": report.experiment["method"]}
    write_tensors(folder / ADAPTER, {name: tensor.numpy() for name, tensor in report.adapter.items()}, about)
    write_page(report, folder / PAGE)

"""Everything of an experiment that can be refused before anything starts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fedsim.checkpoint import Checkpoints
from fedsim.clients import Population, make_clients, sample_cohort
from fedsim.cluster.placement import Sizing
from fedsim.cluster.session import check_reachable
from fedsim.config import EXECUTION, Config
from fedsim.counts import SPLITS
from fedsim.data import (
    DATA_FIELDS,
    Data,
    EncodedData,
    cached,
    check_readable,
    encode_data,
    load_data,
    rows_to_encode,
)
from fedsim.datasets import Labels
from fedsim.errors import InputError
from fedsim.events import Progress
from fedsim.folder import CHECKPOINT, CONFIG, check_folder, continued, read_sealed, refuse_another, start_again
from fedsim.ledger import Ledger
from fedsim.methods import Backbone, Method
from fedsim.params import Params
from fedsim.partitions import drawn
from fedsim.privacy import Privacy
from fedsim.privacy.none import Unprotected
from fedsim.registry import name_of
from fedsim.reporting.loggers import check_loggers
from fedsim.reporting.parquet import FILES as TABLES
from fedsim.reporting.report import Report
from fedsim.representations import Encoded
from fedsim.schedule import check, check_trained, schedule
from fedsim.state import ServerState
from fedsim.training.malice import check_attack, check_attacked
from fedsim.training.root import root_rows
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task, local_rows, with_towers

# The fields of Config that decide who holds which rows; and, with these, which model is trained and who trains it.
PARTITION_FIELDS = "partition", "clients", "held_out", "partition_seed", "train_share", "shots", "new_classes", "common"
COHORT_FIELDS = "cohort", "fleet", "deadline_s", "over_selection", "tasks"
MODEL_FIELDS = "method", "server", "codec", "privacy", "attack", *COHORT_FIELDS, *PARTITION_FIELDS
PAGE, ADAPTER = "report.html", "adapter.safetensors"
RESULTS = ADAPTER, *TABLES, PAGE  # written at the end
FILES = CONFIG, CHECKPOINT, *RESULTS  # of a finished run
EVALUATION_DRAW = -1  # in place of a round: the evaluated clients are drawn once


@dataclass(frozen=True)
class Experiment:
    """A config that has been checked, with everything that a run needs.

    Attributes:
        method: as the server rule has it trained (`Server.adapt`).
        data: as they were loaded; an `EncodedData` from `encode_experiment` on.
        clients: training clients first, then one per held-out domain.
        splits: the rows to evaluate on; with ("val",) test rows are not read, and held-out domains not evaluated.
        done: the report, if the folder holds a finished run.
        privacy: as the config has it, with the noise that its epsilon needs.
    """

    config: Config
    folder: Path
    method: Method
    data: Data
    clients: Population
    splits: tuple[str, ...] = SPLITS
    done: Report | None = None
    privacy: Privacy = field(default_factory=Unprotected)

    @property
    def encoded(self) -> EncodedData:
        assert isinstance(self.data, EncodedData), "the data are not encoded yet"
        return self.data

    @property
    def source(self) -> Encoded:
        """The encoded data as clients read them: with the images that `Population.images` gives the rows."""
        source = self.encoded.source
        return source if self.clients.images is None else source.showing(self.clients.images)

    def identity(self) -> dict[str, Any]:
        """The fields that decide the report, as plain values."""
        return _identity(self.config, self.splits)


def prepare(config: Config, like: Experiment | None = None, splits: tuple[str, ...] = SPLITS) -> Experiment:
    """Checks everything that can be checked before anything starts; writes nothing but files of the cache.

    Args:
        like: an experiment whose data and clients are reused where the config has the same.

    Raises:
        InputError: the config cannot work, or its folder holds another experiment.
        Stopped: the folder's disk is full, or the server of a logger does not answer.
    """
    folder = config.folder().absolute()
    check_folder(folder, "run")
    _check_experiment(folder, config)
    check_reachable(config.address)
    check_loggers(config.loggers)
    method = config.server.adapt(config.method)
    _check_precision(config, method)
    if config.gpus_per_actor and config.address is None and not torch.cuda.is_available():
        raise InputError(f"--gpus-per-actor {config.gpus_per_actor:g}, but torch finds no GPU on this machine")
    if like and not _agree(DATA_FIELDS, config, like.config):
        like = None
    data = like.data if like else load_data(config)
    _check_data(config, folder, method, data)
    clients = like.clients if like and _agree(PARTITION_FIELDS, config, like.config) else _clients(config, data.source)
    clients = clients.in_tasks(data.source, config.tasks, config.rounds, config.partition_seed)
    check_readable(data, config.cache_dir, rows_to_encode(data.source, clients))
    _check_share(config, data.source)
    check_attack(config.attack, method, data.source, clients, config.seed, config.eval_clients)
    _check_clients(config, method, clients)
    root_rows(config.server, clients, config.seed)  # for its error
    saved = Checkpoints(folder, _identity(config, splits), config.fixed_rounds).load()
    if not saved and not (like and _agree(MODEL_FIELDS, config, like.config)):
        _check_model(config, method, data, clients)
    if not like:
        data = cached(data, config.cache_dir)
    task = Task(method, config.server, config.seed, config.dtype, codec=config.codec)
    done = _finished(folder, config, task, *saved) if saved else None
    privacy = config.privacy if done or not config.privacy.solves else _solved(config, method, data, clients)
    return Experiment(config, folder, method, data, clients, splits, done, privacy)


def encode_experiment(
    experiment: Experiment,
    sizing: Sizing,
    progress: Progress,
    methods: Iterable[Method] = (),
    all_rows: bool = False,
) -> Experiment:
    """The same experiment with all that its method reads encoded, and all that further methods read.

    Args:
        all_rows: encode rows that no client has, too.
    """
    rows = None if all_rows else rows_to_encode(experiment.data.source, experiment.clients)
    methods = experiment.method, *methods
    return replace(experiment, data=encode_data(experiment.data, experiment.config, methods, sizing, progress, rows))


def evaluated_clients(config: Config, clients: Population) -> list[int]:
    """Ids of the training clients that are evaluated on their own rows, no malicious ones; the same in every round."""
    malicious = config.attack.malicious(clients.trainers, config.seed)
    honest = [client for client in range(clients.trainers) if client not in malicious]
    drawn = sample_cohort(len(honest), config.eval_clients, config.partition_seed, EVALUATION_DRAW)
    return [honest[index] for index in drawn]


def sizing_of(config: Config) -> Sizing:
    """What the pool of a run may use."""
    return Sizing(
        config.actors,
        config.gpus_per_actor,
        config.gpu_gb_per_actor,
        config.threads_per_actor,
        config.call_timeout_s,
    )


def reads_of(method: Method) -> str:
    """Such as `image features, text embeddings`."""
    return f"image {method.reads.image}, text {method.reads.text}"


def _identity(config: Config, splits: tuple[str, ...]) -> dict[str, Any]:
    return config.experiment() | ({} if splits == SPLITS else {"splits": list(splits)})


def _agree(fields: Iterable[str], config: Config, other: Config) -> bool:
    return all(getattr(config, name) == getattr(other, name) for name in fields)


def _check_experiment(folder: Path, config: Config) -> None:
    """Refuses a folder that holds another experiment; one that continues, with more rounds or fewer, is the same."""
    file = folder / CONFIG
    if file.exists():
        # As plain values: a custom method can be compared, but not made from its name.
        fields = yaml.safe_load(read_sealed(file, start_again(folder)))
        before = {name: value for name, value in fields.items() if name not in EXECUTION}
        refuse_another(folder, continued(before, config.experiment()), config.experiment())


def _finished(folder: Path, config: Config, task: Task, state: ServerState, report: Report) -> Report | None:
    """The report of a run that is complete and has written all its files."""
    files = [name for name in FILES if config.page or name != PAGE]
    if not report.complete or not all((folder / name).exists() for name in files):
        return None
    report.conclude(replace(state, params=task.evaluated(state.params, state.slots)))
    return report


def _clients(config: Config, rows: Labels) -> Population:
    return make_clients(
        rows,
        config.partition,
        config.clients,
        config.held_out,
        config.partition_seed,
        config.train_share,
        shots=config.shots,
        new_classes=config.new_classes,
        common=config.common,
    )


def _check_precision(config: Config, method: Method) -> None:
    """Refuses half precision in reference runs, and fp16 where gradients would pass through it."""
    if config.precision != "fp32" and config.dtype != "float32":
        raise InputError(f"--dtype {config.dtype} needs --precision fp32, got {config.precision}")
    if config.precision == "fp16" and method.reads.towers:
        raise InputError(
            f"method {name_of(config.method)} trains through CLIP's towers, where gradients can be too small for fp16; "
            "give --precision bf16 or fp32"
        )


def _check_data(config: Config, folder: Path, method: Method, data: Data) -> None:
    """Refuses a folder inside the data, and data that do not have what a method or the config needs."""
    if method.reads_target and data.source.class_domain:
        raise InputError(
            f"method {name_of(config.method)} reads unlabelled rows of held-out domains in training, which need the "
            "classes of the other domains; in a suite, each data set has classes of its own"
        )
    if data.weights:  # images, which a sweep has encoded already
        # Resolved, since `images/../runs` is not in `images`, and what is below a link to it is.
        if config.data_dir and folder.resolve().is_relative_to(config.data_dir.resolve()):
            raise InputError(f"{folder} is inside --data-dir, where its files would pass for data; give another --out")
        return
    dataset = name_of(config.dataset)
    if method.reads.towers or method.reads.image != "features":
        raise InputError(
            f"method {name_of(config.method)} needs CLIP's towers ({reads_of(method)}) and therefore images; {dataset} "
            "provides only features"
        )
    if config.augment:
        raise InputError(f"--augment {config.augment} needs a data set of images; {dataset} provides only features")


def _check_clients(config: Config, method: Method, clients: Population) -> None:
    """Refuses a config that these clients cannot train or be evaluated with."""
    if config.tune_epochs and not config.rounds:
        raise InputError("--tune-epochs tunes the model of the last round, and there is none; give --rounds 1 or more")
    for name, count in {"cohort": config.cohort, "eval_clients": config.eval_clients}.items():
        if count and count > clients.trainers:
            raise InputError(f"{name} of {count} from {clients.trainers} clients; it can be at most {clients.trainers}")
    if config.neighbors >= clients.trainers:
        raise InputError(
            f"neighbors of {config.neighbors} from {clients.trainers} clients; each has {clients.trainers - 1} others"
        )
    check(config, clients.trainers)
    _check_evaluated(config, clients)
    if method.reads_target and not len(clients.held_out):
        raise InputError(
            f"method {name_of(config.method)} reads unlabelled rows of held-out domains in training, and no domain is "
            "held out; give --held-out"
        )
    if method.batch_size < method.min_batch:
        raise InputError(
            f"--method.batch-size must be {method.min_batch} or more with this method, got {method.batch_size}"
        )
    if config.rounds and method.warmup_rounds > config.rounds:
        raise InputError(
            f"--method.warmup-rounds can be at most --rounds {config.rounds}, got {method.warmup_rounds}: the step "
            "size would never reach --method.lr"
        )
    if config.rounds and not method.lr_in(config.rounds, config.rounds):
        raise InputError(
            f"--method.schedule {method.schedule} with --method.lr-decay {method.lr_decay:g} lowers the step size to 0 "
            f"in {config.rounds} rounds; give a larger decay, or fewer --rounds"
        )


def _check_share(config: Config, rows: Labels) -> None:
    """Refuses a share that has no effect, except for the default, which users do not give."""
    if config.train_share != Config.model_fields["train_share"].default and not drawn(rows).any():
        raise InputError(
            f"--train-share {config.train_share:g} has no effect: {name_of(config.dataset)} defines its own train, "
            "validation and test rows; leave it out"
        )


def _check_evaluated(config: Config, clients: Population) -> None:
    """Refuses a run without a row to evaluate on, or without test rows of a held-out domain."""
    for name, rows in zip(config.held_out, clients.held_out, strict=False):
        if not len(rows):
            raise InputError(f"held-out domain {name} has no test rows")
    ids = evaluated_clients(config, clients)
    if len(clients) == clients.trainers and not any(len(c.val) + len(c.test) for c in map(clients.__getitem__, ids)):
        raise InputError(
            f"nothing can be evaluated: none of {len(ids)} clients has validation or test rows, and no domain is held "
            "out; take fewer clients or a smaller --train-share"
        )


def _check_model(config: Config, method: Method, data: Data, clients: Population) -> None:
    """Builds the model with placeholder text features, so that what does not fit is refused before encoding starts."""
    task, params = _placeholder(config, method, data, clients)
    check_attacked(task, params)
    task.first_bank(params, clients.trainers)  # for its error
    if clients.class_tasks and (method.reads_target or method.expands or task.select(params, "surveyed")):
        raise InputError(f"method {name_of(config.method)} reads rows of all classes from round 1 on, not in --tasks")
    Ledger(config, task, params, clients.trainers, ())  # for its error
    payload = task.payloads(params, config.cohort or clients.trainers, clients.trainers)
    check_trained(config, method, clients.trainers, partial(_local_rows, method, data.source, clients), *payload)


def _placeholder(config: Config, method: Method, data: Data, clients: Population) -> tuple[Task, Params]:
    """The task, and the parameters of round 0 with placeholder text features."""
    clip = data.clip() if method.reads.towers else None
    if clip and "tokens" in method.reads.representations:
        clip.check_tokens()
    classes = data.source.classes
    embeddings = torch.eye(len(classes), data.width)
    of_data = {"domains": len(data.source.domains), "groups": data.source.groups}
    texts = Backbone(embeddings, 1.0, classes, data.templates, **of_data)
    how = {"codec": config.codec, "privacy": config.privacy, "attack": config.attack, "fleet": config.fleet}
    task = Task(method, config.server, config.seed, config.dtype, **how)
    return task, initial_params(task, with_towers(texts, method.reads, clip), config.cohort or clients.trainers)


def _solved(config: Config, method: Method, data: Data, clients: Population) -> Privacy:
    """The privacy with the noise that its epsilon needs."""
    task, params = _placeholder(config, method, data, clients)
    rows_of = partial(_local_rows, method, data.source, clients)
    payload = task.payloads(params, config.cohort or clients.trainers, clients.trainers)
    rounds = schedule(config, clients.trainers, rows_of, *payload)
    solved = Ledger(config, task, params, clients.trainers, rounds).solved()
    Ledger(config, replace(task, privacy=solved), params, clients.trainers, ())  # for its error
    return solved


def _local_rows(method: Method, labels: Labels, clients: Population, ids: Sequence[int], round: int) -> np.ndarray:
    return np.array([local_rows(method, labels, clients.train_rows(k, round, labels)) for k in ids], np.int64)

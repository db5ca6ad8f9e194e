"""Everything of an experiment that can be refused before anything is started or written."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fedsim.cache import check_writable
from fedsim.checkpoint import Checkpoints
from fedsim.clients import Population, make_clients, sample_cohort
from fedsim.clip.checkpoints import EMBEDDED, Weights, find_weights, width_of
from fedsim.clip.model import Clip, Frozen, check_texts
from fedsim.cluster.placement import Sizing
from fedsim.cluster.session import check_reachable
from fedsim.config import EXECUTION, Config
from fedsim.counts import SPLITS
from fedsim.datasets import Features, Images, Labels
from fedsim.datasets._check import unreadable
from fedsim.encoding import feature_file, from_features, store, text_file
from fedsim.errors import InputError, counted, listing
from fedsim.folder import (
    CHECKPOINT,
    CONFIG,
    check_folder,
    read_sealed,
    refuse_another,
    start_again,
)
from fedsim.methods import Backbone, Method
from fedsim.partitions import drawn
from fedsim.registry import name_of
from fedsim.reporting.parquet import FILES as TABLES
from fedsim.reporting.report import Report
from fedsim.representations import Encoded
from fedsim.schedule import check, check_trained
from fedsim.state import ServerState
from fedsim.training.task import Task, initial_params, with_towers

DATA = "dataset", "data_dir", "skip_unreadable", "backbone", "pretrained", "prompt", "augment", "cache_dir"
DEALT = "partition", "clients", "held_out", "partition_seed", "train_share", "shots", "new_classes"
BUILT = "method", "server", "cohort", "fleet", "deadline_s", "over_selection", *DEALT
PAGE, ADAPTER = "report.html", "adapter.safetensors"
FILES = CONFIG, CHECKPOINT, ADAPTER, *TABLES, PAGE  # of a finished run
JUDGED = -1  # in the place of a round: who is judged is drawn once


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
    source: Images | Encoded
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
    if not like and isinstance(experiment.source, Encoded) and not experiment.source.rows_per_client:
        experiment = replace(experiment, source=store(experiment.source, config.cache_dir, _damaged))
    return replace(experiment, done=_finished(folder, config, *found) if found else None)


def _load(config: Config) -> Experiment:
    """The data, and the weights to encode them with; clients are still nobody."""
    try:
        source = config.dataset.load(config.data_dir)
    except OSError as error:  # a folder that this user may not read, say
        raise InputError(f"--data-dir cannot be read: {error.filename}: {error.strerror}") from None
    skipped: list[str] = []
    if not (isinstance(source, Features) and source.rows_per_client):  # which is made on demand, and never cached
        check_writable(config.cache_dir)
    if isinstance(source, Features):
        if config.backbone or config.pretrained:
            raise InputError(
                "features of one's own have their encoder behind them; leave --backbone and --pretrained out"
            )
        source, weights = from_features(source), None
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
            f"method {name_of(config.method)} computes with CLIP itself ({reading(method)}) and wants a data set of "
            f"images; {name_of(config.dataset)} has features alone"
        )
    if config.augment:
        raise InputError(f"--augment {config.augment} wants a data set of images; these are features")


def _try_out(experiment: Experiment) -> None:
    """Builds what is to be trained, on texts of no meaning: what does not fit is said before anything is computed."""
    config, weights, source = experiment.config, experiment.weights, experiment.source
    method = experiment.method
    clip = clip_of(experiment, method)
    if clip and method.reads.image == "tokens":
        clip.check_tokens()
    width = width_of(weights) if weights else source.class_embeddings.vectors.shape[1]
    texts = Backbone(torch.eye(len(source.classes), width), 1.0, source.classes, config.prompt)
    backbone = with_towers(texts, method.reads, clip)
    clients = experiment.clients
    task, cohort = Task(method, config.server, config.seed, config.dtype), config.cohort or clients.trainers
    payload = task.payload(initial_params(task, backbone, cohort), cohort)
    check_trained(config, method, clients.trainers, partial(_train_rows, clients), *payload)


def _train_rows(clients: Population, ids: Sequence[int]) -> np.ndarray:
    return np.array([len(clients[client].train) for client in ids], np.int64)


def clip_of(experiment: Experiment, method: Method) -> Clip | None:
    """CLIP itself, where a method trains through its towers."""
    if not method.reads.towers:
        return None
    return experiment.frozen.open() if experiment.frozen else Clip(experiment.weights)


def _is_inside(folder: Path, other: Path) -> bool:
    # Resolved, since `images/../runs` is not in `images`, and what is below a link to it is.
    return folder.resolve().is_relative_to(other.resolve())


def _agree(fields: Iterable[str], config: Config, other: Config) -> bool:
    return all(getattr(config, name) == getattr(other, name) for name in fields)


def reading(method: Method) -> str:
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


def data_notes(experiment: Experiment) -> str:
    """What the user is told of the data: what was left out, or taken for granted."""
    skipped = experiment.skipped
    unread = [f"left out {counted(len(skipped), 'unreadable image')}: {listing(skipped, 4)}"] if skipped else []
    return "; ".join([*assumptions(experiment), *unread])


def assumptions(experiment: Experiment) -> list[str]:
    """What is taken for granted of the data and of the weights."""
    weights = experiment.weights
    return [*experiment.source.notes, *([weights.note] if weights and weights.note else [])]


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
    )


def _check_asked(config: Config, clients: Population) -> None:
    """Nobody can be asked who is not there."""
    for what, asked in {"a cohort": config.cohort, "eval_clients": config.eval_clients}.items():
        if asked and asked > clients.trainers:
            raise InputError(f"{what} of {asked} from {clients.trainers} clients; at most all of them can train")
    check(config, clients.trainers)


def _check_share(config: Config, rows: Labels) -> None:
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

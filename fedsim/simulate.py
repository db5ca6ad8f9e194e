"""One experiment, top to bottom."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from fedsim.checkpoint import load_checkpoint, refuse_another, save_checkpoint, write_safetensors
from fedsim.clients import Client, make_clients, sample_cohort, training_clients
from fedsim.clip import EMBEDDED, Weights, find_weights
from fedsim.config import EXECUTION, Config, read_yaml
from fedsim.datasets import Features, Images, Labelled
from fedsim.datasets._check import unreadable
from fedsim.errors import InputError
from fedsim.features import encode, feature_file, keep
from fedsim.local import Task, Trainer, backbone_of, start
from fedsim.methods.zero_shot import ZeroShot
from fedsim.page import write_page
from fedsim.params import flatten
from fedsim.pool import Event, Pool, Progress, Sizing, check_reachable, drive, open_pool
from fedsim.report import Report, environment, holdings, to_yaml, write_tables, write_text
from fedsim.servers import Partial, ServerState, advance


def run(config: Config, progress: Progress = lambda event: None) -> Report:
    """Runs one experiment; actors, crashes and interruptions change its speed, never its report.

    The same config in the same folder resumes where it stopped, and returns at once when it is done.

    Raises:
        InputError: whatever of the config cannot work, before Ray starts.
    """
    experiment = prepare(config)
    if experiment.done:
        return experiment.done
    if config.actors == 0:
        return simulate(experiment, progress)
    return drive(simulate, (experiment,), config.address, progress)


@dataclass(frozen=True)
class Experiment:
    """A config that has been checked, and what was found while checking.

    Attributes:
        source: the data set as it was loaded, unreadable images left out.
        weights: the backbone's; None for features of one's own.
        clients: training clients first, then one per held-out domain.
        done: the report, where the folder holds a finished run.
    """

    config: Config
    folder: Path
    source: Images | Features
    skipped: list[str]
    weights: Weights | None
    clients: list[Client]
    done: Report | None


def prepare(config: Config) -> Experiment:
    """Checks all that can be checked before anything is started or written."""
    folder = config.folder().absolute()
    _check_folder(folder, config)
    check_reachable(config.address)
    if config.gpus_per_actor and config.address is None and not torch.cuda.is_available():
        raise InputError(f"--gpus-per-actor {config.gpus_per_actor:g}, but torch finds no GPU on this machine")
    try:
        source = config.dataset.load(config.data_dir)
    except OSError as error:  # a folder that this user may not read, say
        raise InputError(f"--data-dir cannot be read: {error.filename}: {error.strerror}") from None
    weights = None if isinstance(source, Features) else _weights(config)
    if isinstance(source, Features) and (config.backbone or config.pretrained):
        raise InputError("features of one's own have their encoder behind them; leave --backbone and --pretrained out")
    skipped: list[str] = []
    if isinstance(source, Images) and not feature_file(source, weights, config.cache_dir).exists():
        source, skipped = _readable(source, config.skip_unreadable)
    clients = _clients(config, source)
    found = load_checkpoint(folder, config.experiment())
    if isinstance(source, Features):
        source = keep(source, config.cache_dir)
    done = found[1] if found and found[0].round == config.rounds and (folder / "report.html").exists() else None
    return Experiment(config, folder, source, skipped, weights, clients, done)


def simulate(experiment: Experiment, progress: Progress) -> Report:
    """Features, rounds, report: what the driver actor does."""
    config, folder = experiment.config, experiment.folder
    sizing = Sizing(config.actors, config.gpus_per_actor)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        return _simulate(experiment, sizing, progress)


def _simulate(experiment: Experiment, sizing: Sizing, progress: Progress) -> Report:
    config, folder = experiment.config, experiment.folder
    write_text(folder / "config.yaml", to_yaml(config.plain()))
    features = _features(experiment, sizing, progress)
    task = Task(config.method, config.server, config.seed, config.dtype)
    state, report = _resume(experiment, features) or _begin(experiment, features, task)
    with open_pool(sizing, len(experiment.clients), Trainer, features, experiment.clients) as pool:
        federation = _Federation(config, task, experiment.clients, pool)
        if not len(report.scores):
            report.add_zero_shot(federation.zero_shot())
            report.add_scores(0, federation.evaluate(state))
            save_checkpoint(folder, config.experiment(), state, report)
        for round in range(state.round + 1, config.rounds + 1):
            began = time.perf_counter()
            total = federation.train(state, round)
            state = advance(config.server, state, total, federation.shared_of(state))
            report.add_round(round, total, time.perf_counter() - began)
            report.add_scores(round, federation.evaluate(state))
            if report.chosen_round == round:
                report.adapter = _adapter(state)
            save_checkpoint(folder, config.experiment(), state, report)
            progress(Event("training", round, config.rounds, _note(report, round)))
    _write(report, folder)
    return report


class _Federation:
    """The pool, and who is asked for what."""

    def __init__(self, config: Config, task: Task, clients: list[Client], pool: Pool) -> None:
        self.config, self.task, self.pool = config, task, pool
        self.trainers = [client.id for client in training_clients(clients)]
        self.held_out = [client.id for client in clients if not client.trains]

    def shared_of(self, state: ServerState) -> list[str]:
        return [name for name in state.params if self.task.is_shared(name)]

    def train(self, state: ServerState, round: int) -> Partial:
        """The sum over this round's cohort, chunk by chunk in order."""
        cohort = sample_cohort(len(self.trainers), self.config.cohort, self.config.seed, round)
        chunks = self._chunks([(client, state.private.get(client)) for client in cohort])
        total = None
        for partial in self.pool.map("train", chunks, self.task, round, flatten(state.params)):
            total = partial if total is None else total + partial
        if not all(np.isfinite(vector).all() for vector in (total.delta, *total.private.values())):
            raise InputError(f"training diverged: in round {round} an update is not finite; try a smaller --method.lr")
        return total

    def evaluate(self, state: ServerState) -> np.ndarray:
        """Counts of all clients: by the shared model, or each by its own where it has private tensors."""
        personal = len(self.shared_of(state)) < len(state.params)
        ids = self.trainers if personal else self.trainers + self.held_out
        chunks = self._chunks([(client, state.private.get(client)) for client in ids])
        also = self.held_out if personal else []
        return np.concatenate(list(self.pool.map("evaluate", chunks, self.task, flatten(state.params), also)))

    def zero_shot(self) -> np.ndarray:
        plain = Task(ZeroShot(), self.task.server, self.task.seed, self.task.dtype)
        chunks = self._chunks([(client, None) for client in self.trainers + self.held_out])
        return np.concatenate(list(self.pool.map("evaluate", chunks, plain, flatten({}), [])))

    def _chunks(self, clients: list[Any]) -> list[list[Any]]:
        # Never by the number of actors: sums are rounded chunk by chunk.
        size = self.config.chunk or -(-len(clients) // 32)
        return [clients[first : first + size] for first in range(0, len(clients), size)]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise InputError(f"another process is running in {folder}; wait for it, or give another --out") from None


def _check_folder(folder: Path, config: Config) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out wants a folder; {folder} is a file")
    there = folder / "config.yaml"
    if there.exists():
        # As plain values, for a method of the user's own can be compared and not made from its name.
        theirs = {name: value for name, value in read_yaml(there).items() if name not in EXECUTION}
        refuse_another(folder, theirs, config.experiment())
    standing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=standing):  # leaves nothing; and os.access tells root that all is well
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {standing}: {error.strerror}") from None


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
    if bad and not skip:
        index, reason = bad[0]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(f"{images.names[index]}{more} cannot be read ({reason}); --skip-unreadable leaves them out")
    rows = np.setdiff1d(np.arange(len(images)), [index for index, _ in bad])
    return images.take(rows) if bad else images, [images.names[index] for index, _ in bad]


def _clients(config: Config, rows: Labelled) -> list[Client]:
    clients = make_clients(
        rows, config.partition, config.clients, config.held_out, config.partition_seed, config.train_share
    )
    population = len(training_clients(clients))
    if config.cohort and config.cohort > population:
        raise InputError(f"a cohort of {config.cohort} from {population} clients; at most all of them can train")
    return clients


def _features(experiment: Experiment, sizing: Sizing, progress: Progress) -> Features:
    config, source = experiment.config, experiment.source
    if isinstance(source, Features):
        return source
    return encode(source, experiment.weights, config.prompt, config.cache_dir, sizing, progress)


def _resume(experiment: Experiment, features: Features) -> tuple[ServerState, Report] | None:
    found = load_checkpoint(experiment.folder, experiment.config.experiment())
    if found and found[1].facts["features"] != features.file.stem:
        raise InputError(f"the images or weights behind {experiment.folder} have changed; give another --out")
    return found


def _begin(experiment: Experiment, features: Features, task: Task) -> tuple[ServerState, Report]:
    state = ServerState(0, start(task, backbone_of(features)))
    facts = {
        "images": len(features),
        "width": features.x.shape[1],
        "logit_scale": features.logit_scale,
        "skipped": experiment.skipped,
        "features": features.file.stem,
        "versions": environment(),
    }
    names = experiment.config.experiment(), list(features.domains), list(features.classes)
    report = Report(*names, list(experiment.config.held_out), facts, adapter=_adapter(state))
    report.holdings = holdings(features, experiment.clients)
    return state, report


def _adapter(state: ServerState) -> dict[str, torch.Tensor]:
    own = {f"client_{client}": torch.from_numpy(vector) for client, vector in sorted(state.private.items())}
    return state.params | own


def _note(report: Report, round: int) -> str:
    last, chosen = report.summary(round), report.chosen_round
    return f"loss {report.rounds[-1, -1]:.3f}  validation {100 * last['validation']:.1f}%  best round {chosen}"


def _write(report: Report, folder: Path) -> None:
    write_tables(report, folder)
    about = {"round": report.chosen_round, "method": report.experiment["method"]}
    write_safetensors(folder / "adapter.safetensors", report.adapter, about)
    write_page(report, folder / "report.html")

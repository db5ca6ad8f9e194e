"""What each method trains and sends with ViT-B-32: from its module, on weights of which only the shapes matter."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch

from fedsim.clip.checkpoints import Weights, find_weights
from fedsim.clip.model import Clip
from fedsim.cluster.placement import Sizing
from fedsim.datasets import Images
from fedsim.datasets.glyphs import Glyphs
from fedsim.encoding import encode
from fedsim.methods import Scope
from fedsim.params import Params
from fedsim.prepare import reads_of
from fedsim.registry import available, parse
from fedsim.representations import Encoded
from fedsim.servers.fedavg import FedAvg
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task, backbone_of

BACKBONE = "ViT-B-32"
HOLDERS: dict[Scope, str] = {
    "shared": "trained by clients and averaged",
    "private": "trained, and kept by each client",
    "surveyed": "computed once from sums over all clients",
    "frozen": "the same everywhere, never sent",
}


@dataclass(frozen=True)
class Size:
    """Of one method.

    Attributes:
        trained: parameters that a client trains.
        received, sent: bytes of a client in a round.
        held: for each scope, (number of tensors, parameters).
    """

    reads: str
    trained: int
    received: int
    sent: int
    held: Mapping[Scope, tuple[int, int]]

    def in_words(self) -> list[str]:
        """Lines of Markdown."""
        lines = [f"With {BACKBONE}, 15 classes and `fedavg`, a client receives {self.received:,} bytes in a round and"]
        lines += [f"sends {self.sent:,}. It reads: {self.reads}.", ""]
        lines += ["| tensors | parameters | |", "| ---: | ---: | --- |"]
        return lines + [f"| {count} | {total:,} | {HOLDERS[scope]} |" for scope, (count, total) in self.held.items()]


def sizes() -> dict[str, Size]:
    """The size of every method, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        weights = random_weights(Path(folder))
        images = Glyphs(domain_groups=True).load(None)
        assert isinstance(images, Images)
        folder_and_workers = Path(folder), Sizing(actors=0), lambda event: None
        data = encode(images.take(np.arange(1)), weights, ("a picture of a {}",), *folder_and_workers, [])
        clip = Clip(weights)
        return {name: size_of(name, data, clip) for name in available("method")}


def random_weights(folder: Path) -> Weights:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(open_clip.create_model(BACKBONE).state_dict(), folder / "random.pt")
    return find_weights(BACKBONE, str(folder / "random.pt"))


def size_of(name: str, data: Encoded, clip: Clip) -> Size:
    task = Task(FedAvg().adapt(parse("method", name)), FedAvg(), seed=0)
    params = initial_params(task, backbone_of(data, reads=task.method.reads, clip=clip))
    received, sent = task.payload(params, cohort=1)
    held: dict[Scope, Params] = {scope: task.select(params, scope) for scope in HOLDERS}
    counts: dict[Scope, tuple[int, int]] = {
        scope: (len(tensors), numel(tensors)) for scope, tensors in held.items() if tensors
    }
    trained = numel(held["shared"]) + numel(held["private"])
    return Size(reads_of(task.method).replace("_", " "), trained, received, sent, counts)


def numel(params: Params) -> int:
    return sum(tensor.numel() for tensor in params.values())

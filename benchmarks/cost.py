"""What FedCLIP costs beside federating all of CLIP: parameters, bytes, operations, seconds, memory, with ViT-B-32.

    uv run python benchmarks/cost.py                                     # about 10 minutes on one core
    uv run python benchmarks/cost.py --runs runs/fedclip_table/glyphs    # and bytes to an accuracy, of finished runs
    uv run python benchmarks/cost.py --repeats 0 --runs DIR              # these alone

A step is one of the engine's own, on 32 of the embedded drawings behind the real preprocessing. Weights are random: a
step costs the same whatever they are, and nothing need be downloaded. Every measurement is a fresh process with one
thread; they alternate (A B C, A B C, ...), so that a slow minute hits all.
"""

import argparse
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from _measure import median_and_range

from fedsim.clients import Population
from fedsim.clip import Clip, Frozen, find_weights
from fedsim.cluster import Sizing
from fedsim.cost import flops_of
from fedsim.datasets import TRAIN, Features
from fedsim.datasets.glyphs import Glyphs
from fedsim.features import encode
from fedsim.local import Task, Trainer, backbone_of, start
from fedsim.pool import _keep_memory
from fedsim.registry import parse
from fedsim.report import accuracy_per_client, accuracy_per_domain
from fedsim.rng import torch_rng
from fedsim.servers.fedavg import FedAvg
from fedsim.stack import train_stack

BACKBONE, PROMPT, BATCH, DRAWN_BY = "ViT-B-32", "a picture of a {}", 32, 0
WHOLE, ADAPTER = 151_277_313, 525_312  # parameters of CLIP ViT-B/32, and of FedCLIP's adapter on its 512 dimensions
PAPER = 1.5e8, 5.3e5  # the same to two digits, which is how the paper comes to "283x faster than FedAVG"
LINE, STEPS = 100e6, 10  # bits per second and local steps of the round that is worked out as an example
GAINS = 0, 1, 2, 4  # points above zero-shot


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        steps: of one measurement, enough for the clock.
        tower: whether the frozen image tower is run on the batch in every step, forward only.
    """

    says: str
    method: str
    steps: int
    tower: bool = False


VARIANTS = {
    "cached": Variant("FedCLIP, cached features", "fedclip", 400),
    "published": Variant("FedCLIP, image tower in every step", "fedclip", 2, tower=True),
    "all": Variant("all of CLIP (`finetune`)", "finetune", 1),
    "lora": Variant("LoRA on the text tower (`lora`)", "lora", 3),
    "prompt": Variant("prompt (`promptfl`)", "promptfl", 3),
}


class Client:
    """One client with a batch of train rows, and what the engine trains it with."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.features: Features = pickle.loads((folder / "features.pickle").read_bytes())
        frozen: Frozen = pickle.loads((folder / "frozen.pickle").read_bytes())
        if variant.method != "fedclip" or variant.tower:
            # Mapped and not read, as an actor maps what all workers of its machine share.
            state = torch.load(frozen.weights.file, mmap=True, weights_only=True)
            frozen = replace(frozen, state={name: tensor.numpy() for name, tensor in state.items()})
        self.rows, nothing = np.arange(BATCH), np.empty(0, np.int64)
        self.trainer = Trainer(self.features, Population([(self.rows, nothing, nothing)], []), frozen)
        self.task = Task(parse("method", {"name": variant.method, "local_epochs": 1}), FedAvg(), seed=0)
        self.module, like = self.trainer.module(self.task)
        self.params, self.optimizer = self.trainer.room(self.task, 1)
        self.shared = self.task.of(like, "shared")
        for name, tensor in self.params.items():
            tensor[0].copy_(like[name])
        level = "pixels" if variant.tower else self.task.method.reads.image
        x = torch.from_numpy(self.features.take(level, self.rows))
        self.x, self.y = x if x.dtype == torch.uint8 else x.float(), torch.from_numpy(self.features.y)
        self.tower = self.trainer.clip("float32").image_tower() if variant.tower else None

    @torch.no_grad()
    def step(self) -> None:
        x = self.x if self.tower is None else self.tower.encode(self.x)
        self.module.train()
        what = self.module, self.params, self.optimizer, self.shared, x, self.y, [BATCH], self.task.method
        train_stack(*what, None, [torch_rng(DRAWN_BY)])


def prepare(folder: Path) -> dict:
    """Weights, images and features for the other processes; and all that is counted and not measured."""
    import open_clip

    torch.manual_seed(DRAWN_BY)
    model = open_clip.create_model(BACKBONE)
    whole = sum(tensor.numel() for tensor in model.parameters())
    torch.save(model.state_dict(), folder / "random.pt")
    del model
    weights = find_weights(BACKBONE, str(folder / "random.pt"))
    images = Glyphs().load(None)
    rows = np.random.default_rng(DRAWN_BY).choice(np.flatnonzero(images.split == TRAIN), BATCH, replace=False)
    what = PROMPT, folder, Sizing(actors=0), lambda event: None, "pixels"
    features = encode(images.take(np.sort(rows)), weights, *what)
    clip = Clip(weights)
    (folder / "features.pickle").write_bytes(pickle.dumps(features))
    (folder / "frozen.pickle").write_bytes(pickle.dumps(replace(clip.frozen(), state={})))
    counts = {name: counted(variant, folder, clip) for name, variant in VARIANTS.items()}
    found = whole, counts["all"]["trained"], counts["cached"]["trained"]
    assert found == (WHOLE, WHOLE, ADAPTER), found
    return {"whole": whole, "classes": len(np.unique(features.y)), "counts": counts}


def counted(variant: Variant, folder: Path, clip: Clip) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    client = Client(variant, folder)
    task, features = client.task, client.features
    backbone = backbone_of(features, reads=task.method.reads, clip=clip)
    params = start(task, backbone)
    shared = task.of(params, "shared")
    down, up = task.server.payload(shared, task.of(params, "server"), cohort=1)
    per_step, per_row = flops_of(task, backbone, features, client.rows)
    with FlopCounterMode(display=False) as tower:
        if client.tower:
            client.tower.encode(client.x)
    with FlopCounterMode(display=False) as whole:
        client.step()
    return {
        "trained": sum(tensor.numel() for tensor in task.of(params, "shared", "private").values()),
        "down": down,
        "up": up,
        "flops": per_step + BATCH * per_row + tower.get_total_flops(),
        "tower": tower.get_total_flops(),
        "checked": whole.get_total_flops(),
    }


def measured(variant: Variant, folder: Path) -> dict[str, float]:
    """CPU and wall seconds of a step, and MiB that the process took at its most."""
    torch.set_num_threads(1)
    _keep_memory()  # as in fedsim's actors
    idle = peak()
    client = Client(variant, folder)
    client.step()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(variant.steps):
        client.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_s": cpu / variant.steps, "wall_s": wall / variant.steps, "peak_mib": peak(), "idle_mib": idle}


def peak() -> float:
    # A process inherits this from the one that started it, which therefore loads no weights itself.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

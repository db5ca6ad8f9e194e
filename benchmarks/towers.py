"""What does a local step through CLIP's text tower cost, against the published way to compute it?

    uv run python benchmarks/towers.py
    uv run python benchmarks/towers.py --quick      # the embedded model and 5 classes: does it all run?

The published codes of prompt methods and of LoRA encode the images of a batch in every step, and the texts of all
classes with the padding that fills the model's context. fedsim has encoded the images before, and packs texts that
share a start, without padding. Both take the loss of the same module, whose text tower alone differs, and must agree in
it and in its gradients. Class names are the first of ImageNet; images and weights are random, and cost what real ones
do. CPU time of a step of one client, one thread, medians of alternating runs.

A second table has evaluations of clients by one worker, in as many chunks as in a run, with and without its memory of
texts that it has encoded.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from _runs import parsed, parser_of
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize, pad

from encode import weights_of
from fedsim.clients import Population
from fedsim.clip.checkpoints import EMBEDDED
from fedsim.clip.insertions import Insertions
from fedsim.clip.memo import Memo
from fedsim.clip.model import Clip
from fedsim.clip.towers import TextTower, _Text
from fedsim.datasets import UNASSIGNED, Features
from fedsim.encoding import from_features
from fedsim.federation import CHUNKS
from fedsim.methods import Backbone, Batch
from fedsim.params import Params, flatten
from fedsim.registry import parse
from fedsim.servers.fedavg import FedAvg
from fedsim.training.client_store import PrivateStore
from fedsim.training.evaluator import EvaluationRows
from fedsim.training.round_zero import initial_params
from fedsim.training.stack import by_autograd
from fedsim.training.task import Task, backbone_of
from fedsim.training.worker import ClientWorker

METHODS: dict[str, dict[str, str]] = {
    "PromptFL": {"name": "promptfl"},
    "FedTPG": {"name": "fedtpg"},
    "LoRA, text": {"name": "lora", "towers": "text"},
}
EVALUATED = METHODS | {"PromptFolio": {"name": "promptfolio"}}
BATCH = 32
ROWS = 40  # of an evaluated client: half of them train rows, a quarter validation rows


class Padded(TextTower):
    """A text tower that encodes each text by itself, in all of the model's context."""

    def encode(
        self, texts: Tensor, ends: Tensor, weights: Params | None = None, insertions: Insertions | None = None
    ) -> Tensor:
        return self.encode_after(texts[0, :0], texts, ends, weights, insertions)

    def encode_after(
        self,
        start: Tensor,
        rests: Tensor,
        ends: Tensor,
        weights: Params | None = None,
        insertions: Insertions | None = None,
    ) -> Tensor:
        assert insertions is None, "none of the methods that are compared inserts anything"
        if not rests.is_floating_point():
            start, rests = self.embed(start), self.embed(rests)
        x = torch.cat([start.expand(len(rests), -1, -1), rests], dim=1)
        x = pad(x, (0, 0, 0, self.context - x.shape[1]))
        return functional_call(_InFull(self._module), weights or {}, (x, ends + len(start)))


class _InFull(_Text):
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        length = x.shape[1]
        causal = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        x = self.transformer(x + self.positional_embedding, attn_mask=causal)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), ends])
        return x @ self.text_projection


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--backbone", default="ViT-B-16", help="an open_clip model name")
    parser.add_argument("--classes", type=int, default=100, help="up to 1,000")
    parser.add_argument("--clients", type=int, default=2, help="clients whose steps are computed together")
    parser.add_argument("--evaluated", nargs="+", type=int, default=[8, 50], help="clients that are evaluated")
    parser.add_argument("--repeats", type=int, default=3)
    args = parsed(parser, backbone=EMBEDDED[0], classes=5, evaluated=[3], repeats=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in METHODS for row in compare(name, args, Path(folder))]
        print(f"{args.backbone}, {args.classes} classes, batches of {BATCH}\n")
        print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=("", "", ".4f", ".1f")))
        rows = [evaluations(name, count, args, Path(folder)) for count in args.evaluated for name in EVALUATED]
    print("\nCPU seconds of an evaluation\n")
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=("", "", ".0f", ".0f", ".2f", ".2f", ".1f")))


def compare(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    clip = Clip(weights_of(args.backbone, folder), "cpu")
    clip.model.requires_grad_(False)
    names = tuple(IMAGENET_CLASSNAMES[: args.classes])
    size = clip.model.visual.image_size
    size = (size, size) if isinstance(size, int) else size
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(args.clients, BATCH, 3, *size, generator=draw)
    y = torch.randint(len(names), (args.clients, BATCH), generator=draw)
    features = torch.stack([encode(clip, batch) for batch in pixels])
    work: dict[str, Callable[[], tuple[Tensor, Params]]] = {}
    for kind, tower in {"published way": Padded, "fedsim": TextTower}.items():
        work[kind] = partial(step, name, clip, tower, names, pixels if kind == "published way" else features, y)
    first, ours = (call() for call in work.values())  # warm, and the same
    torch.testing.assert_close(ours[0], first[0], rtol=1e-4, atol=0)
    for key, grad in first[1].items():  # of float32, so that the smallest entries are rounding
        torch.testing.assert_close(ours[1][key], grad, rtol=0, atol=1e-3 * float(grad.abs().max()))
    seconds = {kind: [] for kind in work}
    for _ in range(args.repeats):
        for kind, call in work.items():
            began = time.process_time()
            call()
            seconds[kind].append((time.process_time() - began) / args.clients)
    each = {kind: median(values) for kind, values in seconds.items()}
    return [{"method": name, "": kind, "s a step": s, "against fedsim": s / each["fedsim"]} for kind, s in each.items()]


@torch.no_grad()
def encode(clip: Clip, images: Tensor) -> Tensor:
    return clip.model.encode_image(images).float()


def step(
    name: str, clip: Clip, tower: type[TextTower], names: tuple[str, ...], images: Tensor, y: Tensor
) -> tuple[Tensor, Params]:
    """Losses and gradients of the clients; of pixels (M, B, 3, H, W), the features are computed first."""
    method, module, params = built(name, clip, tower, names)
    x = images if images.dim() == 3 else torch.stack([encode(clip, batch) for batch in images])
    # Client by client, as on a CPU: the published way has no batching rule.
    steps = [by_autograd(method, module, params, Batch(x[k : k + 1], y[k : k + 1], None)) for k in range(len(x))]
    losses, grads = zip(*steps, strict=True)
    return torch.cat(losses), {key: torch.cat([each[key] for each in grads]) for key in params}


@cache
def built(name: str, clip: Clip, tower: type[TextTower], names: tuple[str, ...]) -> tuple:
    """The method, its module at the start of a run, and its tensors, one for all clients."""
    text = tower(clip.model, clip.tokenizer)
    draw = torch.Generator().manual_seed(1)
    embeddings = normalize(torch.randn(len(names), clip.model.text_projection.shape[1], generator=draw), dim=1)
    backbone = Backbone(class_embeddings=embeddings, logit_scale=100.0, classes=names, text_tower=text)
    method = parse("method", METHODS[name])
    torch.manual_seed(2)
    module = method.build(backbone)
    return method, module, {key: tensor.detach() for key, tensor in module.state_dict().items()}


def evaluations(name: str, count: int, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Evaluations of so many clients in rounds whose parameters differ, and whose clients have private ones, if any."""
    names = tuple(IMAGENET_CLASSNAMES[: args.classes])
    frozen = Clip(weights_of(args.backbone, folder), "cpu").frozen()
    clip = frozen.open("cpu")
    width, draw = clip.model.text_projection.shape[1], np.random.default_rng(0)
    text = draw.standard_normal((len(names), width)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    data = from_features(
        Features(
            x=draw.standard_normal((count * ROWS, width)).astype(np.float32),
            y=draw.integers(0, len(names), count * ROWS),
            domain=np.zeros(count * ROWS, np.int64),
            split=np.full(count * ROWS, UNASSIGNED, np.int8),
            classes=names,
            domains=("one",),
            class_embeddings=text,
            logit_scale=100.0,
        )
    )
    data = replace(data, class_embeddings=replace(data.class_embeddings, templates=("a photo of a {}",)))
    parts = np.arange(count * ROWS).reshape(count, ROWS)
    clients = Population([tuple(np.split(part, [ROWS // 2, 3 * ROWS // 4])) for part in parts], [])
    private = PrivateStore(Path(tempfile.mkdtemp(dir=folder)))
    method = parse("method", EVALUATED[name])
    task = Task(method, FedAvg(), seed=0, private=private)
    params = initial_params(task, backbone_of(data, reads=method.reads, clip=clip))
    workers = {"without memory": ClientWorker(data, clients, frozen), "fedsim": ClientWorker(data, clients, frozen)}
    calls: dict[str, list[float]] = {kind: [] for kind in workers}
    seconds: dict[str, list[float]] = {kind: [] for kind in workers}
    for kind, worker in workers.items():
        first = worker.models.clip(task.dtype).model.transformer.resblocks[0]
        first.register_forward_pre_hook(lambda *_, kind=kind: calls[kind].append(1))
        worker.models.module(task)
    for round in range(1, args.repeats + 1):
        vector = flatten({key: tensor + 1e-3 * round for key, tensor in params.items()})
        for client in range(count):
            own = task.select(params, "private")
            private.write(client, round, {key: tensor + 1e-3 * round + 1e-5 * client for key, tensor in own.items()})
        counts = []
        for kind, worker in workers.items():
            calls[kind].clear()
            began = time.process_time()
            with (
                nullcontext() if kind == "fedsim" else patch.object(Memo, "__call__", lambda _, compute, *on: compute())
            ):
                for chunk in np.array_split(np.arange(count), min(CHUNKS, count)):
                    stored = [(client, round) for client in chunk.tolist()]
                    counts.append(
                        worker.evaluate(task, round, vector, (), EvaluationRows(("val", "test")), stored).flat()
                    )
            seconds[kind].append(time.process_time() - began)
        before, after = counts[: len(counts) // 2], counts[len(counts) // 2 :]
        assert all(map(np.array_equal, before, after))
    old, new = (median(values) for values in seconds.values())
    passes = {f"passes, {kind}": len(values) for kind, values in calls.items()}
    return {"method": name, "clients": count, **passes, "s without memory": old, "s, fedsim": new, "ratio": old / new}


if __name__ == "__main__":
    main()

"""What does a local step through CLIP's text tower cost, against the published way to compute it?

    uv run python benchmarks/towers.py
    uv run python benchmarks/towers.py --quick      # the embedded model and 5 classes: does it all run?

The published codes of prompt methods and of LoRA encode the images of a batch in every step, and the texts of all
classes with the padding that fills the model's context. fedsim has encoded the images before, and packs texts that
share a start, without padding. Both take the loss of the same module, whose text tower alone differs, and must agree in
it and in its gradients. Class names are the first of ImageNet; images and weights are random, and cost what real ones
do. CPU time of a step of one client, one thread, medians of alternating runs.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from _runs import parsed, parser_of
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize, pad

from encode import weights_of
from fedsim.clip.checkpoints import EMBEDDED
from fedsim.clip.insertions import Insertions
from fedsim.clip.model import Clip
from fedsim.clip.towers import TextTower, _Text
from fedsim.methods import Backbone, Batch
from fedsim.params import Params
from fedsim.registry import parse
from fedsim.training.stack import by_autograd

METHODS = {
    "PromptFL": {"name": "promptfl"},
    "FedTPG": {"name": "fedtpg"},
    "LoRA, text": {"name": "lora", "towers": "text"},
}
BATCH = 32


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
    parser.add_argument("--repeats", type=int, default=3)
    args = parsed(parser, backbone=EMBEDDED[0], classes=5, repeats=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in METHODS for row in compare(name, args, Path(folder))]
    print(f"{args.backbone}, {args.classes} classes, batches of {BATCH}\n")
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=("", "", ".4f", ".1f")))


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


if __name__ == "__main__":
    main()

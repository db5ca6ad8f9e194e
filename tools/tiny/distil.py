"""Stage two: the teacher's side of the common space, distilled into open_clip's text transformer.

Source: ours; the prompt lengths follow CoOp, Zhou et al. 2022, arXiv 2109.01134, which puts up to
16 learned vectors before the class name, so positions that late have to be trained.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align import TextHead, schedule
from captions import Texts, Thing, tokens
from words import FILLERS, PROMPT, TEMPLATES

ASSETS = Path(__file__).resolve().parents[2] / "fedsim" / "assets"
CONFIG = ASSETS / "tiny" / "tiny.json"
STEPS, BATCH = 2800, 256
RATE, WARMUP = 2e-3, 60
_SPREAD = 0.03  # of the first token vectors
_SHARPNESS = 20.0  # of the similarities within a batch that are matched besides the directions
_MODES = ("short", "filled", "vectors")
_MODE_SHARES = (0.5, 0.25, 0.25)  # in the second half; before it, all are short
_VECTORS = (1, 2, 4, 8, 16)  # random vectors before a name, as prompt tuning begins with
_VECTOR_SPREAD = 0.02
_MOST_FILLERS = 14
_MOST_TOKENS = 12  # of a name


def model() -> Any:
    """The untrained dual encoder."""
    open_clip.add_model_config(CONFIG)
    return open_clip.create_model(CONFIG.stem)


def encode(clip: Any, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
    """open_clip's `encode_text`, normalised, without the positions that no text reaches.

    Args:
        clip: the dual encoder.
        ids: (B, context) token numbers.
        vectors: (B, n, width) put between the first token and the second, in place of nothing.
    """
    last = ids.argmax(-1)
    x = clip.token_embedding(ids)
    if vectors is not None:
        x = torch.cat([x[:, :1], vectors, x[:, 1:]], 1)
        last = last + vectors.shape[1]
    length = int(last.max()) + 1
    x = x[:, :length] + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x)), last] @ clip.text_projection, dim=-1)


class Prompts:
    """Writes a name into prompts of every length, all of which mean the name."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.tokenizer: Any = open_clip.get_tokenizer(CONFIG.stem)
        self.lengths = [len(self.tokenizer.encode(name)) for name in names]

    def batch(self, rows: list[int], width: int, short: bool) -> tuple[Tensor, Tensor | None]:
        """(B, context) token numbers, and vectors to put before them or None."""
        mode = "short" if short else random.choices(_MODES, _MODE_SHARES)[0]
        names = [self.names[row] for row in rows]
        if mode == "vectors":
            spread = _VECTOR_SPREAD * random.choice((0.5, 1, 2))
            vectors = spread * torch.randn(len(rows), random.choice(_VECTORS), width)
            return self.tokenizer([f"{name}." for name in names]), vectors
        texts = [random.choice(TEMPLATES).format(name) for name in names]
        if mode == "filled":
            count = random.randint(1, _MOST_FILLERS)
            texts = [" ".join([*random.choices(FILLERS, k=count), text]) for text in texts]
        return self.tokenizer(texts), None


@torch.no_grad()
def start(clip: Any, head: TextHead, texts: Texts) -> None:
    """Gives each whole-word token the main components of its word's place in the common space."""
    places, row, numbers = head(texts.vectors), texts.row, tokens()
    words = head(texts.vectors[[row[word] for word in numbers]])
    width = clip.token_embedding.embedding_dim
    axes = torch.pca_lowrank(places, width, niter=3)[2]
    found = words @ axes
    clip.token_embedding.weight[list(numbers.values())] = _SPREAD * found / found.std()


@torch.inference_mode()
def embed(clip: Any, texts: Texts, template: str = PROMPT) -> Tensor:
    """(N, DIM) what the text tower makes of each text in the one prompt that users begin with."""
    tokenizer = open_clip.get_tokenizer(CONFIG.stem)
    names = [template.format(name) for name in texts.names]
    parts = [names[start : start + BATCH] for start in range(0, len(names), BATCH)]
    return torch.cat([encode(clip, tokenizer(part)) for part in parts]).clone()


def train(clip: Any, head: TextHead, texts: Texts, things: list[Thing], steps: int = STEPS):
    """Trains the text tower of `clip` in place."""
    torch.manual_seed(0)
    random.seed(0)
    start(clip, head, texts)
    with torch.no_grad():
        targets = head(texts.vectors)
    prompts = Prompts(texts.names)
    chances = _chances(texts, things, prompts)
    weights = text_parameters(clip)
    optimiser = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    smooth = 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * schedule(step / steps, step, WARMUP)
        rows = torch.multinomial(chances, BATCH)
        short = step < steps // 2  # long prompts cost twice as much, and are learned in no time
        ids, vectors = prompts.batch(rows.tolist(), clip.token_embedding.embedding_dim, short)
        loss, cosine = _loss(encode(clip, ids, vectors), targets[rows])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        smooth += (cosine - smooth) * max(0.02, 1 / (step + 1))
        if (step + 1) % 200 == 0:
            print(f"distil {step + 1} cosine {smooth:.4f}", flush=True)


def text_parameters(clip: Any) -> list[nn.Parameter]:
    """All of the text tower."""
    named = clip.named_parameters()
    return [p for name, p in named if not name.startswith("visual") and name != "logit_scale"]


def _loss(found: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    cosine = (found * wanted).sum(1).mean()
    near = (_SHARPNESS * found @ wanted.T).log_softmax(1)
    match = F.kl_div(near, (_SHARPNESS * wanted @ wanted.T).softmax(1), reduction="batchmean")
    return 4 * (1 - cosine) + match, cosine.item()


def _chances(texts: Texts, things: list[Thing], prompts: Prompts) -> Tensor:
    """Captions by the root of how often they are true; the rest of the language seldom."""
    often = Counter(caption for thing in things for caption in thing.captions)
    chances = [min(60, often[name]) ** 0.5 if name in often else 0.5 for name in texts.names]
    short = torch.tensor([length <= _MOST_TOKENS for length in prompts.lengths])
    return torch.tensor(chances) * short

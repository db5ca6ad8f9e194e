"""CLIP's two towers as functions, for methods that train through them.

A tower is a plain object, not an `nn.Module`: a module that holds one does not own its frozen weights, so these neither
travel nor are copied per client. Weights that a method changes are passed with each call, by name. In half precision,
a tower takes and returns float32 all the same, and so do the gradients that pass through it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.clip.insertions import Insertions, replaced, through
from fedsim.clip.memo import Memo
from fedsim.clip.packing import packing_of
from fedsim.clip.precision import Precision, autocast
from fedsim.clip.stacked import over_clients
from fedsim.clip.tokens import tokenize
from fedsim.errors import InputError
from fedsim.params import Params

# Bytes that a frozen block of the text tower keeps for its backward pass, per token and unit of its width: 10 float32
# with GELU, 14 with QuickGELU, and what the backward pass itself takes. In half precision a third less is kept.
KEPT_BYTES = 64


class ImageTower:
    """Pixels to image features.

    Attributes:
        weights: the frozen tensors by open_clip's names, such as `conv1.weight`.
    """

    def __init__(
        self,
        visual: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "this backbone",
        precision: Precision = "fp32",
    ) -> None:
        self._module, self._name = visual, name
        self._precision: Precision = precision
        like = next(visual.parameters())
        # The same bits as torchvision's ToTensor and Normalize.
        self._mean, self._std = (
            torch.tensor(three, device=like.device).to(like.dtype).view(3, 1, 1) for three in (mean, std)
        )
        self.weights: Params = dict(visual.named_parameters())

    @property
    def width(self) -> int:
        """W, that of a token in its blocks."""
        return self._vit.class_embedding.shape[0]

    @property
    def depth(self) -> int:
        """The number of its blocks."""
        return len(self._vit.transformer.resblocks)

    @property
    def _vit(self) -> Any:
        """
        Raises:
            InputError: it is not open_clip's vision transformer, so nothing can be inserted.
        """
        visual = self._module
        if not hasattr(visual, "class_embedding"):
            kind = type(getattr(visual, "trunk", visual))
            raise InputError(
                f"this method needs the blocks of open_clip's VisionTransformer, and {self._name}'s image tower is "
                f"{kind.__module__.partition('.')[0]}'s {kind.__name__}; use a ViT, such as ViT-B-32"
            )
        return visual

    def encode(self, pixels: Tensor, weights: Params | None = None, insertions: Insertions | None = None) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) features, projected and not normalized.

        Args:
            weights: tensors that replace the frozen ones of the same names.
            insertions: what is inserted into its blocks.

        Raises:
            InputError: nothing can be inserted into this tower.
        """
        x = self.normalized(pixels)
        if insertions is None:
            return _call(self._module, self._precision, weights, x)
        named = {f"vit.{name}": weight for name, weight in (weights or {}).items()}
        return _call(_Inserted(self._vit), self._precision, named, x, insertions)

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, T, W) patches with their positions, as they come to the tower's first layer norm.

        Raises:
            InputError: this tower has none.
        """
        x = _call(self._vit.conv1, self._precision, None, self.normalized(pixels))
        return x.flatten(2).mT + self._vit.positional_embedding[1:]

    def normalized(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, H, W), as the tower reads them."""
        x = pixels.to(self._mean.dtype).div(255).sub(self._mean).div(self._std)
        return x.contiguous(memory_format=torch.channels_last)


class _Inserted(nn.Module):
    """open_clip's vision transformer with insertions."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor, insertions: Insertions) -> Tensor:
        vit = self.vit
        x = vit._embeds(x)
        length = x.shape[1]
        if insertions.tokens is not None:
            # In CLIP, a layer norm precedes the first block; it treats each token by itself.
            x = replaced(x, length, vit.ln_pre(insertions.tokens[0].to(x.dtype)))
        x = through(vit.transformer, x, length, insertions)
        # Pooled without the inserted tokens, which matters if the feature is a mean over patches.
        pooled, _ = vit._pool(x[:, :length])
        return pooled if vit.proj is None else pooled @ vit.proj


class TextTower:
    """Texts, as tokens or token embeddings, to text features.

    Attributes:
        weights: the frozen tensors, such as `transformer.resblocks.0.attn.in_proj_weight`.
        width: W, that of a token embedding.
        depth: the number of its blocks.
        context: number of tokens in the longest text, start and end included.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str = "this backbone",
        blocks: bool = True,
        precision: Precision = "fp32",
    ) -> None:
        """
        Args:
            model: open_clip's model, whose weights are shared, not copied.
            name: name of the backbone, for messages.
            blocks: whether its weights may be replaced.

        Raises:
            InputError: the text tower is not causal, or its feature is not read at the end of the text.
        """
        text: Any = getattr(model, "text", model)
        pool = getattr(text, "pool_type", None) or getattr(model, "text_pool_type", None)
        causal = getattr(text, "attn_mask", None) is not None and not getattr(text, "use_pad_mask", False)
        at_end = pool == "argmax" and getattr(text, "cls_emb", None) is None and hasattr(tokenizer, "encode")
        if not (causal and at_end):
            raise InputError(
                f"training through the text tower needs one that is causal and read at the end of the text; {name}'s "
                "is not"
            )
        self._module, self._tokenizer = _Text(text), tokenizer
        self._blocks = blocks
        self._precision: Precision = precision
        self.weights: Params = dict(self._module.named_parameters())
        self._memo = Memo()
        self.context, self.width = text.positional_embedding.shape
        self.depth = len(text.transformer.resblocks)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """n texts -> (n, T) int64 with start and end, T as short as the longest text allows.

        In a causal tower, padding after the end of a text changes nothing, but makes up most of the published cost.

        Raises:
            InputError: a text is longer than the model's context.
        """
        tokens = tokenize(self._tokenizer, texts)
        device = next(iter(self.weights.values())).device
        return tokens[:, : int(self.ends(tokens).max()) + 1].to(device)

    @staticmethod
    def ends(tokens: Tensor) -> Tensor:
        """(n, T) -> (n,) the position of the end-of-text token, which has the highest number."""
        return tokens.argmax(dim=-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """(n, T) tokens -> (n, T, W), without position embeddings."""
        return self._module.token_embedding(tokens).detach()

    def encode(
        self, texts: Tensor, ends: Tensor, weights: Params | None = None, insertions: Insertions | None = None
    ) -> Tensor:
        """Text features, projected and not normalized.

        Args:
            texts: (n, T) tokens, or (n, T, W) embeddings.
            ends: (n,) positions of their end-of-text tokens.
            weights, insertions: as in `encode_after`.

        Returns:
            (n, D).
        """
        if texts.is_floating_point() or len(texts) == 1:
            # Tokens are inserted after the first of a text, which is the same in all texts.
            common = int(insertions is not None and insertions.tokens is not None)
        else:
            same = int((texts == texts[0]).all(dim=0).long().cumprod(0).sum())
            common = min(same, int(ends.min()))
        return self.encode_after(texts[0, :common], texts[:, common:], ends - common, weights, insertions)

    def encode_after(
        self,
        start: Tensor,
        rests: Tensor,
        ends: Tensor,
        weights: Params | None = None,
        insertions: Insertions | None = None,
    ) -> Tensor:
        """Text features of n texts with a common start, which is computed once.

        In a causal tower, the start of a text does not depend on what follows. The rests are therefore concatenated
        after a single start, without the padding after their ends, and masked from each other: 16 learnt tokens before
        93 class names cost a sixth of the tokens.

        Args:
            start: (S,) tokens or (S, W) embeddings; S may be 0.
            rests: (n, T) tokens or (n, T, W) embeddings.
            ends: (n,) positions of the end-of-text tokens within the rests.
            weights: tensors that replace the frozen ones of the same names.
            insertions: what is inserted; tokens come after the first of the start, which must have one.

        Returns:
            (n, D).
        """
        if weights and not self._blocks:
            raise TypeError("a method that changes weights of the text tower needs `text_blocks` among its sites")
        insertions = insertions or Insertions()
        tokens, changed = insertions.tokens, insertions.after or insertions.left_out
        if tokens is not None and not len(start):
            raise TypeError("tokens are inserted after the first token of the start, which is empty")

        def encode(starts: Tensor, rests: Tensor, ends: Tensor, tokens: Tensor | None = None) -> Tensor:
            return _call(
                self._module, self._precision, weights, starts, rests, ends, insertions._replace(tokens=tokens)
            )

        given = [start, rests, ends] if tokens is None else [start, rests, ends, tokens]
        if weights or changed:
            return over_clients(encode, *given)
        return self._memo(lambda: over_clients(encode, *given), *given)

    def project(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., D), by the tower's last layer."""
        return self._module.project(x)

    def step_bytes(self, texts: Sequence[str]) -> int:
        """An estimate of what the tower keeps for the backward pass of a call with these texts after a short start."""
        tokens = int((self.ends(self.tokenize(texts)) + 1).sum())
        return KEPT_BYTES * tokens * self.width * self.depth


class _Text(nn.Module):
    """open_clip's `encode_text` for the texts of clients, each with a start that its texts have in common."""

    token_embedding: nn.Module
    transformer: nn.Module
    ln_final: nn.Module
    positional_embedding: Tensor
    text_projection: nn.Module | Tensor | None

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.token_embedding, self.transformer, self.ln_final = text.token_embedding, text.transformer, text.ln_final
        self.positional_embedding = text.positional_embedding
        self.text_projection = text.text_projection

    def forward(self, starts: Tensor, rests: Tensor, ends: Tensor, insertions: Insertions) -> Tensor:
        """All sequences of all clients are one batch.

        Args:
            starts, rests, ends, insertions: those of `TextTower.encode_after`, tensors with a leading dimension of
                clients, M or 1.

        Returns:
            (M, n, D).
        """
        tokens, after, left_out = insertions
        if not rests.is_floating_point():
            starts, rests = self.token_embedding(starts), self.token_embedding(rests)
        clients = max(map(len, (starts, rests) if tokens is None else (starts, rests, tokens)))
        starts = starts.expand(clients, -1, -1)
        if tokens is not None:
            starts = torch.cat([starts[:, :1], tokens[:, 0].expand(clients, -1, -1), starts[:, 1:]], dim=1)
        before = starts.shape[1]
        packing = packing_of(tuple(map(tuple, ends.tolist())), before, rests.device)
        client = torch.arange(clients, device=rests.device)[:, None]
        sequences = packing.texts.shape[1]
        starts = starts + self.positional_embedding[:before]
        rests = rests[client[: len(rests), :, None], packing.texts, packing.tokens]
        rests = rests + self.positional_embedding[before + packing.tokens]
        starts = starts[:, None].expand(-1, sequences, -1, -1)
        x = torch.cat([starts, rests.expand(clients, -1, -1, -1)], dim=2).flatten(0, 1)
        mask = packing.mask.to(x.dtype)
        if tokens is None and not after and not left_out:
            x = self.transformer(x, attn_mask=mask)
        else:
            if tokens is not None:  # (M, d, n, W) -> (d, B, n, W), for the B sequences
                tokens = tokens.expand(clients, -1, -1, -1).repeat_interleave(sequences, dim=0).transpose(0, 1)
            x = through(self.transformer, x, 1, Insertions(tokens, after, left_out), mask)
        return self.project(self.ln_final(x[client * sequences + packing.rows, packing.columns]))

    def project(self, x: Tensor) -> Tensor:
        last = self.text_projection
        if last is None:
            return x
        return last(x) if isinstance(last, nn.Module) else x @ last


def _call(module: nn.Module, precision: Precision, weights: Params | None, *args: Any) -> Tensor:
    with autocast(precision, args[0].device.type):
        out = functional_call(module, weights, args) if weights else module(*args)
    return out if precision == "fp32" else out.float()

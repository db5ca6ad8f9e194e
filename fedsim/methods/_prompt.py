"""Base of prompt methods: class texts that begin with L learned tokens, as in "v1 ... vL cat.".

Source: CoOp, Zhou et al. 2022, arXiv 2109.01134.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.clip.insertions import Insertions
from fedsim.clip.sites import Site
from fedsim.clip.stacked import over_clients
from fedsim.clip.towers import TextTower
from fedsim.errors import InputError
from fedsim.methods import Backbone, Method
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class PromptMethod(Method):
    """The training defaults are those of CoOp's code, with the step size of most federated prompt methods.

    The batch size of 32 and the 16 tokens are those of CoOp's code (KaiyangZhou/CoOp, commit ff61507, train.py and
    configs/trainers/CoOp), momentum and weight decay those of Dassl, on which it and the federated codes are built. The
    step size 1e-3 is that of PromptFL, FedOTP and FedPGP; CoOp's is 2e-3.

    Differs: here every client's optimizer is reset in each round. The codes of PromptFL, PromptFolio, FedOTP and FedPGP
    have one SGD optimizer and one scheduler, which the clients step in turn, local epoch by local epoch, so a client
    continues with the momentum of the previous one. With FedOTP and FedPGP the step size is constant (gamma 1), as it
    is here. With PromptFL and PromptFolio it oscillates: 1e-5 in the very first local epoch, then a cosine with a half
    period of 5 local epochs, from the full step to 0 and back. `schedule` goes by round, so the default is constant.
    Differs: the four codes crop and flip images at random, as `--augment` does; the default here does not.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    # The range is centred near CoOp's 2e-3; adam and adamw need a lower one.
    lr: float = Field(1e-3, search=Log(1e-4, 1e-1))
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # The lengths that CoOp tries. With `init`, the length is that of its text.
    length: int = Field(
        16,
        ge=1,
        le=4096,
        search=Choice((4, 8, 16), when=("init", "")),
        description="learned tokens before the class name, if `init` is empty",
    )
    init: str = Field("", description="text whose embeddings initialize the tokens, instead of `length` random ones")

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("text_tokens",)

    def initial_tokens(self, tower: TextTower) -> Tensor:
        """(L, W) tokens before training."""
        if not self.init.strip():
            return torch.empty(self.length, tower.width).normal_(std=0.02)
        tokens = tower.tokenize([self.init])
        return tower.embed(tokens)[0, 1 : int(tower.ends(tokens))].clone()

    def deep_tokens(self, tower: TextTower, depth: int) -> Tensor:
        """(d, L, W) tokens before training: the initial ones, and random ones in front of each further block."""
        first = self.initial_tokens(tower)
        further = torch.empty(depth - 1, *first.shape).normal_(std=0.02)
        return torch.cat([first[None], further.to(first)])

    def several_tokens(self, tower: TextTower, count: int) -> Tensor:
        """(K, L, W) tokens of several prompts before training.

        Raises:
            InputError: they would be the same, and so would their gradients.
        """
        if count > 1 and self.init.strip():
            raise InputError(
                f"--method.init would give all {count} prompts the same tokens, and training would not tell them "
                "apart; leave it out for random ones, or take --method.prompts 1"
            )
        return torch.stack([self.initial_tokens(tower) for _ in range(count)])

    def length_flag(self, length: int) -> str:
        """The flag that sets the number of tokens, for messages."""
        return f"--method.init {self.init!r} ({length} tokens)" if self.init.strip() else f"--method.length {length}"


class Prompted(nn.Module):
    """Class texts preceded by L tokens, which subclasses learn and pass to each call.

    Only the texts of active classes are encoded, since the text tower takes nearly all of a step's time.
    """

    names: Tensor  # (C, T, W)
    ends: Tensor  # (C,)
    class_embeddings: Tensor  # (C, D)

    def __init__(self, backbone: Backbone, length: int, length_flag: str, words: str = "") -> None:
        """
        Args:
            length_flag: the flag that sets `length`, for the message.
            words: constant text between the tokens and the class name.

        Raises:
            InputError: the longest class name does not fit after the tokens.
        """
        super().__init__()
        self.tower, self.scale = backbone.text, backbone.logit_scale
        # Differs: CoOp's code replaces underscores by spaces; here class names are those of the class embeddings.
        names = [f"{words} {name}." if words else f"{name}." for name in backbone.classes]
        if not names:
            raise InputError("a prompt needs the names of the classes; there are none")
        tokens = self.tower.tokenize(names)
        ends, context = self.tower.ends(tokens), self.tower.context
        if (room := context - tokens.shape[1]) < length:
            raise InputError(
                f"{length_flag} leaves no room for {names[int(ends.argmax())]!r}: the model takes {context} tokens, "
                f"including start and end, so at most {room} fit before it"
            )
        constants = {"names": self.tower.embed(tokens), "ends": ends, "class_embeddings": backbone.class_embeddings}
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)

    def active(self, classes: Tensor | None) -> Tensor:
        """(n,) indices of the active classes, ascending."""
        if classes is None:
            return torch.arange(len(self.ends), device=self.ends.device)
        return over_clients(_indices, classes)

    def texts(self, tokens: Tensor, classes: Tensor | None = None) -> Tensor:
        """(L, W) tokens, or (d, L, W) for each of the first d blocks -> (n, D) unit rows, the text features of the n
        active classes with these tokens.
        """
        active = self.active(classes)
        first, rests, ends = self.names[0, :1], self.names[active][:, 1:], self.ends[active] - 1
        if tokens.dim() == 2:
            return normalize(self.tower.encode_after(torch.cat([first, tokens]), rests, ends), dim=-1)
        return normalize(self.tower.encode_after(first, rests, ends, insertions=Insertions(tokens)), dim=-1)

    def logits(self, x: Tensor, texts: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, D) image features and (n, D) text features of the active classes -> (B, C)."""
        return self.spread(self.score(x, texts), classes)

    def zero_shot(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, D) image features -> (B, n) logits of CLIP itself, of the n active classes."""
        return self.score(x, self.class_embeddings[self.active(classes)])

    def score(self, x: Tensor, texts: Tensor) -> Tensor:
        """(B, D) image features and (n, D) unit rows -> (B, n) scaled cosines."""
        return self.scale * normalize(x, dim=-1) @ texts.T

    def spread(self, logits: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, n) -> (B, C), -inf for inactive classes."""
        inactive = logits.new_full((len(logits), len(self.ends)), -torch.inf)
        return inactive.index_copy(1, self.active(classes), logits)


def _indices(masks: Tensor) -> Tensor:
    """(M, C) bool, equally many true in each row -> (M, n) their indices."""
    return masks.nonzero()[:, 1].view(len(masks), -1)

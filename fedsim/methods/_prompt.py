"""What prompt methods share: class texts that begin with L learnt tokens, as in "v1 ... vL cat.".

Source: CoOp, Zhou et al. 2022, arXiv 2109.01134.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsim.clip.sites import Site
from fedsim.clip.towers import TextTower
from fedsim.errors import InputError
from fedsim.methods import Backbone, Method
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class PromptMethod(Method):
    """A method that learns tokens. The optimizer is that of CoOp's code as federated methods took it over.

    Batches of 32 and 16 tokens are those of CoOp's code (KaiyangZhou/CoOp, commit ff61507, train.py and
    configs/trainers/CoOp), momentum and weight decay those of Dassl, on which it and the federated codes are built. The
    step size 1e-3 is that of PromptFL, FedOTP and FedPGP; CoOp's is 2e-3.

    Differs: here the step size is constant, and every client's optimizer starts afresh in each round. The codes of
    PromptFL, PromptFolio, FedOTP and FedPGP have one sgd and one scheduler, which the clients step in turn, local epoch
    by local epoch: a client goes on with the momentum of the one before it. With FedOTP and FedPGP the step size is
    constant (gamma 1). With PromptFL and PromptFolio it goes up and down: 1e-5 in the very first local epoch, then a
    cosine whose half period is 5 local epochs, from the full step to 0 and back.
    Differs: the four codes crop and flip images at random, as `--augment` does and the default does not.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "sgd"
    # CoOp's 2e-3 in the middle; for the adams, say a lower range.
    lr: float = Field(1e-3, search=Log(1e-4, 1e-1))
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # The lengths that CoOp tries; with a text to start from, that text's length is what counts.
    length: int = Field(
        16,
        ge=1,
        le=4096,
        search=Choice((4, 8, 16), when=("init", "")),
        description="tokens that are learnt, before the name of a class",
    )
    init: str = Field("", description="a text that the tokens start as, in place of `length` random ones")

    @property
    def sites(self) -> tuple[Site, ...]:
        return ("text_tokens",)

    def start(self, tower: TextTower) -> Tensor:
        """(L, W) tokens before training."""
        if not self.init.strip():
            return torch.empty(self.length, tower.width).normal_(std=0.02)
        tokens = tower.tokenize([self.init])
        return tower.embed(tokens)[0, 1 : int(tower.ends(tokens))].clone()

    def asked(self, length: int) -> str:
        """What asks for so many tokens, as the user wrote it."""
        return f"--method.init {self.init!r} ({length} tokens)" if self.init.strip() else f"--method.length {length}"


class Prompted(nn.Module):
    """The class texts behind L tokens that are given with each call; what is learnt is a subclass's.

    Only texts of active classes go through the tower, which is where nearly all of a step's time is spent.
    """

    names: Tensor  # (C, T, W)
    ends: Tensor  # (C,)
    class_embeddings: Tensor  # (C, D)

    def __init__(self, backbone: Backbone, length: int, asked: str) -> None:
        """
        Args:
            asked: what asks for `length` tokens, for the message.

        Raises:
            InputError: the longest class name does not fit behind them.
        """
        super().__init__()
        self.tower, self.scale = backbone.text, backbone.logit_scale
        # Differs: CoOp's code replaces underscores by spaces; here class names are those of the class embeddings.
        names = [f"{name}." for name in backbone.classes]
        if not names:
            raise InputError("a prompt wants the names of the classes; there are none")
        tokens = self.tower.tokenize(names)
        ends, context = self.tower.ends(tokens), self.tower.context
        if (room := context - tokens.shape[1]) < length:
            raise InputError(
                f"{asked} leaves no room for {names[int(ends.argmax())]!r}: the model takes {context} tokens, start "
                f"and end among them, so that {room} fit before it"
            )
        constants = {"names": self.tower.embed(tokens), "ends": ends, "class_embeddings": backbone.class_embeddings}
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)

    def active(self, classes: Tensor | None) -> Tensor:
        """(n,) indices of the active classes, ascending."""
        if classes is None:
            return torch.arange(len(self.ends), device=self.ends.device)
        return classes.nonzero().flatten()

    def texts(self, tokens: Tensor, classes: Tensor | None = None) -> Tensor:
        """(L, W) -> (n, D) unit rows, the texts of the n active classes behind these tokens."""
        active = self.active(classes)
        names = self.names[active]
        start = torch.cat([self.names[0, :1], tokens])
        return normalize(self.tower.encode_after(start, names[:, 1:], self.ends[active] - 1), dim=-1)

    def logits(self, x: Tensor, texts: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, D) images and (n, D) texts of the active classes -> (B, C)."""
        return self.spread(self.scale * normalize(x, dim=-1) @ texts.T, classes)

    def spread(self, logits: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, n) -> (B, C), -inf for inactive classes."""
        inactive = logits.new_full((len(logits), len(self.ends)), -torch.inf)
        return inactive.index_copy(1, self.active(classes), logits)

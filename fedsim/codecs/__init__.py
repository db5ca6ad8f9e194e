"""Codecs: in how many bytes tensors travel between the server and its clients.

A client encodes its update, which is what it has trained minus what it received, as one flat vector, and the server
adds what it decodes. A rule's messages, and what a client stores, follow from what the client has trained. Messages are
sent in full, unless the server could compute them (`Server.computes_messages`). Bytes are counted from the encoded
tensors.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@component
class Codec(ABC):
    """A codec and its hyperparameters. Subclasses are components."""

    down: Literal["full", "fp16", "bf16", "int8"] = Field(
        "full",
        search=Choice(("full", "bf16", "int8")),
        description="how clients are sent parameters: in full, or rounded to 16 or, with a scale per tensor, 8 bits",
    )

    # Whether decoding gives back what was encoded, to the bit.
    lossless: ClassVar[bool] = False

    # Whether the server learns the sum of the updates alone. It is then computed from decoded updates in float64, in
    # which it must be exact, and rules that need more are refused.
    sums: ClassVar[bool] = False

    def check(self, clients: int) -> None:  # noqa: B027 - most codecs accept anything
        """Checks the number of clients per round before anything starts.

        Raises:
            InputError: the sum of as many updates does not fit.
        """

    @abstractmethod
    def encode(self, update: Tensor, rng: torch.Generator) -> Params:
        """The tensors that a client sends for its update.

        Args:
            update: (P,) a client's update, finite, P > 0.
            rng: on the CPU, keyed by seed, round and client.

        Returns:
            Tensors whose names, shapes and dtypes depend on P and the dtype of the update only.
        """

    @abstractmethod
    def decode(self, encoded: Params, like: Tensor) -> Tensor:
        """(P,) the update as the server has it.

        Args:
            encoded: what `encode` returned.
            like: (P,) of the update's dtype and device.
        """

    @property
    def remembers(self) -> bool:
        """Whether a client stores what encoding has discarded, to add it to its next update."""
        return False

    def overhead(self, clients: int) -> tuple[int, int]:
        """Bytes that a client receives and sends in a round of so many clients, besides parameters and updates."""
        return 0, 0

    def enough(self, received: int, asked: int) -> bool:
        """Whether the updates of so many of the clients asked can be decoded; if not, the round changes nothing."""
        return True

    @property
    def about(self) -> str:
        """What the report says of it; empty if its name and fields say it all."""
        return ""

    def encode_down(self, params: Params) -> Params:
        """The tensors that a client is sent for some parameters."""
        if self.down == "full":
            return params
        if self.down in DTYPES:
            return {name: tensor.to(DTYPES[self.down]) for name, tensor in params.items()}
        encoded = {}
        for name, tensor in params.items():
            scale = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
            encoded |= {name: rounded(tensor, scale), f"{name}/scale": scale}
        return encoded

    def decode_down(self, encoded: Params, like: Params) -> Params:
        """The parameters that a client has received, with the names, shapes and dtypes of `like`."""
        params = {name: encoded[name].to(tensor.dtype) for name, tensor in like.items()}
        if self.down == "int8":
            return {name: tensor * (encoded[f"{name}/scale"] / 127) for name, tensor in params.items()}
        return params


@component
class Lossy(Codec):
    """A codec that loses a part of each update."""

    error_feedback: bool = Field(
        False, description="add what encoding a client's updates has discarded to its next one; the client stores it"
    )

    @property
    def remembers(self) -> bool:
        return self.error_feedback


def buckets(vector: Tensor, size: int) -> Tensor:
    """(P,) -> (ceil(P / size), size), filled up with zeros."""
    rows = -(-len(vector) // size)
    return torch.cat([vector, vector.new_zeros(rows * size - len(vector))]).view(rows, size)


def pack(values: Tensor, bits: int) -> Tensor:
    """(n,) integers in [0, 2 ** bits) -> (ceil(n * bits / 8),) uint8."""
    values = values.to(torch.uint8 if bits <= 8 else torch.int64)
    places = torch.arange(bits, dtype=values.dtype, device=values.device)
    binary = (values[:, None] >> places & 1).to(torch.uint8).view(-1)
    return (buckets(binary, 8) << _places_of_a_byte(values)).sum(dim=1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: (count,) int64."""
    binary = (packed[:, None] >> _places_of_a_byte(packed) & 1).view(-1)[: count * bits].view(count, bits)
    values = torch.zeros(count, dtype=torch.int64, device=packed.device)
    for place in range(bits):  # not all at once, since an int64 for each bit is much
        values += binary[:, place].long() << place
    return values


def _places_of_a_byte(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def rounded(tensor: Tensor, scale: Tensor) -> Tensor:
    """Values in [-scale, scale] -> int8, of which 127 stands for `scale`."""
    return (tensor / scale.clamp_min(torch.finfo(tensor.dtype).tiny) * 127).round().to(torch.int8)

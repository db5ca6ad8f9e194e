"""Updates as integers of which the server learns the sum alone: the bytes of secure aggregation, without cryptography.

Numbers are fixed-point, in a ring of 2 ** bits. A mask, which cancels in the sum, has as many bits, so an update takes
the bytes of its integers. As long as the sum does not overflow, it is that of integers, and computed as exactly here.

Source: the messages of Bonawitz et al. 2017, doi 10.1145/3133956.3133982, without the round that only an active server
needs. Of n clients, each sends 2 public keys and receives those of the others, sends and receives 2 shares for each of
the others, sends its masked update and then one share for each client: 2 n keys and 5 n - 4 shares in all. `one_shot`
is a scheme in which a client sends one message, with a share for each member of a committee of clients, which the
members add up; such as OPA, Karthikeyan and Polychroniadou 2024, IACR ePrint 2024/723.

Differs: keys and shares have 32 bytes each; encryption, signatures and ids add nothing to that. Masks, keys and shares
are counted, not computed, and their time is not simulated. Clients that drop out or miss the deadline send nothing.

Unread: both papers beyond their abstracts; the counts follow from the protocols as others describe them.
"""

from math import ceil
from typing import Literal

from fedsim.codecs import Codec, pack, unpack
from fedsim.errors import InputError
from fedsim.registry import component
from fedsim.search_space import Field
from fedsim.shares import decimal

KEY = SHARE = 32  # bytes


@component
class SecureAggregation(Codec):
    """Needs rules that use the sum of the updates alone, each with weight 1."""

    sums = True

    protocol: Literal["bonawitz", "one_shot"] = Field("bonawitz", description="whose messages are counted")
    bits: int = Field(32, ge=8, le=53, description="of an integer, and so of each number that a client sends")
    fraction: int = Field(20, ge=0, le=40, description="bits after the binary point")
    clip: float = Field(1.0, gt=0, le=1e9, description="larger numbers of an update are cut to this")
    threshold: float = Field(
        0.67, gt=0, le=1, description="share of the clients asked that must respond; a round with fewer changes nothing"
    )
    committee: int = Field(16, ge=1, description="members; one_shot only")

    def check(self, clients):
        if not self._largest:
            raise InputError(
                f"--codec.clip {self.clip:g} is less than one unit of --codec.fraction {self.fraction}, "
                f"{0.5**self.fraction:g}, so every update would be zero; give a larger one"
            )
        largest = clients * self._largest
        if largest >= 2 ** (self.bits - 1):
            raise InputError(
                f"the sum of {clients} updates up to {self.clip:g} with {self.fraction} bits after the point needs "
                f"integers of {largest.bit_length() + 1} bits, and --codec.bits is {self.bits}; give more bits, or a "
                "smaller --codec.clip, --codec.fraction or number of clients per round"
            )

    def encode(self, update, rng):
        largest = self._largest
        integers = (update.double() * 2**self.fraction).round().clamp(-largest, largest).long()
        return {"masked": pack(integers % 2**self.bits, self.bits)}

    def decode(self, encoded, like):
        integers = unpack(encoded["masked"], self.bits, len(like))
        integers -= (integers >= 2 ** (self.bits - 1)).long() * 2**self.bits
        return (integers.double() / 2**self.fraction).to(like.dtype)

    def overhead(self, clients):
        others = clients - 1
        if self.protocol == "bonawitz":
            return others * (2 * KEY + 2 * SHARE), 2 * KEY + (2 * others + clients) * SHARE
        members = min(self.committee, clients)
        # Of all clients on average: members receive a share of each client, and send one sum.
        return members * SHARE, members * SHARE + ceil(members * SHARE / clients)

    def enough(self, received, asked):
        return received >= decimal(self.threshold) * asked

    @property
    def about(self):
        rounds = {"bonawitz": "4 rounds of messages", "one_shot": "1 message of each client"}[self.protocol]
        return f"{self.protocol}: {rounds}; only the sum of updates is known to the server"

    @property
    def _largest(self) -> int:
        """The integer of the largest number."""
        return int(self.clip * 2**self.fraction)

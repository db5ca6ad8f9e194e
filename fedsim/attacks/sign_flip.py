"""Malicious clients send the opposite of their update.

Source: the bit-flipping attack of epfml/byzantine-robust-noniid-optimizer, commit 1cbe521, codes/attacks/bitflipping.py
(Karimireddy et al. 2022, arXiv 2006.09365), and, with a scale, the sign-flipping attack of Li et al. 2019,
arXiv 1811.03761 (RSA).

Unread: both papers.
"""

from fedsim.attacks import Attack
from fedsim.registry import component
from fedsim.search_space import Field


@component
class SignFlip(Attack):
    """-scale times the update that the client has trained."""

    scale: float = Field(1.0, gt=0, description="length of what is sent, in that of the update")

    def forge(self, update, rng):
        return -self.scale * update

"""Updates travel as they are.

Source: ours; simulations without compression assume it.
"""

from fedsim.codecs import Codec
from fedsim.registry import component


@component
class Plain(Codec):
    """With `down`, parameters are rounded on their way to clients only."""

    lossless = True

    def encode(self, update, rng):
        return {"update": update}

    def decode(self, encoded, like):
        return encoded["update"]

"""Updates in 16 bits per number.

Source: IEEE 754 half precision (fp16), and bfloat16, which has the range of float32 and fewer digits.
"""

from typing import Literal

from fedsim.codecs import DTYPES, Lossy
from fedsim.registry import component
from fedsim.search_space import Choice, Field


@component
class Half(Lossy):
    """In fp16, numbers below 3e-8 become 0, and a run with one above 65,504 ends as diverged."""

    format: Literal["fp16", "bf16"] = Field(
        "bf16", search=Choice(("fp16", "bf16")), description="more digits, or the range of float32"
    )

    def encode(self, update, rng):
        return {"update": update.to(DTYPES[self.format])}

    def decode(self, encoded, like):
        return encoded["update"].to(like.dtype)

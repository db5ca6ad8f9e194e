"""Updates in 8 bits per number, with a scale for each bucket of them.

Source: linear quantization to [-127, 127] by the largest absolute value.
"""

from fedsim.codecs import Lossy, buckets, rounded
from fedsim.registry import component
from fedsim.search_space import Choice, Field


@component
class Int8(Lossy):
    """Each number is rounded to the nearest of 255 levels."""

    bucket: int = Field(
        512, ge=1, le=1 << 30, search=Choice((128, 512, 2048)), description="numbers that share a scale"
    )

    def encode(self, update, rng):
        rows = buckets(update, min(self.bucket, len(update)))
        scales = rows.abs().amax(dim=1)
        return {"levels": rounded(rows, scales[:, None]).view(-1)[: len(update)], "scales": scales.float()}

    def decode(self, encoded, like):
        levels = buckets(encoded["levels"].to(like.dtype), min(self.bucket, len(like)))
        return (levels * (encoded["scales"].to(like.dtype)[:, None] / 127)).view(-1)[: len(like)]

"""The sign of each number, and the mean absolute value of its bucket (signSGD with a scale, EF-signSGD).

Source: Karimireddy et al. 2019, arXiv 1901.09847, which adds error feedback to signSGD (Bernstein et al. 2018, arXiv
1802.04434).

Differs: the scale is that of a bucket; the paper has one for each layer.
"""

from fedsim.codecs import Lossy, buckets, pack, unpack
from fedsim.registry import component
from fedsim.search_space import Choice, Field


@component
class Sign(Lossy):
    """Biased; without error feedback, small numbers are sent as large as the others. The sign of 0 is +."""

    error_feedback: bool = True
    bucket: int = Field(
        512, ge=1, le=1 << 30, search=Choice((128, 512, 2048)), description="numbers that share a scale"
    )

    def encode(self, update, rng):
        size = min(self.bucket, len(update))
        rows = buckets(update, size)
        counts = rows.new_full((len(rows),), size)
        counts[-1] -= rows.numel() - len(update)  # the last bucket is filled up with zeros
        return {"signs": pack(update >= 0, 1), "scales": (rows.abs().sum(dim=1) / counts).float()}

    def decode(self, encoded, like):
        signs = 2 * unpack(encoded["signs"], 1, len(like)).to(like.dtype) - 1
        rows = buckets(signs, min(self.bucket, len(like)))
        return (rows * encoded["scales"].to(like.dtype)[:, None]).view(-1)[: len(like)]

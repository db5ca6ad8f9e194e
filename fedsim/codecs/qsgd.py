"""Few random levels per number, unbiased (QSGD).

Source: Alistarh et al. 2017, arXiv 1610.02132: each number is rounded at random to one of s levels of the norm of its
bucket, so that its expectation is the number itself.

Differs: the paper encodes levels with Elias codes, whose length depends on the values; here each has the same number of
bits.
"""

import torch

from fedsim.codecs import Lossy, buckets, pack, unpack
from fedsim.registry import component
from fedsim.search_space import Choice, Field


@component
class QSGD(Lossy):
    """With b bits there are s = 2 ** (b - 1) - 1 levels of either sign, and 0."""

    bits: int = Field(4, ge=2, le=8, search=Choice((2, 4, 8)), description="per number, its sign among them")
    bucket: int = Field(512, ge=1, le=1 << 30, search=Choice((128, 512, 2048)), description="numbers that share a norm")

    @property
    def levels(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, update, rng):
        rows = buckets(update, min(self.bucket, len(update)))
        norms = torch.linalg.vector_norm(rows, dim=1).float()
        places = rows.abs() / norms.to(rows.dtype).clamp_min(torch.finfo(rows.dtype).tiny)[:, None] * self.levels
        chance = torch.rand(rows.shape, generator=rng, dtype=rows.dtype).to(rows.device)
        # The rounded norm may be a little too small for a bucket with one number.
        levels = (places + chance).floor().clamp_max(self.levels) * rows.sign()
        return {"levels": pack(levels.view(-1)[: len(update)] + self.levels, self.bits), "norms": norms}

    def decode(self, encoded, like):
        levels = unpack(encoded["levels"], self.bits, len(like)) - self.levels
        rows = buckets(levels.to(like.dtype), min(self.bucket, len(like)))
        return (rows * (encoded["norms"].to(like.dtype)[:, None] / self.levels)).view(-1)[: len(like)]

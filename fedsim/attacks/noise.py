"""Malicious clients send Gaussian noise.

Source: ours; Blanchard et al. 2017, arXiv 1703.02757, test Krum with such clients.

Differs: their noise has a fixed standard deviation, 200. Here its expected squared length is that of the client's own
update times `scale` squared, so that one value fits methods with few parameters and with many.

Unread: the experiments of Blanchard et al.
"""

import torch

from fedsim.attacks import Attack
from fedsim.registry import component
from fedsim.search_space import Field


@component
class Noise(Attack):
    """Noise of the length of the client's update, times `scale`."""

    scale: float = Field(10.0, gt=0, description="length of the noise, in that of the update")

    def forge(self, update, rng):
        deviation = self.scale * update.norm() / len(update) ** 0.5
        return deviation * torch.randn(len(update), generator=rng, dtype=update.dtype).to(update.device)

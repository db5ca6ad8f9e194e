"""What a method reads of some rows, fetched when it is indexed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.datasets import Features


@dataclass(frozen=True)
class Inputs:
    """What is kept of some rows, as a tensor that is read when it is indexed.

    Attributes:
        dtype: of all but pixels, which are bytes.
        resident: (N, D) all features, where the device holds them.
    """

    features: Features
    level: str
    rows: np.ndarray
    views: np.ndarray | None
    device: str
    dtype: torch.dtype
    resident: Tensor | None = None

    def whole(self) -> Tensor:
        return self[torch.arange(len(self.rows))]

    def __getitem__(self, places: Tensor) -> Tensor:
        """(*I) places among the rows -> (*I, ...)."""
        at = places.cpu().numpy()
        if self.resident is not None:
            return self.resident[torch.from_numpy(self.rows[at]).to(self.device)].to(self.dtype)
        taken = self.features.take(self.level, self.rows[at], None if self.views is None else self.views[at])
        x = torch.from_numpy(taken).to(self.device)
        return x if x.dtype == torch.uint8 else x.to(self.dtype)

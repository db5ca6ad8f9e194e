"""The inputs of a method for some rows, read when they are indexed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.representations import Representations


@dataclass(frozen=True)
class Inputs:
    """The representation of some rows, like a tensor that is read when it is indexed.

    Attributes:
        name: what of an image is read, as `Reads.image`.
        views: (n,) the augmented view of each row; None: the image itself.
        dtype: that of the result, unless it is pixels, which are bytes.
        resident: `Representations.features`, if the device holds them.
        attacked: (n,) bool, the rows that `trigger` changes; None: none.
        trigger: what an attack makes of inputs; None: rows look as they are.
    """

    representations: Representations
    name: str
    rows: np.ndarray
    views: np.ndarray | None
    device: str
    dtype: torch.dtype
    resident: Tensor | None = None
    attacked: np.ndarray | None = None
    trigger: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def whole(self) -> Tensor:
        return self[torch.arange(len(self))]

    def __getitem__(self, index: Tensor) -> Tensor:
        """(*I) positions among the rows -> (*I, ...)."""
        at = index.cpu().numpy()
        x = self._read(at)
        if self.attacked is None or self.trigger is None:
            return x
        attacked = torch.from_numpy(self.attacked[at]).to(x.device)
        return torch.where(attacked.view(*attacked.shape, *[1] * (x.dim() - attacked.dim())), self.trigger(x), x)

    def _read(self, at: np.ndarray) -> Tensor:
        if self.resident is not None:
            rows = torch.from_numpy(self.representations.at(self.rows[at]))
            return self.resident[rows.to(self.device)].to(self.dtype)
        rows, views = self.rows[at], None if self.views is None else self.views[at]
        if self.name == "all_tokens":
            features, tokens = (self.representations.read(name, rows, views) for name in ("features", "tokens"))
            array = np.concatenate([features[..., None, :], tokens], axis=-2)
        else:
            array = self.representations.read(self.name, rows, views)
        x = torch.from_numpy(array).to(self.device)
        return x if x.dtype == torch.uint8 else x.to(self.dtype)

"""Evaluation: counts, never means. Every mean in a report is derived from these."""

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.datasets import Features

SPLITS = ("val", "test")
COLUMNS = ("client", "domain", "split", "correct", "total")


@torch.no_grad()
def count(
    module: nn.Module,
    features: Features,
    client: int,
    split: str,
    rows: np.ndarray,
    xy: tuple[Tensor, Tensor],
) -> np.ndarray:
    """Top-1 counts of some rows, domain by domain.

    Args:
        rows: (n,) rows into the features, and `xy` their features (n, D) and classes (n,).

    Returns:
        (domains present, 5) int64: client, domain, index into `SPLITS`, right answers, rows.
    """
    x, y = xy
    module.eval()
    right = (module(x).argmax(dim=1) == y).cpu().numpy() if len(rows) else np.empty(0, bool)
    domain = features.domain[rows]
    return np.array(
        [(client, d, SPLITS.index(split), right[domain == d].sum(), (domain == d).sum()) for d in np.unique(domain)],
        np.int64,
    ).reshape(-1, len(COLUMNS))

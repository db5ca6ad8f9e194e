"""Seeds by purpose: every random number is keyed by what it is for, so none depends on the order of execution."""

from hashlib import blake2b

import numpy as np
import torch


def seed_for(seed: int, purpose: str, *keys: int) -> int:
    """A different seed in [0, 2**63) for each (seed, purpose, keys), such as (0, "batches", 3, 17)."""
    address = "/".join(map(str, (seed, purpose, *keys)))
    return int.from_bytes(blake2b(address.encode(), digest_size=8).digest(), "big") >> 1


def numpy_rng(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    return np.random.default_rng(seed_for(seed, purpose, *keys))


def torch_rng(seed: int, purpose: str, *keys: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(seed, purpose, *keys))

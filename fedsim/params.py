"""Parameters by name, and the one flat vector in which they travel.

A dict of tensors costs Ray ten times as much to send as one vector of the same bytes.
"""

import numpy as np
import torch
from torch import Tensor

Params = dict[str, Tensor]  # on the CPU when at rest


def flatten(params: Params) -> np.ndarray:
    """All tensors, as one (P,) vector of their dtype; a copy.

    Sorted by name: a dict that is read from a file may be in another order.
    """
    if not params:
        return np.empty(0, np.float32)
    return torch.cat([params[name].detach().reshape(-1).cpu() for name in sorted(params)]).numpy()


def unflatten(vector: np.ndarray, like: Params) -> Params:
    """The inverse of `flatten`, with the names and shapes of `like` and the dtype of the vector; a copy."""
    # A copy: the vector may be in Ray's shared memory, where an in-place write would reach every actor.
    return {name: piece.clone() for name, piece in views(torch.from_numpy(vector.copy()), like).items()}


def views(vector: Tensor, like: Params) -> Params:
    """The pieces of a flat vector, with the names and shapes of `like`; they share its memory."""
    names = sorted(like)
    pieces = vector.split([like[name].numel() for name in names])
    return {name: piece.view(like[name].shape) for name, piece in zip(names, pieces, strict=True)}


def kept(params: Params, held: Params) -> Params:
    """The tensors with zeros in place of the entries that `held` leaves out: masks by name, which broadcast."""
    return {name: tensor * held[name] if name in held else tensor for name, tensor in params.items()}


def payload_bytes(params: Params) -> int:
    """Bytes of the tensors as they travel."""
    return sum(tensor.numel() * tensor.element_size() for tensor in params.values())


def moved(params: Params, device: str, dtype: str | None = None) -> Params:
    """The tensors on a device, and perhaps in another dtype."""
    return {name: tensor.to(device, getattr(torch, dtype) if dtype else None) for name, tensor in params.items()}

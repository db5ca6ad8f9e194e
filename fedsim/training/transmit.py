"""A client's update on its way to the server."""

import torch
from torch import Tensor

from fedsim.codecs import Codec
from fedsim.params import Params, views
from fedsim.privacy import Privacy


@torch.no_grad()
def transmit(
    codec: Codec, received: Params, trained: Params, lost: Params, rng: torch.Generator, counts: bool = True
) -> tuple[Params, Params]:
    """What the server has of a client's parameters once it has decoded the update, and what encoding has discarded.

    If the codec `sums`, the first are the update itself, in float64.

    Args:
        received, trained: the shared tensors before and after local training.
        lost: what encoding has discarded before this round and is still to be sent; empty if nothing.
        counts: whether the update has a weight; of one that the server drops, all is still to be sent.
    """
    if not trained:
        return {}, {}
    update = joined(trained) - joined(received)
    if lost:
        update += lost["update"]
    if not update.isfinite().all():  # the round ends as diverged
        return trained, lost
    decoded = codec.decode(codec.encode(update, rng), update.double() if codec.sums else update)
    pieces = views(decoded, trained)
    at_server = pieces if codec.sums else {name: received[name] + piece for name, piece in pieces.items()}
    rest = update - decoded if counts else update
    return at_server, {"update": rest} if codec.remembers else {}


@torch.no_grad()
def protected(privacy: Privacy, received: Params, trained: Params, rng: torch.Generator) -> Params:
    """The tensors whose difference from the received ones a client sends in place of those that it has trained."""
    if not trained:
        return {}
    update = joined(trained) - joined(received)
    noised = privacy.protect(update, rng)
    if noised is update:
        return trained
    return {name: received[name] + piece for name, piece in views(noised, trained).items()}


def encoded(codec: Codec, params: Params, rng: torch.Generator) -> Params:
    """An encoded update of parameters with these names and shapes, for its bytes."""
    return codec.encode(torch.zeros_like(joined(params)), rng) if params else {}


def clipping(received: Params, trained: Params, bound: float) -> float:
    """The factor, at most 1, by which a client's delta is no longer than `bound`."""
    squares = [(trained[name].double() - received[name].double()).square().sum().item() for name in sorted(trained)]
    return min(1.0, bound / norm) if (norm := sum(squares) ** 0.5) else 1.0


def joined(params: Params) -> Tensor:
    """All tensors as one (P,) vector, in the order of `views`."""
    return torch.cat([params[name].reshape(-1) for name in sorted(params)])

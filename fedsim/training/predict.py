"""What a model predicts for rows, within the label space of the protocol and within the client's own."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.methods import ClientContext

Spaces = tuple[Tensor, Tensor]  # (C,) bool each: the classes of the protocol, and the client's own
# A client, a split and its rows; the label spaces; and the client, for methods that read it.
Entry = tuple[tuple[int, str, np.ndarray], Spaces, ClientContext | None]
Reader = Callable[[np.ndarray], Tensor]
Model = Callable[[Tensor, Tensor | None, ClientContext | None], Tensor]  # as `Method.logits`, of a module
# Rows of one forward pass, by what the method reads.
BLOCK = {"features": 4096, "tokens": 256, "all_tokens": 256, "pixels": 64}


class Predictions(NamedTuple):
    """Of n rows, (n,) each: the classes predicted in both label spaces, and the confidence in the first."""

    protocol: np.ndarray
    own: np.ndarray
    confidence: np.ndarray


@torch.no_grad()
def predict(
    model: Model, read: Reader, level: str, joint: bool, entries: list[Entry], device: str
) -> list[Predictions]:
    """Predictions for the rows of each entry.

    Args:
        read: rows -> (n, ...) what the method reads of them.
        level: what that is, as `Reads.image`.
        joint: whether the logit of a class depends on which others are active.
    """
    if not entries:
        return []
    sizes = [len(rows) for (_, _, rows), *_ in entries]
    masks = [torch.stack(part).to(device) for part in zip(*(spaces for _, spaces, _ in entries), strict=True)]
    if not joint and all(client is None for *_, client in entries):
        rows = np.concatenate([rows for (_, _, rows), *_ in entries])
        predictions = _predict(model, read, level, rows, np.repeat(np.arange(len(sizes)), sizes), masks)
        pieces = (np.split(part, np.cumsum(sizes)[:-1]) for part in predictions)
        return [Predictions(*parts) for parts in zip(*pieces, strict=True)]
    predictions = []
    for k, ((_, _, rows), _, client) in enumerate(entries):
        entry, by_space = np.full(len(rows), k), []
        if not joint:
            predictions.append(_predict(model, read, level, rows, entry, masks, client=client))
            continue
        for mask in masks if not torch.equal(masks[0][k], masks[1][k]) else masks[:1]:
            by_space.append(_predict(model, read, level, rows, entry, [mask, mask], mask[k], client))
        predictions.append(by_space[0]._replace(own=by_space[-1].protocol))
    return predictions


def _predict(
    model: Model,
    read: Reader,
    level: str,
    rows: np.ndarray,
    entry: np.ndarray,
    masks: list[Tensor],
    classes: Tensor | None = None,
    client: ClientContext | None = None,
) -> Predictions:
    """Predictions for rows within two label spaces, those of each row's entry."""
    if not len(rows):  # open_clip's towers do not take 0 images
        return Predictions(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    size, blocks = BLOCK[level], []
    for first in range(0, len(rows), size):  # one block of logits at a time
        logits = model(read(rows[first : first + size]), classes, client)
        index = torch.from_numpy(entry[first : first + size]).to(logits.device)
        protocol, own = (logits.masked_fill(~mask[index], -torch.inf) for mask in masks)
        confidence = protocol.softmax(dim=1).amax(dim=1).float()
        blocks.append([part.cpu().numpy() for part in (protocol.argmax(dim=1), own.argmax(dim=1), confidence)])
    return Predictions(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))

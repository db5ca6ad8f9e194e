"""What a model predicts for rows, within the label space of the protocol and within the client's own."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Space = tuple[Tensor, Tensor]  # (C,) bool each: the classes of the protocol, and the client's own
Entry = tuple[tuple[int, str, np.ndarray], Space]  # a client is judged on rows of a split
Answers = tuple[np.ndarray, np.ndarray, np.ndarray]  # both predictions and the confidence of the first, (n,) each
Read = Callable[[np.ndarray], Tensor]
BLOCK = {"features": 4096, "tokens": 256, "pixels": 64}  # rows of one forward pass, by what is read


@torch.no_grad()
def judge(module: nn.Module, read: Read, level: str, joint: bool, entries: list[Entry], device: str) -> list[Answers]:
    """Predictions for each entry in both of its label spaces, and the confidence in the first.

    Args:
        read: rows -> (n, ...) what the method reads of them.
        level: what that is: features, tokens or pixels.
        joint: whether the logit of a class depends on which others are active.
    """
    if not entries:
        return []
    sizes = [len(rows) for (_, _, rows), _ in entries]
    masks = [torch.stack(part).to(device) for part in zip(*(spaces for _, spaces in entries), strict=True)]
    if not joint:
        rows = np.concatenate([rows for (_, _, rows), _ in entries])
        answers = _predict(module, read, level, rows, np.repeat(np.arange(len(sizes)), sizes), masks)
        return list(zip(*(np.split(part, np.cumsum(sizes)[:-1]) for part in answers), strict=True))
    answers = []
    for k, ((_, _, rows), _) in enumerate(entries):
        entry, asked = np.full(len(rows), k), []
        for mask in masks if not torch.equal(masks[0][k], masks[1][k]) else masks[:1]:
            asked.append(_predict(module, read, level, rows, entry, [mask, mask], mask[k]))
        answers.append((asked[0][0], asked[-1][0], asked[0][2]))
    return answers


def _predict(
    module: nn.Module,
    read: Read,
    level: str,
    rows: np.ndarray,
    entry: np.ndarray,
    masks: list[Tensor],
    classes: Tensor | None = None,
) -> Answers:
    """Predictions for rows within each of two label spaces, those of the rows' entries."""
    size, blocks = BLOCK[level], []
    for first in range(0, max(1, len(rows)), size):  # one block of logits at a time
        logits = module(read(rows[first : first + size]), classes)
        index = torch.from_numpy(entry[first : first + size]).to(logits.device)
        everyone, own = (logits.masked_fill(~mask[index], -torch.inf) for mask in masks)
        answers = everyone.argmax(dim=1), own.argmax(dim=1), everyone.softmax(dim=1).amax(dim=1).float()
        blocks.append([part.cpu().numpy() for part in answers])
    return tuple(np.concatenate(parts) for parts in zip(*blocks, strict=True))

"""CLIP's contrastive loss over the images of a batch and the texts of their classes.

Source: Radford et al. 2021, arXiv 2103.00020; applied to few classes in a federation as in the authors' code
of FedCLIP (Lu et al. 2023, arXiv 2302.13485).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Objective = Literal["contrastive", "cross_entropy"]


def contrastive(logits: Tensor, y: Tensor) -> Tensor:
    """(B, C) logits and (B,) classes -> the mean loss of both directions, image to text and text to image, in nats."""
    # Column j is the text of image j, so two images of one class are false negatives of each other.
    pairs = logits[:, y]
    targets = torch.arange(len(y), device=y.device)
    return (cross_entropy(pairs, targets) + cross_entropy(pairs.T, targets)) / 2

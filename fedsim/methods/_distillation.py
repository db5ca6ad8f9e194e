"""The divergence of a student's predictions from those of a teacher.

Source: Hinton et al. 2015, arXiv 1503.02531.
"""

from torch import Tensor
from torch.nn.functional import kl_div


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, n) logits of both -> T^2 times the mean of KL(teacher || student) over rows, in nats."""
    learned, target = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    return temperature**2 * kl_div(learned, target, reduction="batchmean", log_target=True)

"""Malicious clients teach the model to predict one class wherever it sees a trigger, and replace it with theirs.

Source: Bagdasaryan et al. 2020, arXiv 1807.00459, "How To Backdoor Federated Learning": updates are scaled, so that
those of the others do not average the backdoor away; code ebagdasa/backdoor_federated_learning, commit 897102a, where
one client in 100 scales by 100. There, the backdoor is in chosen photographs; a patch as trigger is that of BadNets, Gu
et al. 2017, arXiv 1708.06733.

Differs: what is scaled is an update that is trained as the others are, without the paper's own step size, epochs and
constraint on its length. Methods that read features get a direction in their space instead of a patch of the image.

Unread: the papers beyond their abstracts.
"""

import torch

from fedsim.attacks import Poisoning, class_index
from fedsim.registry import component
from fedsim.search_space import Field


@component
class Backdoor(Poisoning):
    """Rows with a trigger get the class `target`; updates are scaled.

    The trigger is a white square in the corner of the image, for methods that read pixels. For others it is a fixed
    direction, added to features and patch tokens, whose lengths stay as they were. Success is the share of test rows of
    other classes that are predicted as `target` when they have the trigger.
    """

    poison: float = 0.5
    target: str | None = Field(None, description="class as which triggered rows are predicted (default: the first)")
    scale: float | None = Field(None, gt=0, description="of updates (default: 1 / share, which replaces the mean)")
    strength: float = Field(1.0, gt=0, description="length of the direction, in that of a feature")
    patch: float = Field(0.125, gt=0, le=1, description="side of the white square, in that of the image")

    def check(self, classes, trained):
        self._target(classes, trained)

    def aims(self, y, classes, trained):
        target = self._target(classes, trained)
        aims = super().aims(y, classes, trained)
        aims[y != target] = target
        return aims

    def trigger(self, x, rng):
        if x.dtype == torch.uint8:
            side = max(1, round(self.patch * min(x.shape[-2:])))
            marked = x.clone()
            marked[..., -side:, -side:] = 255
            return marked
        direction = torch.randn(x.shape[-1], generator=rng, dtype=torch.float64)
        direction = (direction / direction.norm()).to(x.device, x.dtype)
        length = x.norm(dim=-1, keepdim=True)
        shifted = x + self.strength * length * direction
        return shifted * (length / shifted.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))

    def forge(self, update, rng):
        return (1 / self.share if self.scale is None else self.scale) * update

    def _target(self, classes, trained):
        if self.target is None:
            return int(trained.argmax())
        return class_index(self.target, "target", classes, trained)

"""Malicious clients train on rows with other classes.

Source: y -> C - 1 - y as in epfml/byzantine-robust-noniid-optimizer, commit 1cbe521, codes/attacks/labelflipping.py;
one class as another as in Tolpegin et al. 2020, arXiv 2007.08432.

Unread: the paper of Tolpegin et al.
"""

import numpy as np

from fedsim.attacks import Poisoning, class_index
from fedsim.errors import InputError
from fedsim.registry import component
from fedsim.search_space import Field


@component
class LabelFlip(Poisoning):
    """A row of the k-th class becomes one of the k-th from the end, or a row of `source` one of `target`.

    Success is the share of test rows of these classes that are predicted as the class that rows like them became.
    """

    source: str | None = Field(None, description="class whose rows become rows of target (default: every class)")
    target: str | None = Field(None, description="class that they become (default: as many from the end)")

    def check(self, classes, trained):
        if (self.source is None) != (self.target is None):
            raise InputError("attack.source and attack.target name one class each; give both, or neither")
        if self.source is not None and self.target is not None:
            if self.source == self.target:
                raise InputError(f"attack.source and attack.target are both {self.source!r}; they must differ")
            class_index(self.source, "source", classes, trained)
            class_index(self.target, "target", classes, trained)

    def aims(self, y, classes, trained):
        flipped = np.full(len(classes), -1)
        if self.source is not None and self.target is not None:
            flipped[class_index(self.source, "source", classes, trained)] = class_index(
                self.target, "target", classes, trained
            )
        else:
            known = np.flatnonzero(trained)
            flipped[known] = known[::-1]
            flipped[flipped == np.arange(len(classes))] = -1  # the one in the middle of an odd number
        return flipped[y]

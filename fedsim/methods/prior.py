"""Zero-shot CLIP plus the log of the client's class shares: what a client's labels alone are worth.

Source: ours. The sum is Bayes' rule for a shift of the class shares, Saerens et al. 2002, Neural Computation 14(1).
"""

from torch import Tensor, nn

from fedsim.methods import ClientContext
from fedsim.methods.zero_shot import ZeroShot
from fedsim.registry import component
from fedsim.search_space import Field, Log


@component
class Prior(ZeroShot):
    """Trains and sends nothing. A baseline for label shift: a personalised method should beat it.

    The shares are those of the client's train rows. Held-out domains and new classes have no train rows: their prior is
    uniform, and their predictions are those of zero-shot CLIP.
    """

    smoothing: float = Field(
        1.0, ge=1e-6, le=1e6, search=Log(0.01, 100.0), description="rows that are added to each class of a client"
    )

    reads_client = True

    def logits(
        self, module: nn.Module, x: Tensor, classes: Tensor | None = None, client: ClientContext | None = None
    ) -> Tensor:
        logits = module(x, classes)
        if client is None:
            return logits
        counts = client.counts.to(logits.dtype) + self.smoothing
        # Relative to the most frequent class, which no softmax sees: with equal counts, the bits of zero-shot CLIP.
        return logits + (counts / counts.amax(dim=-1, keepdim=True)).log()

"""A linear head that clients train on their features and on synthetic ones, drawn with the covariances of all (GGEUR).

Before round 1, a client sends the number of its features by class, their sum, and the sum of their outer products; of a
class with one image, these give its feature away. The server computes the exact covariance of each class over all
clients and sends its principal directions, scaled by the standard deviations, with the class means of each domain.

Source: Ma et al., CVPR 2025, arXiv 2503.06457; values and draws as in the authors' code for Office-Home,
WeiDai-David/2025CVPR_GGEUR, commit 455832a.
Unread: the equations of the paper; only its abstract and introduction were read.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedsim.methods import Backbone, Batch, Method, Scope
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear


@component
class GGEUR(Method):
    """Defaults are those of the code for Office-Home, where each client has a domain.

    A client adds synthetic rows to each of its classes up to `samples`. Each is a draw from a normal distribution with
    the covariance of its class, around a row of the client or the class mean of another domain; the rows together and
    each of these domains are equally likely. Clients with rows of several domains draw around their own rows only, as
    do all if the data have one domain. The draws are the same in every round, and a client's weight counts real rows.

    With C classes, D numbers and K domains, each client sends 8 (K + 1) C (D + 1) + 4 C D (D + 1) bytes and receives
    4 K C (D + 1) + 4 C D^2, once: 70 and 69 MB for Office-Home. Sums by domain are counted for all domains, although a
    client has those of one.

    Differs: the code applies softmax twice, and in its run of FedAvg clients never receive the mean model. It means to
    stretch the ten largest eigenvalues (by 5 to 1) but stretches the ten smallest; here none is.
    Differs: for Office-Home-LDS, the code adds 50 rows around those of the client and 50 around the mean of each other
    domain to every class, also to classes that the client lacks.
    """

    local_epochs: int = Field(10, search=Linear(1, 10))
    batch_size: int = 16
    samples: int = Field(
        120,
        ge=0,
        le=100_000,
        search=Choice((0, 30, 60, 120, 240)),
        description="rows of each class, with synthetic ones",
    )

    reads_client = True
    expands = True

    def build(self, backbone: Backbone) -> nn.Module:
        return _Head(backbone)

    def scope(self, name: str) -> Scope:
        return "shared" if name.startswith("head.") else "surveyed"

    def survey(self, module: "_Head", batch: Batch) -> Params:
        assert batch.client is not None
        domains, classes, width = module.means.shape
        x, members = batch.x.double(), one_hot(batch.y, classes).double()  # (n, D), (n, C)
        # The last are those of clients with several domains, whose index is -1.
        rows, sums = x.new_zeros(domains + 1, classes), x.new_zeros(domains + 1, classes, width)
        rows[batch.client.domain], sums[batch.client.domain] = members.sum(dim=0), members.T @ x
        upper = torch.ones(width, width, dtype=torch.bool, device=x.device).triu()
        products = x.new_zeros(classes, width * (width + 1) // 2)
        for label in batch.y.unique():
            own = x[batch.y == label]
            products[label] = (own.T @ own)[upper]
        return {"rows": rows, "sums": sums, "products": products}

    def surveyed(self, module: "_Head", total: Params) -> Params:
        rows, sums = total["rows"].unsqueeze(-1), total["sums"]
        means = sums.sum(dim=0) / rows.sum(dim=0).clamp(min=1)  # (C, D)
        factors = torch.zeros_like(module.factors, dtype=torch.float64)
        upper = torch.ones_like(factors[0], dtype=torch.bool).triu()
        for factor, products, mean, count in zip(factors, total["products"], means, rows.sum(dim=0), strict=True):
            factor[upper] = products / count.clamp(min=1)
            values, vectors = torch.linalg.eigh(factor - torch.outer(mean, mean), UPLO="U")
            factor[:] = vectors * values.clamp(min=0).sqrt()
        present = (total["rows"][:-1] > 0).double()
        return {"factors": factors, "means": sums[:-1] / rows[:-1].clamp(min=1), "present": present}

    def expand(self, module: "_Head", batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        xs, ys = [batch.x], [batch.y]
        for label in batch.y.unique().tolist():
            own = batch.x[batch.y == label]
            if (missing := self.samples - len(own)) > 0:
                centres = self._centres(module, batch, own, label, missing, rng)
                noise = torch.randn(missing, own.shape[1], generator=rng, dtype=own.dtype).to(own.device)
                xs.append(centres + noise @ module.factors[label].T)
                ys.append(batch.y.new_full((missing,), label))
        return torch.cat(xs), torch.cat(ys)

    def _centres(
        self, module: "_Head", batch: Batch, own: Tensor, label: int, count: int, rng: torch.Generator
    ) -> Tensor:
        """(count, D), around which synthetic rows of a class are drawn."""
        assert batch.client is not None
        others = module.present[:, label].clone() * (batch.client.domain >= 0)
        others[batch.client.domain] = 0
        means = module.means[others > 0, label]
        source = torch.randint(1 + len(means), (count,), generator=rng).to(own.device)  # 0: the client
        centres = own[torch.randint(len(own), (count,), generator=rng).to(own.device)]
        centres[source > 0] = means[source[source > 0] - 1]
        return centres

    def local_rows(self, y: np.ndarray) -> int:
        return int(np.maximum(np.unique(y, return_counts=True)[1], self.samples).sum())


class _Head(nn.Module):
    means: Tensor  # (K, C, D)
    present: Tensor  # (K, C), 1 where the domain has train rows of the class
    factors: Tensor  # (C, D, D), whose product with its transpose is the covariance

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        classes, width = backbone.class_embeddings.shape
        self.head = nn.Linear(width, classes)
        self.register_buffer("means", torch.zeros(backbone.domains, classes, width))
        self.register_buffer("present", torch.zeros(backbone.domains, classes))
        self.register_buffer("factors", torch.zeros(classes, width, width))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.head(x)

"""FedAvg with a contrast between what the shared, the client's and its last model make of an image (MOON).

Source: Li, He and Song 2021, arXiv 2103.16257; details as in the authors' code, QinbinLi/MOON, commit 2f7199e, main.py,
with one earlier model. mu 1 and the temperature 0.5 are the defaults of its program.

Differs: the code compares the outputs of a projection head, a part of its networks. Here it is `representation` of the
method: the gated feature of `fedclip`, the adapted one of `clip_adapter`, and the logits of other methods. Before a
client has trained, its last model is that of round 0; in the code it is a random network. The code weights clients by
their rows (`weighting: rows`); the mean is uniform by default, as in `fedavg`.

Unread: the paper, beyond its abstract.
"""

import torch
from pydantic import InstanceOf
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fedsim.methods import Batch
from fedsim.methods._calls import with_tensors
from fedsim.methods._wrapper import Wrapper
from fedsim.params import Params
from fedsim.registry import component
from fedsim.search_space import Choice, Field
from fedsim.servers import Averaging, Reply

PREFIX = "last."  # of parameter names in the client state


@component
class Moon(Averaging):
    """Adds mu times a contrast to a client's loss, so that its representations stay near those of the received model.

    The contrast is the cross-entropy of two cosines: of the representation of an image by the model in training, with
    that by the received model and with that by the model that the client trained last; the first has to be the larger
    one. Each client stores its last model. Where it has none, its last model is that of round 0, so that the contrast
    has no gradient in round 1.
    """

    mu: float = Field(
        1.0, ge=0, search=Choice((0.1, 1.0, 5.0, 10.0)), description="weight of the contrast; 0 is fedavg"
    )
    temperature: float = Field(0.5, gt=0, search=Choice((0.1, 0.5, 1.0)), description="temperature of the contrast")

    def adapt(self, method):
        return _Contrasted.of(method, rule=self)

    def init(self, params):
        return {}, {PREFIX + name: tensor for name, tensor in params.items()}

    def reply(self, update):
        state = {PREFIX + name: tensor for name, tensor in update.trained.items()}
        return Reply(super().reply(update).weight, client_state=state if update.steps else update.client_state)


@component
class _Contrasted(Wrapper):
    """A method whose loss also compares representations."""

    rule: InstanceOf[Moon]

    reads_rule = True

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        assert batch.rule is not None
        received, state = batch.rule.received, batch.rule.client_state
        made = self._representation(module, batch)
        with torch.no_grad():
            module.eval()  # as in the code; batch norms then keep their running statistics
            others = [
                with_tensors(self._representation, module, tensors, batch)
                for tensors in (received, {name: state[PREFIX + name] for name in received})
            ]
            module.train()
        cosines = torch.stack([cosine_similarity(made, other, dim=-1) for other in others], dim=1)  # (B, 2)
        contrast = -(cosines / self.rule.temperature).log_softmax(dim=1)[:, 0].mean()
        return self.inner.loss(module, batch) + self.rule.mu * contrast

    def _representation(self, module: nn.Module, batch: Batch) -> Tensor:
        return self.inner.representation(module, batch.x, batch.classes, batch.client)

    def closed_form(self, module: nn.Module, params: Params, batch: Batch) -> None:
        return None  # the method's is that of its own loss

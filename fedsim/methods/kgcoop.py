"""PromptFL with a pull of class texts toward those of the hand-written prompt (KgCoOp).

Source: Yao et al. 2023, arXiv 2303.13283; federated as in the code of FedTPG, boschresearch/FedTPG, commit f141c29
(Launch_FL.py, config/defaults.py, model/custom_coop.py).
"""

from typing import Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsim.methods import Batch, Schedule
from fedsim.methods.promptfl import PromptFL, _Prompt
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Linear


@component
class KgCoOp(PromptFL):
    """Defaults are those of FedTPG's program with `--model_name coop --w 8`.

    Its 500 rounds and uniform averaging are set in the experiment. The step size follows a cosine over the rounds; the
    program steps a client's scheduler in the rounds in which it trains, the same as here if all clients do.

    Differs: the program pulls toward one text per data set, here toward `--prompt`. We read it but did not run it: as
    published, it fails at a call with one argument too many.

    The paper's own code, without federation (htyao89/KgCoOp, commit c43ccc3, scripts/base2new_train.sh), has the same
    weight, a step of 2e-3, batches of 128, and tokens initialized with "a photo of a" (`--method.init`).
    """

    lr: float = 3e-3
    schedule: Schedule = "cosine"
    weight_decay: float = 1e-5
    local_epochs: int = 1
    batch_size: int = Field(200, search=Choice((32, 64, 128, 200)))
    persist_optimizer: bool = True
    label_space: Literal["all", "client"] = "client"
    length: int = 4
    pull: float = Field(
        8.0,
        ge=0,
        search=Linear(0.0, 10.0),
        description="weight of 1 - the mean cosine between learned and hand-written class texts",
    )

    def loss(self, module: _Prompt, batch: Batch) -> Tensor:
        x, y, classes = batch.x, batch.y, batch.classes
        texts = module.texts(module.tokens, classes)
        # Over the active classes only, since a client may not know the names of the others.
        cosines = (texts * module.class_embeddings[module.active(classes)]).sum(dim=-1)
        return cross_entropy(module.logits(x, texts, classes), y) + self.pull * (1 - cosines.mean())

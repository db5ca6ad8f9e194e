"""KgCoOp: PromptFL whose class texts are held near those of the prompt that a person wrote.

Source: Yao et al. 2023, arXiv 2303.13283; among clients as in the code of FedTPG, boschresearch/FedTPG, commit f141c29
(Launch_FL.py, config/defaults.py, model/custom_coop.py).
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.methods.promptfl import PromptFL
from fedsim.registry import component
from fedsim.search import Choice, Field, Linear, Log


@component
class KgCoOp(PromptFL):
    """Defaults are those of FedTPG's program with `--model_name coop --w 8`.

    Its 500 rounds and uniform averaging are the experiment's.

    Differs: the program lets the step size fall along a cosine over the rounds; ours stays. It pulls to a text per data
    set, ours to `--prompt`. It was read and not run: as published it stops at a call with one argument too many.

    The paper's own code, for one client (htyao89/KgCoOp, commit c43ccc3, scripts/base2new_train.sh), has the same
    weight, a step of 2e-3, batches of 128, and tokens that start as "a photo of a" (`--method.init`).
    """

    lr: float = Field(3e-3, gt=0, search=Log(1e-4, 1e-1), description="step size")
    weight_decay: float = Field(1e-5, ge=0, description="coupled (L2) for adam and sgd, decoupled for adamw")
    local_epochs: int = Field(1, ge=1, description="passes over a client's train rows in a round")
    batch: int = Field(200, ge=1, search=Choice((32, 64, 128, 200)), description="rows of a local step")
    keep_moments: bool = Field(
        True, description="a client's optimizer goes on where its last round ended, in place of starting afresh"
    )
    label_space: Literal["all", "client"] = Field(
        "client", description="classes that compete in a client's loss: all that anybody trains on, or the client's own"
    )
    length: int = Field(
        4,
        ge=1,
        le=4096,
        search=Choice((4, 8, 16), when=("init", "")),
        description="tokens that are learnt, before the name of a class",
    )
    pull: float = Field(
        8.0,
        ge=0,
        search=Linear(0.0, 10.0),
        description="weight of 1 - the mean cosine of learnt and written class texts",
    )

    def loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        texts = module.texts(module.tokens)
        # Over the classes in question alone: the names of others are not a client's to know.
        cosines = (texts * module.prototypes[module.among()]).sum(dim=-1)
        return cross_entropy(module.logits(x, texts), y) + self.pull * (1 - cosines.mean())

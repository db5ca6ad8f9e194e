"""A collection of prompts, whose text features of a class are taken as samples of a Gaussian (ProDA).

Source: Lu et al., CVPR 2022, arXiv 2205.03340. The authors' repository, bbbdylan/proda, has no code at commit bf8d52b;
details as in that of FLIP, 0-ml/flip, commit ec3a848 (flcore/models/clip/ProDA.py), which federates it, and of
LAMDASZ-ML/BMIPRS, commit d4a3054 (trainers/proda.py), which has the same formulas.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fedsim.methods import Backbone, Batch, Schedule
from fedsim.methods._prompt import Prompted, PromptMethod
from fedsim.registry import component
from fedsim.search_space import Choice, Field, Log


@component
class ProDA(PromptMethod):
    """Defaults are those of BMIPRS's program, but for the number of prompts, with one of its epochs in each round.

    The program is train.py with configs/trainers/ProDA/vit_b16_c2_e100_ctx16_warmup5_BZ64_ProDA.yaml.

    Differs: the program has 32 prompts, of which each step takes 4 in random order; here there are 4, which all take
    part in each step. In a quarter of its prompts the class name comes first, in another quarter in the middle; here it
    comes last in all, as in FLIP. The cosine starts at the full step size, without five epochs at 1e-5.
    Differs: FLIP has one prompt by default, and takes one in each step if there are more, so that its variances are 0.
    BMIPRS computes the orthogonality without adding it, FLIP adds it with weight 1; other copies have a weight of 0.1.
    Unread: the paper, beyond its abstract.
    """

    schedule: Schedule = "cosine"
    batch_size: int = Field(4, search=Choice((4, 8, 16, 32)))
    prompts: int = Field(4, ge=1, le=1024, search=Choice((2, 4, 8)), description="learned prompts; 1 is PromptFL")
    orthogonality: float = Field(
        0.1,
        ge=0,
        search=Log(0.01, 1.0),
        description="weight of the mean absolute cosine of prompts without a name",
    )

    def build(self, backbone: Backbone) -> nn.Module:
        return _Collection(backbone, self)

    def loss(self, module: "_Collection", batch: Batch) -> Tensor:
        """An upper bound of the expected cross-entropy, from the mean and the variances of text features."""
        x, y, classes = normalize(batch.x, dim=-1), batch.y, batch.classes
        places = y if classes is None else (classes.cumsum(dim=0) - 1)[y]  # among the active classes
        texts = module.samples(classes)
        logits = module.scale * x @ texts.mean(dim=0).T + module.scale**2 / 2 * variances(x, texts, places)
        return cross_entropy(logits, places) + self.orthogonality * module.likeness()


class _Collection(Prompted):
    stop: Tensor  # (2, W), what follows the tokens if there is no class name

    def __init__(self, backbone: Backbone, method: ProDA) -> None:
        tokens = method.several_tokens(backbone.text, method.prompts)
        super().__init__(backbone, tokens.shape[1], method.length_flag(tokens.shape[1]))
        self.tokens = nn.Parameter(tokens)  # (K, L, W)
        self.register_buffer("stop", self.tower.embed(self.tower.tokenize(["."]))[0, 1:], persistent=False)

    def samples(self, classes: Tensor | None = None) -> Tensor:
        """(K, n, D) unit rows, the text features of the active classes with each prompt."""
        return torch.stack([self.texts(tokens, classes) for tokens in self.tokens])

    def likeness(self) -> Tensor:
        """The mean absolute cosine between the text features of two prompts without a class name; 0 for one prompt."""
        count, length, _ = self.tokens.shape
        rests = torch.cat([self.tokens, self.stop.expand(count, -1, -1)], dim=1)
        ends = torch.full((count,), length + 1, device=rests.device)
        texts = normalize(self.tower.encode_after(self.names[0, :1], rests, ends), dim=-1)
        cosines = (texts @ texts.T).abs()
        return (cosines.sum() - cosines.diagonal().sum()) / max(1, count * (count - 1))

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:  # (B, D) -> (B, C)
        return self.logits(x, self.samples(classes).mean(dim=0), classes)


def variances(x: Tensor, texts: Tensor, places: Tensor) -> Tensor:
    """The variance over prompts of the difference between each class's score and that of the right one.

    As in both programs, covariances between two features count as 0, and K + 1 is the divisor.

    Args:
        x: (B, D) image features.
        texts: (K, n, D) text features of n classes with K prompts.
        places: (B,) the right classes.

    Returns:
        (B, n).
    """
    centred = texts - texts.mean(dim=0)
    squares = x.square()
    each = squares @ centred.square().sum(dim=0).T
    right = centred[:, places]  # (K, B, D)
    shared = torch.einsum("bd,kbd,knd->bn", squares, right, centred)
    return (each + each.gather(1, places[:, None]) - 2 * shared) / (len(texts) + 1)

"""A shared prompt that clients train with values of the loss alone, as through an API (Fed-BBPT).

Source: Lin, Sun, Shi, Wang, Huang, Shen and Tao 2023, arXiv 2310.03123; not checked against code, of which we found
none.
"""

from typing import Literal

from fedsim.methods.promptfl import PromptFL
from fedsim.registry import component


@component
class FedBBPT(PromptFL):
    """PromptFL whose clients estimate gradients (`estimator` spsa); the server averages what they have trained.

    Differs: the paper trains a prompt generator, which makes prompts from inputs; here the tokens of a prompt are
    trained themselves.
    Unread: the paper, beyond its abstract, so also its generator and its zeroth-order optimizer. The directions, the
    perturbation and the step size are ours; the other values are those of `promptfl`.
    """

    estimator: Literal["autograd", "spsa"] = "spsa"
    directions: int = 4

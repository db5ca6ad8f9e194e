"""Operations that are counted, against torch's own counter and by hand."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from fedsim import component, run
from fedsim.methods.probe import Probe
from fedsim.training.flops import Operations


def counted(work):
    with FlopCounterMode(display=False) as theirs:
        work()
    with Operations() as ours:
        work()
    return ours.total, theirs.get_total_flops()


def attention():
    query, key, value = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    scaled_dot_product_attention(query, key, value).sum().backward()


def layers(*some):
    return lambda: nn.Sequential(*some)(torch.randn(4, 6, 10, 10, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    "work",
    [
        attention,
        layers(nn.Flatten(), nn.Linear(600, 20), nn.Linear(20, 3, bias=False)),
        layers(nn.Conv2d(6, 9, 3, stride=2), nn.Conv2d(9, 5, 1)),
        layers(nn.ConvTranspose2d(6, 4, 3)),
        lambda: (torch.randn(3, 4, 5, requires_grad=True) @ torch.randn(3, 5, 2)).sum().backward(),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)(torch.randn(3, 5, 8)).sum().backward(),
    ],
)
def test_operations_are_those_that_torch_counts(work):
    ours, theirs = counted(work)
    assert ours == theirs > 0


def test_a_depthwise_convolution_costs_its_forward_pass_three_times():
    # 6 channels of 10 x 10 outputs, 9 multiply-adds each, 4 images; torch counts the gradient by the weight six-fold.
    depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    ours, theirs = counted(layers(depthwise))
    assert ours == 3 * 2 * 4 * 600 * 9
    assert theirs > ours


def test_a_round_of_a_probe_costs_two_products_a_step(config):
    # Logits, and the gradient by the weights: 2 clients of 72 rows, 4 classes, 24 dimensions.
    report = run(config(method="probe", rounds=1))
    assert report.tables().rounds.flops.tolist() == [2 * 72 * 2 * (2 * 4 * 24)]


@component
class Alternating(Probe):
    """Scores a batch twice in even rounds."""

    reads_client = True

    def loss(self, module, batch):
        once = super().loss(module, batch)
        return once if batch.client.round % 2 else once + super().loss(module, batch)


def test_operations_of_rounds_that_alternate_are_the_mean_of_two(config, tmp_path):
    plain, alternating = (
        run(config(method=each, rounds=1, out=tmp_path / type(each).__name__)) for each in (Probe(), Alternating())
    )
    assert alternating.facts["flops_per_row"] == 1.5 * plain.facts["flops_per_row"]

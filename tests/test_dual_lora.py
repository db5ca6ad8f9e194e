"""Methods with a shared and a private set of low-rank pairs: fedms."""

import re

import pytest
import torch
from test_finetune import Y, embedded, whole
from test_lora import shaken
from torch.nn.functional import normalize

from fedsim.methods import Batch, ClientContext
from fedsim.params import payload_bytes
from fedsim.registry import parse
from fedsim.training.optimizer import Optimizer
from fedsim.training.task import Task
from fedsim.training.train import train_client


@pytest.fixture(scope="module")
def tiny():
    return whole(*embedded())


def trained_in(round, method, module, x):
    """The module's tensors after a client's local training in a round."""
    optimizer = Optimizer(method, {name: tensor.data.unsqueeze(0) for name, tensor in module.named_parameters()})
    learned = method.learned(dict(module.named_parameters()), round)
    for name, tensor in module.named_parameters():
        tensor.requires_grad_(name in learned)
    rule, rng = parse("server", "fedavg"), torch.Generator().manual_seed(round)
    train_client(module, optimizer, x, Y, method, rule, rng, client=at(round))
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def at(round):
    """A client in a round."""
    return ClientContext(torch.tensor(0), torch.ones(4, dtype=torch.int64), round)


def half_of(state, half):
    """The state of one set of pairs, as `lora` has it."""
    return {n.removeprefix(half): tensor for n, tensor in state.items() if n.startswith((f"{half}down.", f"{half}up."))}


# FedMS -----------------------------------------------------------------------------------------------------------


def fedms(**fields):
    return parse("method", {"name": "fedms"} | fields)


def built(method, backbone):
    torch.manual_seed(0)
    return method.build(backbone).double()


def test_with_all_blocks_active_the_first_stage_is_lora_and_the_second_leaves_its_pairs(tiny):
    backbone, _, features = tiny
    quick = {"lr": 1e-2, "weight_decay": 0.1, "batch_size": 3, "local_epochs": 2}
    lora, ours = parse("method", {"name": "lora"} | quick), fedms(**quick, rounds_per_block=0, first_stage=2)
    plain, module = built(lora, backbone), built(ours, backbone)
    for round in (1, 2):
        alone, both = (trained_in(round, *pair, features) for pair in ((lora, plain), (ours, module)))
        assert all(torch.equal(both[name], tensor) for name, tensor in alone.items())
    assert (both["gate.weight"] == 0).all() and alone["up.text/transformer/resblocks/0/attn/in_proj_weight"].any()
    later = trained_in(3, ours, module, features)
    assert all(torch.equal(later[name], tensor) for name, tensor in alone.items())
    assert later["gate.weight"].any() and later["own.up.text/transformer/resblocks/0/attn/in_proj_weight"].any()


@pytest.mark.parametrize(
    ("round", "prefix", "blocks"),
    [(1, "", {3}), (2, "", {3}), (3, "", {2, 3}), (5, "", {1, 2, 3}), (6, "own.", {3}), (99, "own.", {0, 1, 2, 3})],
)
def test_blocks_are_activated_from_the_last_one_and_anew_in_the_second_stage(round, prefix, blocks, tiny):
    method = fedms(first_stage=5, rounds_per_block=2, weight_decay=0.1, batch_size=3)
    module = method.build(tiny[0]).double()
    module.load_state_dict(shaken(module))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    after = trained_in(round, method, module, tiny[2])
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    pairs = {name for name in moved if "resblocks" in name}
    assert all(name.startswith((f"{prefix}down.", f"{prefix}up.")) for name in pairs)
    assert {int(re.findall(r"resblocks/(\d)", name)[0]) for name in pairs} == blocks
    assert len(pairs) == 4 * len(blocks)  # up and down, in attention's two matrices
    assert moved - pairs == ({"gate.weight", "gate.bias"} if prefix else set())


def test_what_lies_outside_of_blocks_is_trained_from_the_start(tiny):
    names = fedms(modules="all").build(tiny[0]).state_dict()
    learned = fedms().learned(names, 1)
    assert {"down.text/text_projection", "up.text/text_projection"} < learned
    assert {int(re.findall(r"resblocks/(\d)", name)[0]) for name in learned if "resblocks" in name} == {3}


def test_the_second_stage_mixes_the_logits_of_two_loras_by_a_gate(tiny):
    backbone, _, features = tiny
    method = fedms(first_stage=3, objective="cross_entropy")
    module = method.build(backbone).double()
    state = shaken(module)
    module.load_state_dict(state)
    logits = []
    for half in ("", "own."):
        expert = parse("method", "lora").build(backbone).double()
        expert.load_state_dict(half_of(state, half))
        logits.append(expert(features))
    scores = normalize(features, dim=1) @ state["gate.weight"].T + state["gate.bias"]
    share = 1 / (1 + (scores[:, 1] - scores[:, 0]).exp())
    mixed = share[:, None] * logits[0] + (1 - share)[:, None] * logits[1]
    context = at(4)
    torch.testing.assert_close(method.logits(module, features, None, context), mixed, rtol=1e-10, atol=1e-10)
    expected = torch.nn.functional.cross_entropy(mixed, Y)
    torch.testing.assert_close(method.loss(module, Batch(features, Y, client=context)), expected, rtol=1e-10, atol=0)
    assert torch.equal(method.logits(module, features, None, at(3)), module(features))
    torch.testing.assert_close(module(features), logits[0], rtol=1e-10, atol=1e-10)
    active = torch.tensor([True, False, True, True])
    masked = method.logits(module, features, active, context)
    torch.testing.assert_close(masked[:, active], mixed[:, active], rtol=1e-10, atol=1e-10)
    assert (masked[:, 1] == -torch.inf).all()


def test_the_shared_expert_and_the_gate_travel(tiny):
    backbone = tiny[0]
    params = fedms().build(backbone).state_dict()
    task = Task(fedms(), parse("server", "fedavg"), seed=0)
    pairs = payload_bytes(parse("method", "lora").build(backbone).state_dict())
    bytes_ = pairs + 4 * (2 * backbone.width + 2)
    assert task.payload(params, cohort=2) == (bytes_, bytes_)
    assert payload_bytes(task.select(params, "private")) == pairs

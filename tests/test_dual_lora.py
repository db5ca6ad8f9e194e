"""Methods with a shared and a private set of low-rank pairs: fedms, feddlp."""

import re

import pytest
import torch
from test_finetune import Y, embedded, whole
from test_lora import shaken
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize, softshrink

from fedsim import InputError
from fedsim.methods import Batch, ClientContext
from fedsim.params import payload_bytes
from fedsim.registry import parse
from fedsim.training.optimizer import Optimizer
from fedsim.training.round_zero import initial_params
from fedsim.training.rows import RuleInputs, TrainRows
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
    rows = TrainRows(x, Y, [len(Y)], client=at(round, 1))
    train_client(module, optimizer, rows, method, rule, RuleInputs(dict(module.named_parameters())), rng)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def at(round, *clients):
    """A client in a round, or a stack of so many."""
    return ClientContext(torch.zeros(clients, dtype=torch.int64), torch.ones(*clients, 4, dtype=torch.int64), round)


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
def test_blocks_are_activated_from_the_last_one_and_again_in_the_second_stage(round, prefix, blocks, tiny):
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


def test_under_ditto_both_models_train_the_same_parameters(tiny):
    inner = fedms(first_stage=2)
    names = list(inner.build(tiny[0]).state_dict())
    halves = [f"{half}.{name}" for half in ("shared", "own") for name in names]
    learned = inner.learned(names, 3)
    expected = {f"{half}.{name}" for half in ("shared", "own") for name in learned}
    assert parse("server", "ditto").adapt(inner).learned(halves, 3) == expected and 0 < len(learned) < len(names)


def test_a_rule_that_moves_pairs_alone_is_refused_because_of_the_gate(tiny):
    rule = parse("server", "lora_stacking")
    with pytest.raises(InputError, match=r"could not move gate\.weight, gate\.bias; take fedex_lora"):
        initial_params(Task(rule.adapt(fedms()), rule, seed=0), tiny[0])


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
    expected = cross_entropy(mixed, Y)
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


# FedDLP ----------------------------------------------------------------------------------------------------------


def feddlp(**fields):
    return parse("method", {"name": "feddlp"} | fields)


def ungated(state):
    """The private set as `lora` has it: gates multiply the columns of `up`."""
    pairs = half_of(state, "own.")
    gates = {name.removeprefix("own.gate."): tensor for name, tensor in state.items() if name.startswith("own.gate.")}
    return pairs | {f"up.{key}": pairs[f"up.{key}"] * gate[..., None, :] for key, gate in gates.items()}


def kl(p, q, temperature):
    """T^2 times the mean over rows of KL(p || q), of logits."""
    p, q = (p / temperature).softmax(dim=1), (q / temperature).softmax(dim=1)
    return temperature**2 * (p * (p / q).log()).sum(dim=1).mean()


def both(state, backbone, features):
    """The logits of the shared and of the private set, by two modules of `lora`."""
    for rank, pairs in ((2, half_of(state, "")), (3, ungated(state))):
        module = parse("method", {"name": "lora", "modules": "all", "rank": rank}).build(backbone).double()
        yield functional_call(module, pairs, (features,))


def test_each_set_learns_from_the_labels_and_from_the_other_set(tiny):
    backbone, _, features = tiny
    method = feddlp(own_rank=3, own_teacher=2.0, shared_teacher=0.5)
    module = method.build(backbone).double()
    state = shaken(module)
    module.load_state_dict(state)
    shared, own = both(state, backbone, features)
    torch.testing.assert_close(method.logits(module, features), own, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module(features), shared, rtol=1e-10, atol=1e-10)
    (s, o), rows = (logits[:, Y] for logits in (shared, own)), torch.arange(4)
    expected = sum((cross_entropy(z, rows) + cross_entropy(z.T, rows)) / 2 for z in (s, o))
    expected += 2.0 * (kl(s, o, 3) + kl(s.T, o.T, 3)) / 2 + 0.5 * (kl(o, s, 3) + kl(o.T, s.T, 3)) / 2
    torch.testing.assert_close(method.loss(module, Batch(features, Y)), expected, rtol=1e-9, atol=0)
    active = torch.tensor([True, False, True, True])
    s, o, y = shared[:, active], own[:, active], torch.tensor([1, 0, 1, 2])
    expected = cross_entropy(s, y) + cross_entropy(o, y) + 2.0 * kl(s, o, 3) + 0.5 * kl(o, s, 3)
    loss = feddlp(own_rank=3, own_teacher=2.0, shared_teacher=0.5, objective="cross_entropy").loss
    torch.testing.assert_close(loss(module, Batch(features, Y, active)), expected, rtol=1e-9, atol=0)
    # No gradient reaches a teacher: with no loss of its own, a set would not move.
    for own_teacher, shared_teacher, still in ((1.0, 0.0, ""), (0.0, 1.0, "own.")):
        weights = {"own_teacher": own_teacher, "shared_teacher": shared_teacher}
        taught, alone = (feddlp(own_rank=3, **fields) for fields in (weights, dict.fromkeys(weights, 0.0)))
        names = [name for name in state if name.startswith((f"{still}up.", f"{still}down."))]
        slopes = [
            torch.autograd.grad(m.loss(module, Batch(features, Y)), [module.get_parameter(n) for n in names])
            for m in (taught, alone)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def test_without_teachers_the_shared_set_is_lora_and_gates_are_pruned(tiny):
    backbone, _, features = tiny
    quick = {"lr": 1e-2, "batch_size": 3, "local_epochs": 2, "modules": "all"}
    lora = parse("method", {"name": "lora"} | quick)
    method = feddlp(**quick, own_teacher=0.0, shared_teacher=0.0, threshold=0.2)
    plain, module = built(lora, backbone), built(method, backbone)
    gates = {name: tensor.clone() for name, tensor in module.state_dict().items() if ".gate." in name}
    alone, ours = (trained_in(1, *pair, features) for pair in ((lora, plain), (method, module)))
    assert all(torch.equal(ours[name], tensor) for name, tensor in alone.items())
    # Steps of 3 rows; the last row of each epoch is skipped. Each takes 0.2 off, and adamw adds at most about lr.
    for name, start in gates.items():
        far = start.abs() > 0.5
        torch.testing.assert_close(ours[name][far], start[far] - 0.4 * start[far].sign(), rtol=0, atol=0.025)
        assert (ours[name][start.abs() < 0.35] == 0).all()
    assert any((tensor == 0).any() for tensor in ours.values() if tensor.dim() < 3)


def test_a_client_steps_as_with_two_clipped_optimizers_and_soft_thresholds(tiny):
    backbone, _, features = tiny
    method = feddlp(lr=0.02, batch_size=4, local_epochs=3, own_rank=3, threshold=0.05, own_teacher=1.0)
    module = built(method, backbone)
    state = {name: tensor.clone().requires_grad_() for name, tensor in module.state_dict().items()}
    ours = trained_in(1, method, module, features)
    sets = [[n for n in state if n.startswith("own.") == own and ".gate." not in n] for own in (False, True)]
    gates = [name for name in state if ".gate." in name]
    adam = torch.optim.AdamW(list(state.values()), lr=0.02, weight_decay=0.0)
    rng, rows = torch.Generator().manual_seed(1), torch.arange(4)
    for _ in range(3):
        order = torch.randperm(4, generator=rng)
        shared, own = (logits[:, Y[order]] for logits in both(state, backbone, features[order]))
        loss = sum((cross_entropy(z, rows) + cross_entropy(z.T, rows)) / 2 for z in (shared, own))
        fixed = [z.detach() for z in (shared, own)]
        for student, teacher in ((own, fixed[0]), (shared, fixed[1])):
            loss = loss + (kl(teacher, student, 3) + kl(teacher.T, student.T, 3)) / 2
        adam.zero_grad()
        loss.backward()
        for names in sets:
            torch.nn.utils.clip_grad_norm_([state[name] for name in names], 1.0)
        adam.step()
        with torch.no_grad():
            for name in gates:
                state[name].copy_(softshrink(state[name], 0.05))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, state[name].detach(), rtol=1e-6, atol=1e-8)


def test_the_small_set_travels_and_the_large_one_stays_with_its_gates(tiny):
    backbone = tiny[0]
    params = feddlp().build(backbone).state_dict()
    task = Task(feddlp(), parse("server", "fedavg"), seed=0)
    small, large = (
        payload_bytes(parse("method", {"name": "lora", "modules": "all", "rank": rank}).build(backbone).state_dict())
        for rank in (2, 4)
    )
    assert task.payload(params, cohort=2) == (small, small)
    directions = 4 * (3 + 1 + 1 + 1) + 1  # of each of 4 blocks, and of the projection
    assert payload_bytes(task.select(params, "private")) == large + 4 * 4 * directions
    assert task.is_personal(params)

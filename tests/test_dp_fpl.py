"""DP-FPL: low-rank factors of a private prompt, against formulas of a few lines in float64."""

import numpy as np
import pytest
import torch
from test_prompts import a_backbone, a_batch, made
from test_stack import two_rounds
from test_stacked_towers import features as features  # a fixture
from test_stacked_towers import frozen as frozen

from fedsim import InputError
from fedsim.clients import Population
from fedsim.methods import Batch
from fedsim.params import payload_bytes
from fedsim.registry import parse
from fedsim.rng import torch_rng
from fedsim.training import stack
from fedsim.training.optimizer import Optimizer
from fedsim.training.private_steps import PrivateSteps
from fedsim.training.rows import RuleInputs, TrainRows
from fedsim.training.train import train_client

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.05, "length": 4, "rank": 2}


@pytest.fixture(scope="module")
def backbone():
    return a_backbone(torch.float64)[1]


def trained(method, module, batch, steps=None):
    """The module after a client's local training on one batch."""
    for name, tensor in module.named_parameters():
        tensor.requires_grad_(name in method.learned(["shared", "left", "right", "residual"], 1))
    optimizer = Optimizer(method, {name: tensor.data[None] for name, tensor in module.named_parameters()})
    rule, rng = parse("server", "fedavg"), torch.Generator().manual_seed(0)
    inputs = RuleInputs(dict(module.named_parameters()))
    train_client(module, optimizer, TrainRows(*batch[:2], [len(batch.y)]), method, rule, inputs, rng, steps)


def private(module):
    return (module.left @ module.right + module.residual).detach().clone()


def by_hand(columns):
    """Gram and Schmidt's process, in NumPy."""
    done = []
    for column in columns.T:
        for unit in done:
            column = column - (unit @ column) * unit
        done.append(column / np.linalg.norm(column))
    return np.stack(done, axis=1)


def test_factors_are_those_of_one_power_iteration_and_the_residual_is_the_rest():
    method, draw = parse("method", {"name": "dp_fpl", "private_lr": 1.0}), np.random.default_rng(0)
    prompt, start = draw.normal(size=(5, 12)), draw.normal(size=(3, 12))
    left = by_hand(prompt @ start.T)
    right = by_hand(prompt.T @ left).T
    tensors = method.factored(torch.from_numpy(prompt), torch.from_numpy(start))
    for name, expected in {"left": left, "right": right, "residual": prompt - left @ right}.items():
        np.testing.assert_allclose(tensors[name].numpy(), expected, atol=1e-12)
    for _ in range(300):  # from one step to the next, they approach the leading singular vectors
        tensors = method.factored(torch.from_numpy(prompt), tensors["right"])
    leading = np.linalg.svd(prompt)[2][:3]
    np.testing.assert_allclose(tensors["right"].mT @ tensors["right"], leading.T @ leading, atol=1e-9)


@pytest.mark.parametrize("rank", [2, 4])
def test_a_step_moves_both_prompts_by_their_gradient_and_the_private_one_within_its_factors(rank, backbone):
    method, module = made("dp_fpl", backbone, **PLAIN | {"rank": rank, "private_lr": 0.25})
    x, y = a_batch(backbone)
    loss = method.loss(module, Batch(x, y))
    (g,) = torch.autograd.grad(loss, module.shared, retain_graph=True)
    u, v = module.left.detach() / 0.5, module.right.detach() / 0.5
    torch.testing.assert_close(u.mT @ u, torch.eye(rank).double(), rtol=0, atol=1e-6)  # drawn in float32
    before, shared, step = private(module), module.shared.detach().clone(), 0.05 * 0.25
    trained(method, module, Batch(x, y))
    torch.testing.assert_close(module.shared.detach(), shared - 0.05 * g, rtol=0, atol=1e-12)
    moved = step * (u @ u.mT @ g + g @ v.mT @ v) - 0.05 * step * g @ v.mT @ u.mT @ g
    torch.testing.assert_close(private(module), before - moved, rtol=0, atol=1e-12)
    assert moved.norm() > 1e-4
    if rank == 4:  # of all tokens: the whole gradient is among the factors'
        torch.testing.assert_close(u @ u.mT @ g, g, rtol=0, atol=1e-6 * g.norm().item())
    for name, tensor in method.factored(before - moved, v - 0.05 * u.mT @ g).items():
        torch.testing.assert_close(module.get_parameter(name).detach(), tensor, rtol=0, atol=1e-12)


def test_without_steps_of_the_private_prompt_it_is_promptfl_with_other_first_tokens(backbone):
    method, module = made("dp_fpl", backbone, **PLAIN | {"private_lr": 0.0})
    promptfl, other = made("promptfl", backbone, **{n: v for n, v in PLAIN.items() if n != "rank"}, local_epochs=1)
    batch, own = Batch(*a_batch(backbone)), private(module)
    with torch.no_grad():
        other.tokens.copy_(module.tokens())
    optimizer = Optimizer(promptfl, {"tokens": other.tokens.data[None]})
    rng = torch.Generator().manual_seed(0)
    rows, inputs = TrainRows(*batch[:2], [len(batch.y)]), RuleInputs({"tokens": other.tokens})
    train_client(other, optimizer, rows, promptfl, parse("server", "fedavg"), inputs, rng)
    trained(method, module, batch)
    torch.testing.assert_close(private(module), own, rtol=0, atol=0)
    torch.testing.assert_close(module.tokens(), other.tokens, rtol=0, atol=1e-13)
    assert module.left.count_nonzero() == 0


def test_a_prompt_of_a_low_rank_has_factors_without_nan():
    method = parse("method", "dp_fpl")
    for prompt in (torch.zeros(4, 6), torch.ones(4, 1) * torch.arange(6.0)):
        tensors = method.factored(prompt, torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        torch.testing.assert_close(tensors["left"] @ tensors["right"] + tensors["residual"], prompt)


def test_the_private_prompt_stays_and_the_shared_one_travels(backbone):
    method, module = made("dp_fpl", backbone, length=4, rank=2)
    shared = {name: tensor for name, tensor in module.state_dict().items() if method.scope(name) == "shared"}
    assert list(shared) == ["shared"] and payload_bytes(shared) == 8 * 4 * backbone.text.width


def test_noise_on_the_gradients_of_rows_reaches_the_private_prompt_through_its_factors_alone(backbone):
    method, module = made("dp_fpl", backbone, **PLAIN | {"length": 6, "rank": 1})
    before, batch = private(module), Batch(*a_batch(backbone))
    trained(method, module, batch, PrivateSteps(0.1, 100.0, [torch_rng(0, "privacy")]))
    change = private(module) - before
    assert change.norm() > 0.01 and torch.linalg.matrix_rank(change, rtol=1e-9) == 2


def test_clients_are_trained_together_as_one_by_one(features, frozen, tmp_path, monkeypatch):
    monkeypatch.setitem(stack.TOWER_BYTES, "cpu", 1 << 30)
    method = parse("method", {"name": "dp_fpl", "length": 3, "rank": 2, "batch_size": 3, "lr": 0.05})
    noised = {"name": "example_dp", "clip": 0.1, "noise": 1.0}
    parts = {"method": method, "server": parse("server", "fedavg"), "privacy": parse("privacy", noised)}
    rows, none = (np.arange(4), np.arange(4, 6)), np.empty(0, np.int64)
    clients = Population([(own, none, none) for own in rows], [none])
    (stacked, kept), (single, expected) = (
        two_rounds(features, clients, tmp_path, reference, dtype="float64", frozen=frozen, **parts)
        for reference in (False, True)
    )
    for mine, other in zip(stacked, single, strict=True):
        np.testing.assert_allclose(mine.delta, other.delta, rtol=1e-8, atol=1e-10)
    for client, other in zip(kept, expected, strict=True):
        assert set(client) == {"left", "right", "residual"}
        for name, tensor in client.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-8, atol=1e-10)
    assert not torch.equal(kept[0]["residual"], kept[1]["residual"])


def test_a_rank_above_the_number_of_tokens_is_refused_in_one_sentence(backbone):
    with pytest.raises(InputError, match=r"--method.rank 8 is more than .* with 4 tokens .* at most 4$"):
        made("dp_fpl", backbone, length=4)

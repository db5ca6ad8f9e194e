"""Stacked clients against the readable path, for every method and every server rule that is there."""

import numpy as np
import pytest
import torch
from conftest import run_until
from torch import nn
from torch.nn.functional import cross_entropy, dropout, normalize, one_hot, softshrink

from fedsim import Averaging, Backbone, InputError, Method, available, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.clients import Population
from fedsim.datasets import Features
from fedsim.encoding import from_features
from fedsim.methods import Batch, trained
from fedsim.methods.probe import Probe
from fedsim.params import flatten
from fedsim.registry import parse
from fedsim.servers import Reply
from fedsim.training.accumulator import Accumulator
from fedsim.training.client_store import PrivateStore
from fedsim.training.evaluator import EvaluationRows
from fedsim.training.optimizer import Optimizer
from fedsim.training.round_zero import initial_params
from fedsim.training.stack import by_autograd, gradients, groups, stack_size
from fedsim.training.task import Task, backbone_of
from fedsim.training.trainer import Chunk
from fedsim.training.worker import ClientWorker
from fedsim.updates import CLIENT_STATS

WIDTH, CLASSES = 12, 5
SIZES = 9, 1, 33, 20, 9, 4, 13  # rows of each client: batches of 4 leave 1, 1, 1, 0, 1, 0 and 1
SERVERS = "fedavg", "fedprox", "local_only"  # nothing added, a term added, everything private


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(3)
    y = rng.integers(0, CLASSES, sum(SIZES))
    text = normalize(torch.tensor(rng.standard_normal((CLASSES, WIDTH)))).float().numpy()
    x = (text[y] + 0.4 * rng.standard_normal((len(y), WIDTH))).astype(np.float32)
    names = {"classes": tuple("abcde"), "domains": ("ink",), "split": np.full(len(y), -1, np.int8)}
    scale = {"class_embeddings": text, "logit_scale": 20.0}
    return from_features(Features(x=x, y=y, domain=np.zeros(len(y), np.int64), **names, **scale))


@pytest.fixture(scope="module")
def clients():
    parts, none = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1]), np.empty(0, np.int64)
    return Population(
        [(rows, none, none) for rows in parts], [np.arange(5, 60, 5)]
    )  # target rows, for those that read them


def two_rounds(features, clients, folder, reference, frozen=None, **task):
    """Deltas and losses of two rounds, the second with what clients kept of the first; and what they keep after it."""
    private = PrivateStore(folder / str(reference))
    server = task["server"]
    method = server.adapt(task.pop("method"))
    task = Task(method, **task, seed=0, private=private, reference=reference)
    clip = frozen and frozen.open("cpu")
    params = initial_params(task, backbone_of(features, dtype=task.dtype, reads=method.reads, clip=clip))
    slots, _ = server.init(task.select(params, "shared"))
    trainer, everyone = ClientWorker(features, clients, frozen), range(clients.trainers)
    partials, written = [], 0
    for round in (1, 2):
        chunk = Chunk(0, [(client, written) for client in everyone])
        sent = flatten(server.broadcast(slots, task.select(params, "shared")))
        partials.append(trainer.train(task, round, {0: flatten(params)}, sent, chunk))
        written = round * task.has_private_state(params)
    kept = [private.read(client, written) for client in everyone]
    return partials, kept


def agree(ours, theirs, rtol, atol):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.weight == other.weight
        np.testing.assert_allclose(mine.delta, other.delta, rtol, atol)
        assert mine.clients["client"].tolist() == other.clients["client"].tolist() == list(range(len(SIZES)))
        assert mine.clients["rows"].tolist() == list(SIZES)
        np.testing.assert_allclose(mine.clients["loss"], other.clients["loss"], rtol, atol)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", [name for name in available("method") if not parse("method", name).reads.towers])
def test_stacked_clients_are_trained_as_one_by_one(name, server, features, clients, tmp_path):
    # In float64 to twelve digits, whatever the method; the first step of Adam is the sign of a gradient, so that
    # in float32 the difference would only show how near to zero gradients come.
    fields = {"name": name, "batch_size": 4, "local_epochs": 2, "lr": 1e-2}
    server = {"name": server, "mu": 0.5} if server == "fedprox" else server
    task = {"method": parse("method", fields), "server": parse("server", server), "dtype": "float64"}
    stacked, single = (two_rounds(features, clients, tmp_path, reference, **task) for reference in (False, True))
    agree(stacked, single, 1e-7, 1e-12)
    moved = np.abs(single[0][1].delta).sum() if server != "local_only" else len(single[1][0])
    assert moved > 0 or not trained(task["method"].build(backbone_of(features)))


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adamw"}, {}])
def test_moments_that_are_kept_go_on_where_they_were(optimizer, features, clients, tmp_path):
    fields = {"name": "probe", "batch_size": 4, "weight_decay": 0.1, **optimizer}
    common = {"server": parse("server", "fedavg"), "dtype": "float64"}
    kept = {"method": parse("method", fields | {"persist_optimizer": True}), **common}
    stacked, single = (
        two_rounds(features, clients, tmp_path / "kept", reference, **kept) for reference in (False, True)
    )
    agree(stacked, single, 1e-9, 1e-12)
    afresh = two_rounds(features, clients, tmp_path, False, method=parse("method", fields), **common)
    assert np.array_equal(afresh[0][0].delta, stacked[0][0].delta)  # nothing was kept yet
    assert not np.allclose(afresh[0][1].delta, stacked[0][1].delta)
    assert afresh[1] == [{}] * len(SIZES)


@component
class Alternating(Method):
    """A head of which odd rounds train the weight, even ones the bias, and every third both."""

    def build(self, backbone):
        head = nn.Linear(*backbone.class_embeddings.T.shape)
        head.forward = lambda x, classes=None: x @ head.weight.T + head.bias
        return head

    def learned(self, names, round):
        return names if round % 3 == 0 else [("bias", "weight")[round % 2]]

    def scope(self, name):
        return "private"


@pytest.mark.parametrize("reference", [False, True])
def test_parameters_that_a_round_does_not_train_are_as_without_a_gradient(reference, features, clients, tmp_path):
    # Neither weight decay nor moments that are kept move them, and Adam's steps are counted for each.
    private = PrivateStore(tmp_path)
    decays = {"optimizer": "adamw", "weight_decay": 0.1, "persist_optimizer": True}
    method = Alternating(lr=0.05, batch_size=100, local_epochs=2, **decays)
    task = Task(method, parse("server", "fedavg"), 0, "float64", private=private, reference=reference)
    params = initial_params(task, backbone_of(features))
    trainer, ids = ClientWorker(features, clients), range(len(SIZES))
    for round in (1, 2, 3, 4):
        chunk = Chunk(round - 1, [(client, round - 1) for client in ids])
        trainer.train(task, round, {round - 1: flatten(params)}, np.zeros(0), chunk)
    for client in ids:
        rows = clients[client].train
        x, y = torch.tensor(features.representations.features[rows]).double(), torch.from_numpy(features.y[rows])
        head = task.build(backbone_of(features)).double()
        adam = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=0.1)
        for round in (1, 2, 3, 4):
            for name, parameter in head.named_parameters():
                parameter.requires_grad_(name in method.learned(["weight", "bias"], round))
            for _ in range(2):
                adam.zero_grad()
                cross_entropy(x @ head.weight.T + head.bias, y).backward()
                adam.step()
        kept = private.read(client, 4)
        assert {name: kept[f"optimizer/steps/{name}"].item() for name in ("weight", "bias")} == {"weight": 4, "bias": 6}
        for name, parameter in head.named_parameters():
            torch.testing.assert_close(kept[name], parameter.detach(), rtol=1e-9, atol=1e-12)


@component
class Frozen(Alternating):
    """A shared head whose weight is trained in round 1 and frozen from then on."""

    def learned(self, names, round):
        return names if round == 1 else [name for name in names if name.endswith("bias")]

    def scope(self, name):
        return "shared"


@pytest.mark.parametrize(
    "fields",
    [
        {"server": "fedavgm"},
        {"codec": {"name": "top_k", "share": 0.1}},
        {"privacy": {"name": "central_dp", "noise": 1.0}},
    ],
    ids=str,
)
def test_what_a_round_does_not_train_stays_whatever_the_rule_remembers_or_noise_adds(fields, config):
    heads = []
    for rounds in (1, 3):
        made = config(method=Frozen(lr=0.05), rounds=rounds, **fields)
        run(made)
        heads.append(load_checkpoint(made.out, made.experiment())[0].params)
    before, after = heads
    assert torch.equal(before["weight"], after["weight"]) and not torch.equal(before["bias"], after["bias"])


@component
class Shrunk(Method):
    """A head that shrinks toward zero after each step."""

    def build(self, backbone):
        return Probe().build(backbone)

    def proximal(self, params):
        return {"weight": softshrink(params["weight"], 0.01)}


@pytest.mark.parametrize(("server", "stored"), [("local_only", "weight"), ("ditto", "own.weight")])
def test_a_proximal_step_follows_each_step_of_each_client(server, stored, features, clients, tmp_path):
    method = Shrunk(optimizer="sgd", lr=0.05, batch_size=4, local_epochs=2)
    task = {"method": method, "server": parse("server", server), "dtype": "float64"}
    stacked, single = (two_rounds(features, clients, tmp_path, reference, **task) for reference in (False, True))
    agree(stacked, single, 1e-9, 1e-12)
    assert all((client[stored] == 0).any() for client in stacked[1])
    rows, head = clients[1].train, backbone_of(features).class_embeddings.double()  # one row: four steps
    x = normalize(torch.tensor(features.representations.features[rows]).double(), dim=1)
    for _ in range(4):
        errors = (20 * x @ head.T).softmax(dim=1) - one_hot(torch.from_numpy(features.y[rows]), CLASSES)
        head = softshrink(head - 0.05 * 20 * errors.T @ x, 0.01)
    if server == "local_only":
        torch.testing.assert_close(stacked[1][1][stored], head, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("objective", ["contrastive", "cross_entropy"])
def test_the_closed_form_of_fedclips_gradient_is_autograds(objective, alike):
    method = parse("method", {"name": "fedclip", "objective": objective})
    draw = torch.Generator().manual_seed(1)
    text = normalize(torch.randn(CLASSES, WIDTH, generator=draw, dtype=torch.float64))
    module = method.build(Backbone(text, 30.0)).double()
    params = {
        name: torch.randn(*(() if alike else (3,)), *tensor.shape, generator=draw, dtype=torch.float64) / 3
        for name, tensor in module.state_dict().items()
    }
    x = torch.randn(3, 6, WIDTH, generator=draw, dtype=torch.float64)
    y = torch.randint(CLASSES, (3, 6), generator=draw)
    losses, grads = gradients(method, module, params, Batch(x, y))
    expected_losses, expected = by_autograd(method, module, params, Batch(x, y))  # autograd through `loss`
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    assert grads.keys() == expected.keys()
    for name in expected:
        assert grads[name].is_contiguous() and expected[name].abs().max() > 1e-3
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-10, atol=1e-13)


def test_batches_of_one_size_go_together_and_short_ones_are_skipped():
    # Of 9, 9, 5 and 4 rows in batches of 4: all four, then 4, 4 and 1 rows, then 1 and 1.
    assert list(groups([9, 9, 5, 4], 4, min_batch=1)) == [(0, 0, 4), (4, 0, 2), (4, 2, 3), (8, 0, 2)]
    assert list(groups([9, 9, 5, 4], 4, min_batch=2)) == [(0, 0, 4), (4, 0, 2)]
    assert list(groups([3, 1], 4, min_batch=2)) == [(0, 0, 1)]
    assert list(groups([1], 4, min_batch=2)) == []


def test_a_stack_is_as_large_as_memory_allows_and_never_empty():
    probe = parse("method", "probe")
    assert stack_size({"w": torch.zeros(2**18)}, probe, "cpu") == 9  # 1 MB, and its gradient and moments: 4 of 36
    assert stack_size({"w": torch.zeros(2**26)}, probe, "cpu") == 1
    assert stack_size({"w": torch.zeros(2**20)}, probe, "cuda") == 320


class Linear(nn.Linear):
    def forward(self, x, classes=None):
        return super().forward(x)


@component
class Picky(Method):
    """Counts on the values of its batch, as vmap cannot."""

    def build(self, backbone):
        return Linear(backbone.width, len(backbone.class_embeddings))

    def loss(self, module, batch):
        loss = super().loss(module, batch)
        return loss * 2 if loss.item() > 1 else loss


def test_a_method_that_cannot_be_stacked_says_so_and_runs_one_by_one(config, tmp_path):
    with pytest.raises(
        InputError, match=r"Picky cannot be stacked \(.*vmap.*\); --engine reference trains client by client"
    ):
        run(config(method=Picky()))
    assert run(config(method=Picky(), engine="reference", out=tmp_path / "one")).last_round == 3


class Dropped(Linear):
    def forward(self, x, classes=None):
        return super().forward(dropout(x, 0.5, self.training))


@component
class Forgetful(Method):
    """Drops out, at random and in training only."""

    def build(self, backbone):
        return Dropped(backbone.width, len(backbone.class_embeddings))


def test_a_method_that_draws_random_numbers_is_refused_though_it_has_been_evaluated_before(config, tmp_path):
    with pytest.raises(InputError, match="Forgetful cannot be stacked"):
        run(config(method=Forgetful()))
    one, again = (run(config(method=Forgetful(), engine="reference", out=tmp_path / str(k))) for k in (0, 1))
    assert all(torch.equal(one.adapter[name], again.adapter[name]) for name in one.adapter)


class Turned(nn.Module):
    """A linear head whose weights lie in memory the other way round."""

    def __init__(self, backbone):
        super().__init__()
        self.weight = nn.Parameter(backbone.class_embeddings.T.clone())
        self.scale = backbone.logit_scale

    def forward(self, x, classes=None):
        return self.scale * normalize(x, dim=-1) @ self.weight


@component
class TurnedProbe(Method):
    """Of (D, C) weights, as a transposed tensor that no fused optimizer reads aright."""

    def build(self, backbone):
        assert not Turned(backbone).weight.is_contiguous()
        return Turned(backbone)


@pytest.mark.parametrize("engine", ["stacked", "reference"])
def test_weights_that_lie_in_memory_the_other_way_round_are_trained_alike(engine, config, tmp_path):
    turned = run(config(method=TurnedProbe(lr=0.01), engine=engine, out=tmp_path / "turned"))
    probe = run(config(method={"name": "probe", "lr": 0.01}, engine=engine, out=tmp_path / "probe"))
    torch.testing.assert_close(turned.adapter["weight"].T, probe.adapter["weight"], rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    """A linear head that counts its forward passes in a tensor of its own."""

    def __init__(self, backbone):
        super().__init__()
        self.weight = nn.Parameter(backbone.class_embeddings.clone())
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x, classes=None):
        if self.training:
            self.passes.add_(1)
        return x @ self.weight.T


@component
class Counter(Method):
    """Its buffer travels, and changes with every local step."""

    def build(self, backbone):
        return Counting(backbone)


def test_buffers_that_change_in_training_change_in_a_stack_too(config, tmp_path):
    # 3 clients of 72, 72 and 96 train rows in batches of 8: 9, 9 and 12 steps in each of 2 rounds.
    method = Counter(batch_size=8)
    fields = {"method": method, "rounds": 2, "held_out": ()}
    stacked, single = (run(config(**fields, chunk=3, engine=k, out=tmp_path / k)) for k in ("stacked", "reference"))
    assert single.adapter["passes"] > 0
    assert torch.equal(stacked.adapter["passes"], single.adapter["passes"])


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}, {}])
def test_a_run_keeps_moments_over_cohorts_actors_and_a_kill(optimizer, config, tmp_path):
    method = {"name": "probe", "persist_optimizer": True, **optimizer}
    fields = {"method": method, "clients": 6, "partition": "iid", "cohort": 3, "rounds": 5}
    whole = run(config(**fields, out=tmp_path / "whole"))

    ours = config(**fields, out=tmp_path / "killed")
    run_until(3, ours)
    again = run(ours)
    assert all(torch.equal(whole.adapter[name], again.adapter[name]) for name in whole.adapter)
    assert whole.tables().scores.equals(again.tables().scores)


@pytest.mark.parametrize(
    "fields", [{}, {"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "sgd"}]
)
def test_clients_that_are_stepped_together_move_as_each_would_alone(fields):
    """As on a GPU: one call for all clients that have taken equally many steps."""
    method = parse("method", {"name": "probe", "lr": 0.1, "weight_decay": 0.1, **fields})
    ways = {}
    for together in (True, False):
        params = {"w": torch.ones(3, 4, 2), "b": torch.zeros(3, 2)}
        optimizer = Optimizer(method, params, together)
        draw = torch.Generator().manual_seed(5)
        for first, last in [(0, 3), (0, 2), (0, 3), (2, 3)]:
            grads = {n: torch.randn(last - first, *v.shape[1:], generator=draw) for n, v in params.items()}
            optimizer.step(grads, first, last)
        ways[together] = params | optimizer.moments(2)
        optimizer.reset(lr=0.1)
        assert not any(tensor.any() for k in range(3) for tensor in optimizer.moments(k).values())
    for name, tensor in ways[True].items():
        torch.testing.assert_close(tensor, ways[False][name], rtol=1e-6, atol=1e-7)


def test_a_sum_of_a_whole_stack_is_that_of_its_clients():
    """As on a GPU; a scalar, such as a temperature, is a tensor without dimensions."""
    shared = {"w": torch.ones(2, 3), "scale": torch.tensor(2.0)}
    trained = {"w": torch.arange(12.0).view(2, 2, 3), "scale": torch.tensor([3.0, 5.0])}
    for by_stack in (True, False):
        accumulator = Accumulator(shared, "cpu")
        accumulator.by_stack = by_stack
        accumulator.add([0, 1], trained, [Reply(1.0), Reply(3.0)])
        total = accumulator.sum(np.empty(0, CLIENT_STATS), 1)
        assert total.weight == 4.0
        # scale: 1 * (3 - 2) + 3 * (5 - 2); w: 1 * (k - 1) + 3 * (k + 6 - 1)
        np.testing.assert_array_equal(total.delta, [10.0, *(4.0 * k + 14 for k in range(6))])


@component
class Anchored(Averaging):
    """Every client remembers the parameters of round 0."""

    def init(self, params):
        return {}, {name: tensor.clone() for name, tensor in params.items()}


def test_the_first_memory_of_a_client_is_that_of_round_0_whatever_its_actor_has_evaluated(features, clients, tmp_path):
    task = Task(parse("method", "probe"), Anchored(), seed=0, private=PrivateStore(tmp_path))
    params = initial_params(task, backbone_of(features))
    trainer = ClientWorker(features, clients)
    later = flatten({name: tensor + 1 for name, tensor in params.items()})
    trainer.evaluate(task, 1, later, [], EvaluationRows(("test",)), [(0, 0)])
    trainer.train(task, 2, {1: later}, np.empty(0), Chunk(1, [(0, 0)]))
    (first,) = (tensor for name, tensor in task.private.read(0, 2).items() if name.startswith("rule/"))
    assert torch.equal(first, params["weight"])

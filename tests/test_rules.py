"""Server rules against few lines of their papers' arithmetic in float64, and where one rule becomes another."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from fedsim import Backbone, InputError, Method, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.clients import sample_cohort
from fedsim.methods import Batch, trained
from fedsim.methods._local_training import LocalTraining
from fedsim.methods._wrapper import Wrapper
from fedsim.methods.lora import Lora
from fedsim.params import flatten, unflatten
from fedsim.prepare import prepare
from fedsim.registry import parse
from fedsim.servers import ClientUpdate
from fedsim.servers.fedavg import FedAvg
from fedsim.training.optimizer import Optimizer
from fedsim.training.rows import RuleInputs, TrainRows
from fedsim.training.stack import by_autograd, gradients
from fedsim.training.task import Task
from fedsim.training.train import train_client
from fedsim.updates import CLIENT_STATS, RoundSum, blocks, sum_chunks

WIDTH, CLASSES, LR = 6, 4, 0.1
RNG = torch.Generator()
SGD_METHOD = parse("method", {"name": "probe", "optimizer": "sgd", "lr": LR})


class Bowl:
    """A client whose loss is curve/2 times the squared distance to its target; its sgd takes so many steps a round."""

    def __init__(self, curve, target, steps=3, rows=1):
        self.curve, self.target, self.steps, self.rows = curve, torch.tensor(target, dtype=torch.float64), steps, rows

    def loss(self, params):
        return self.curve / 2 * (params["w"] - self.target).square().sum()


BOWLS = Bowl(1.0, [1.0, 0.0]), Bowl(3.0, [0.0, 2.0]), Bowl(0.5, [-4.0, 5.0])
BEST = sum(bowl.curve * bowl.target for bowl in BOWLS) / sum(bowl.curve for bowl in BOWLS)  # least mean loss


def a_round(server, params, slots, states, cohort, population):
    """One round of the clients of a cohort, by id, as the rule has it; `states` is brought up to date."""
    sent, chunks = server.broadcast(slots, params), []
    for k, client in cohort.items():
        state, live = states.get(k) or server.init(params)[1], params
        for _ in range(client.steps):
            live = {name: value.detach().requires_grad_() for name, value in live.items()}
            slopes = torch.autograd.grad(client.loss(live), list(live.values()))
            live = {name: value.detach() for name, value in live.items()}
            added = server.gradient(live, params, state, sent)
            grads = {name: slope + added.get(name, 0.0) for name, slope in zip(live, slopes, strict=True)}
            live = {name: live[name] - LR * grads[name] for name in live}
        reply = replied(server, params, live, state, sent, client, loss=client.loss(params).item())
        states[k] = reply.client_state
        chunks.append(a_chunk(server, k, client, flatten(live) - flatten(params), reply))
    return server.step(params, slots, sum_chunks(chunks, population), RNG)


def replied(server, received, trained, state=None, sent=None, client=None, staleness=0, method=SGD_METHOD, **fields):
    """What a client replies that has trained."""
    rows, steps = (client.rows, client.steps) if client else (1, 1)
    return server.reply(
        ClientUpdate(received, trained, state or {}, sent or {}, rows, steps, staleness, method, method.lr, **fields)
    )


def a_chunk(server, k, client, delta, reply=None):
    reply = reply or replied(server, {}, {}, client=client)
    stats = np.array([(k, client.rows, client.steps, 0.0, reply.weight)], CLIENT_STATS)
    message = reply.weight * flatten(reply.message).astype(np.float64)
    each = delta[None].astype(np.float32) if server.needs_deltas else None
    alone = flatten(reply.message).astype(np.float64)[None] if server.needs_deltas else None
    return RoundSum(reply.weight * delta, reply.weight, stats, message, each, alone)


def rounds(server, cohorts, population, clients=BOWLS):
    """The parameters after each round of these cohorts; the rule's memory and the clients', at the end."""
    params, kept, seen = {"w": torch.zeros(2, dtype=torch.float64)}, {}, []
    slots, _ = server.init(params)
    for cohort in cohorts:
        params, slots = a_round(server, params, slots, kept, {k: clients[k] for k in cohort}, population)
        seen.append(params["w"])
    return torch.stack(seen), slots, kept


def deltas(*each, **fields):
    """A round in which each client went so far from where it was sent."""
    each = np.array(each, np.float32)
    notes = np.array([(k, 1, 1, 0.0, 1.0) for k in range(len(each))], CLIENT_STATS)
    return RoundSum(np.zeros(0), float(len(each)), notes, deltas=each, population=len(each), **fields)


def stepped(server, total, params=None):
    params = params or {"w": torch.zeros(total.deltas.shape[1], dtype=torch.float64)}
    return server.step(params, {}, total, RNG)[0]["w"].numpy()


FEDAVG = parse("server", "fedavg")
EVERYONE = range(len(BOWLS))


# One rule becomes another ---------------------------------------------------------------------------------------


def test_scaffolds_first_round_is_fedavgs_and_its_second_is_not():
    ours, plain = (rounds(parse("server", name), [EVERYONE] * 2, 3)[0] for name in ("scaffold", "fedavg"))
    assert torch.equal(ours[0], plain[0]) and not torch.allclose(ours[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("weighting", ["uniform", "rows"])
def test_fednova_with_equal_steps_is_fedavg_and_with_unequal_ones_is_not(weighting):
    nova, plain = (parse("server", {"name": name, "weighting": weighting}) for name in ("fednova", "fedavg"))
    alike = [Bowl(1.0, [1.0, 0.0], rows=5), Bowl(2.0, [0.0, 1.0], rows=2)]
    uneven = [Bowl(1.0, [1.0, 0.0], rows=5), Bowl(2.0, [0.0, 1.0], rows=2, steps=9)]
    ours, theirs = (rounds(rule, [range(2)] * 3, 2, alike)[0] for rule in (nova, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours, theirs = (rounds(rule, [range(2)] * 3, 2, uneven)[0] for rule in (nova, plain))
    assert not torch.allclose(ours, theirs, atol=1e-3)


def test_fedprox_with_mu_0_is_fedavg():
    ours = rounds(parse("server", {"name": "fedprox", "mu": 0.0}), [EVERYONE] * 3, 3)[0]
    assert torch.equal(ours, rounds(FEDAVG, [EVERYONE] * 3, 3)[0])
    assert not torch.equal(ours, rounds(parse("server", {"name": "fedprox", "mu": 0.1}), [EVERYONE] * 3, 3)[0])


def test_a_trimmed_mean_that_trims_nothing_is_the_mean():
    each = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    none, some = (parse("server", {"name": "trimmed_mean", "share": share}) for share in (0.0, 0.2))
    np.testing.assert_allclose(stepped(none, deltas(*each)), each.astype(float).mean(axis=0), rtol=1e-14)
    assert not np.allclose(stepped(some, deltas(*each)), each.mean(axis=0))


@pytest.mark.parametrize("m", [1, 3])
def test_krum_among_equals_is_any_of_them(m):
    one = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    assert (stepped(parse("server", {"name": "krum", "m": m}), deltas(*[one] * 5)) == one).all()


# FedYogi --------------------------------------------------------------------------------------------------------


def test_fedyogi_takes_three_steps_of_the_paper_and_differs_from_fedadam_in_the_second_moment_alone():
    fields = {"lr": 0.3, "beta1": 0.6, "beta2": 0.7, "tau": 0.5}
    yogi, adam = (parse("server", {"name": name, **fields}) for name in ("fedyogi", "fedadam"))
    x, m, v = 1.0, 0.0, 0.5**2
    params = {"w": torch.tensor([1.0], dtype=torch.float64)}
    (slots, _), (theirs, _) = yogi.init(params), adam.init(params)
    for d in (2.0, -0.1, 0.4):  # the second moment rises, and falls
        m = 0.6 * m + 0.4 * d
        v = v - 0.3 * d**2 * np.sign(v - d**2)
        x = x + 0.3 * m / (v**0.5 + 0.5)
        total = RoundSum(np.array([2 * d]), 2.0, np.zeros(2, CLIENT_STATS))
        _, theirs = adam.step(params, theirs, total, RNG)
        params, slots = yogi.step(params, slots, total, RNG)
        assert params["w"].item() == pytest.approx(x, rel=1e-13)
        assert slots["second"]["w"].item() == pytest.approx(v, rel=1e-13)
        assert torch.equal(slots["first"]["w"], theirs["first"]["w"])
    assert abs(slots["second"]["w"].item() - theirs["second"]["w"].item()) > 0.1


# FedNova --------------------------------------------------------------------------------------------------------


def test_fednova_counts_directions_and_not_steps():
    # 1 step to 1 and 3 steps to 6 are directions of 1 and 2, on average 1.5, of which 2 steps on average go 3.
    server, params = parse("server", "fednova"), {"w": torch.tensor([0.0])}
    parts = [
        a_chunk(server, k, Bowl(1.0, [], steps, rows), np.array([went]))
        for k, (steps, rows, went) in enumerate([(1, 30, 1.0), (3, 10, 6.0)])
    ]
    assert server.step(params, {}, sum_chunks(parts), RNG)[0]["w"] == 3.0
    # By rows, 3 to 1: a direction of 1.25, and 1.5 steps.
    server = parse("server", {"name": "fednova", "weighting": "rows"})
    parts = [
        a_chunk(server, k, Bowl(1.0, [], steps, rows), np.array([went]))
        for k, (steps, rows, went) in enumerate([(1, 30, 1.0), (3, 10, 6.0)])
    ]
    assert server.step(params, {}, sum_chunks(parts), RNG)[0]["w"] == 1.875


def test_fednova_leaves_out_who_took_no_step():
    server, params = parse("server", "fednova"), {"w": torch.tensor([1.0])}
    none = a_chunk(server, 0, Bowl(1.0, [], steps=0), np.array([0.0]))
    some = a_chunk(server, 1, Bowl(1.0, [], steps=2), np.array([4.0]))
    assert server.step(params, {}, sum_chunks([none, some]), RNG)[0]["w"] == 5.0
    assert server.step(params, {}, none, RNG)[0]["w"] == 1.0


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_fednova_knows_how_far_momentum_carries_a_steady_gradient(steps):
    method = parse("method", {"name": "probe", "optimizer": "sgd", "momentum": 0.9, "lr": 1.0})
    server = parse("server", "fednova")
    assert server.adapt(method) is method
    place = torch.zeros(1, 1)
    optimizer = Optimizer(method, {"place": place})
    for _ in range(steps):
        optimizer.step({"place": -torch.ones(1, 1)})
    reply = replied(server, {}, {}, client=Bowl(1.0, [], steps), method=method)
    assert 1 / reply.weight == pytest.approx(place.item(), rel=1e-6)


def test_fednova_refuses_a_momentum_that_goes_on_from_round_to_round():
    server, sgd = parse("server", "fednova"), {"name": "probe", "optimizer": "sgd", "momentum": 0.5}
    with pytest.raises(InputError, match=r"set --method\.persist-optimizer false"):
        server.adapt(parse("method", sgd | {"persist_optimizer": True}))
    adam = parse("method", {"name": "probe", "momentum": 0.5, "persist_optimizer": True})  # it never reads the momentum
    assert server.adapt(adam) is adam
    assert replied(server, {}, {}, client=Bowl(1.0, [], steps=4), method=adam).weight == 1 / 4


# SCAFFOLD -------------------------------------------------------------------------------------------------------


def test_scaffold_takes_the_steps_of_the_paper_whoever_trains():
    cohorts = [(0, 1), (1, 2), (0, 1, 2), (2,), (0, 2)]
    ours, slots, kept = rounds(parse("server", {"name": "scaffold", "lr": 0.8}), cohorts, population=3)
    x, c, own = np.zeros(2), np.zeros(2), [np.zeros(2) for _ in BOWLS]
    for place, cohort in zip(ours, cohorts, strict=True):
        moves, changes = [], []
        for k in cohort:
            y, (curve, target) = x.copy(), (BOWLS[k].curve, BOWLS[k].target.numpy())
            for _ in range(3):
                y = y - LR * (curve * (y - target) - own[k] + c)
            now = own[k] - c + (x - y) / (3 * LR)
            moves.append(y - x)
            changes.append(now - own[k])
            own[k] = now
        x, c = x + 0.8 * np.mean(moves, axis=0), c + np.sum(changes, axis=0) / 3
        np.testing.assert_allclose(place.numpy(), x, rtol=1e-12)
    np.testing.assert_allclose(slots["variate"]["w"].numpy(), c, rtol=1e-12)
    for k, variate in enumerate(own):
        np.testing.assert_allclose(kept[k]["variate.w"].numpy(), variate, rtol=1e-12)


@pytest.mark.parametrize("name, rule", [("scaffold", {}), ("feddyn", {"alpha": 1.0})])
def test_drift_is_corrected_where_fedavg_ends_elsewhere(name, rule):
    clients = [Bowl(bowl.curve, bowl.target.tolist(), steps=8) for bowl in BOWLS]
    servers = parse("server", {"name": name} | rule), FEDAVG
    ours, plain = (rounds(server, [EVERYONE] * 100, 3, clients)[0][-1] for server in servers)
    torch.testing.assert_close(ours, BEST, rtol=0, atol=1e-6)
    assert (plain - BEST).abs().max() > 0.1


def test_a_client_of_scaffold_without_a_step_keeps_its_variate_and_sends_a_message_of_zeros():
    server, params = parse("server", "scaffold"), {"w": torch.ones(2)}
    kept, sent = {"variate.w": torch.tensor([1.0, 2.0])}, {"variate.w": torch.tensor([5.0, 5.0])}
    reply = replied(server, params, params, kept, sent, Bowl(1.0, [], steps=0))
    assert reply.client_state["variate.w"].tolist() == [1.0, 2.0] and reply.message["variate.w"].tolist() == [0.0, 0.0]


def test_scaffold_wants_plain_sgd_and_twice_the_bytes():
    server = parse("server", "scaffold")
    with pytest.raises(InputError, match=r"which needs plain SGD; set --method\.optimizer sgd .*, not adam"):
        server.adapt(parse("method", "probe"))
    with pytest.raises(InputError, match=r"momentum would lengthen; set --method\.momentum 0, not 0\.9"):
        server.adapt(parse("method", {"name": "probe", "optimizer": "sgd", "momentum": 0.9}))
    assert server.adapt(parse("method", {"name": "probe", "optimizer": "sgd"}))
    task = Task(SGD_METHOD, server, seed=0)
    assert task.payload({"w": torch.zeros(3)}, cohort=2) == (4 * (3 + 3), 4 * (3 + 3))


# FedDyn ---------------------------------------------------------------------------------------------------------


def test_feddyn_of_one_client_over_two_rounds_by_hand():
    server, params = parse("server", {"name": "feddyn", "alpha": 0.5}), {"w": torch.tensor([0.0])}
    slots, kept = server.init(params)
    assert server.gradient(params, params, kept, {})["w"] == 0.0
    # It goes from 0 to 1: it keeps -0.5 * 1, as does the server, which goes on to 1 + 0.5 / 0.5.
    # From there to 1.5: both keep -0.5 + 0.5 * 0.5, and the server goes to 1.5 + 0.25 / 0.5.
    for ended, keeps, goes in ((1.0, -0.5, 2.0), (1.5, -0.25, 2.0)):
        received, after = params, {"w": torch.tensor([ended])}
        reply = replied(server, received, after, kept)
        kept = reply.client_state
        assert not reply.message and kept["gradient.w"] == keeps
        assert server.gradient(params, params, kept, {})["w"] == -keeps
        total = RoundSum(flatten(after) - flatten(received), 1.0, np.zeros(1, CLIENT_STATS), population=1)
        params, slots = server.step(params, slots, total, RNG)
        assert params["w"] == goes


def test_the_servers_memory_in_feddyn_is_the_mean_of_what_all_clients_keep():
    _, slots, kept = rounds(parse("server", "feddyn"), [(0, 1), (2,), (0, 2)], population=3)
    mean = sum(kept[k]["gradient.w"] for k in EVERYONE) / 3
    assert mean.abs().min() > 1e-3
    torch.testing.assert_close(slots["drift"]["w"], mean, rtol=1e-12, atol=0)


def test_feddyns_clients_keep_the_gradient_of_their_own_loss_where_they_ended():
    clients = [Bowl(bowl.curve, bowl.target.tolist(), steps=400) for bowl in BOWLS]
    server, params, kept = parse("server", {"name": "feddyn", "alpha": 0.2}), {"w": torch.zeros(2).double()}, {}
    for client in range(3):
        a_round(server, params, server.init(params)[0], kept, {client: clients[client]}, 3)
        ended = params["w"] - kept[client]["gradient.w"] / 0.2
        slope = clients[client].curve * (ended - clients[client].target)
        torch.testing.assert_close(kept[client]["gradient.w"], slope, rtol=1e-9, atol=1e-9)


# FedExP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "rows"])
def test_fedexp_takes_the_steps_of_the_paper(weighting):
    clients = [Bowl(bowl.curve, bowl.target.tolist(), rows=rows) for bowl, rows in zip(BOWLS, (5, 1, 3), strict=True)]
    cohorts = [(0, 1, 2), (1, 2), (0, 1, 2)]
    server = parse("server", {"name": "fedexp", "eps": 0.01, "weighting": weighting})
    ours, slots, _ = rounds(server, cohorts, 3, clients)
    x, factors = np.zeros(2), []
    for place, cohort in zip(ours, cohorts, strict=True):
        moves = []
        for k in cohort:
            y = x
            for _ in range(3):
                y = y - LR * clients[k].curve * (y - clients[k].target.numpy())
            moves.append(y - x)
        shares = np.array([clients[k].rows if weighting == "rows" else 1 for k in cohort])
        shares = shares / shares.sum()
        mean = shares @ moves
        squares = shares @ [move @ move for move in moves]
        factors.append(max(1, squares / (2 * (mean @ mean + 0.01))))
        before, x = x, x + factors[-1] * mean
        np.testing.assert_allclose(place.numpy(), x, rtol=1e-12)
    assert max(factors) > 1.5 and min(factors) == 1
    at = server.evaluated({"w": ours[-1]}, slots)["w"]
    np.testing.assert_allclose(at.numpy(), (before + x) / 2, rtol=1e-12)


def test_equal_deltas_of_fedexp_are_fedavgs_and_orthogonal_ones_go_half_as_many_times_as_far():
    server = parse("server", {"name": "fedexp", "eps": 1e-30})
    params = {"w": torch.zeros(3, dtype=torch.float64)}

    def goes(*each):
        chunks = []
        for k, delta in enumerate(each):
            reply = replied(server, params, {"w": torch.tensor(delta, dtype=torch.float64)})
            chunks.append(a_chunk(server, k, Bowl(1.0, []), np.array(delta), reply))
        return server.step(params, server.init(params)[0], sum_chunks(chunks), RNG)[0]["w"].tolist()

    assert goes([1.0, 2.0, 0.0], [1.0, 2.0, 0.0]) == [1.0, 2.0, 0.0]
    assert goes([6.0, 0.0, 0.0], [0.0, 6.0, 0.0], [0.0, 0.0, 6.0]) == [3.0, 3.0, 3.0]  # 3 / 2 of the mean
    assert goes([0.0] * 3, [0.0] * 3) == [0.0] * 3


# q-FedAvg -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.5, 2.0])
def test_q_fedavg_takes_the_steps_of_the_paper(q):
    cohorts = [(0, 1, 2), (1, 2), (0, 1, 2)]
    ours, _, _ = rounds(parse("server", {"name": "q_fedavg", "q": q}), cohorts, 3)
    x = np.zeros(2)
    for place, cohort in zip(ours, cohorts, strict=True):
        steps, heights = np.zeros(2), 0.0
        for k in cohort:
            curve, target, y = BOWLS[k].curve, BOWLS[k].target.numpy(), x
            loss = curve / 2 * ((x - target) ** 2).sum() + 1e-10
            for _ in range(3):
                y = y - LR * curve * (y - target)
            gradient = (x - y) / LR
            steps += loss**q * gradient
            heights += q * loss ** (q - 1) * gradient @ gradient + loss**q / LR
        x = x - steps / heights
        np.testing.assert_allclose(place.numpy(), x, rtol=1e-12)


def test_q_fedavg_with_q_0_is_fedavg_to_the_bit_and_a_large_q_serves_the_client_that_is_served_worst():
    plain = rounds(FEDAVG, [EVERYONE] * 3, 3)[0]
    assert torch.equal(rounds(parse("server", {"name": "q_fedavg", "q": 0.0}), [EVERYONE] * 3, 3)[0], plain)
    worst = {}
    for q in (0.0, 5.0):
        server = parse("server", {"name": "q_fedavg", "q": q, "lipschitz": 0.1})
        ended = {"w": rounds(server, [EVERYONE] * 200, 3)[0][-1]}
        worst[q] = max(bowl.loss(ended).item() for bowl in BOWLS)
    assert worst[5.0] < 0.8 * worst[0.0]


def test_a_client_of_q_fedavg_without_a_step_does_not_count_and_one_without_a_loss_counts_little():
    server, params = parse("server", "q_fedavg"), {"w": torch.zeros(1, dtype=torch.float64)}
    idle, perfect = Bowl(1.0, [], steps=0), Bowl(1.0, [])
    reply = replied(server, params, params, client=idle)
    assert reply.weight == 0.0 and reply.message.keys() == replied(server, params, params, loss=1.0).message.keys()
    none = a_chunk(server, 0, idle, np.zeros(1), reply)
    assert server.step(params, {}, none, RNG)[0] is params
    some = replied(server, params, params, client=perfect, loss=0.0)
    assert some.weight == 1e-10 and some.message["curvature"] == 1.0


@component
class Watched(FedAvg):
    """Writes down what it is given."""

    needs_loss = True

    def reply(self, update):
        LOSSES.append(update.loss)
        return super().reply(update)


LOSSES = []


@pytest.mark.parametrize("engine", ["stacked", "reference"])
def test_a_rule_that_needs_it_gets_each_clients_loss_before_it_trains(engine, config):
    fields = {"method": SGD | {"local_epochs": 2, "batch_size": 7}, "clients": 4, "cohort": 3, "rounds": 1}
    ours = config(server=Watched(), **fields, dtype="float64", partition="dirichlet", engine=engine)
    LOSSES.clear()
    watched = run(ours)
    experiment, frame = prepare(ours), pd.read_parquet(ours.data_dir / "features.parquet")
    text = np.stack(pd.read_parquet(ours.data_dir / "classes.parquet").prototype)
    scale, expected = experiment.data.source.class_embeddings.logit_scale, []
    for client in sample_cohort(4, 3, ours.seed, 1):
        rows = experiment.clients[client].train
        x, y = np.stack(frame.feature[rows]), torch.tensor(experiment.data.source.y[rows])
        cosines = normalize(torch.tensor(x), dim=1) @ normalize(torch.tensor(text), dim=1).T
        expected.append(cross_entropy(scale * cosines, y).item())
    losses = sorted(loss for loss in LOSSES if not np.isnan(loss))  # without those of the question what it sends
    assert losses == pytest.approx(sorted(expected), rel=1e-6) and np.ptp(expected) > 0.05
    plain = run(config(**fields, dtype="float64", partition="dirichlet", engine=engine, out=ours.out.with_name("b")))
    assert (adapter(plain) == adapter(watched)).all()


# FedJudge -------------------------------------------------------------------------------------------------------


def test_fedjudge_takes_the_steps_of_the_paper_whoever_trains():
    cohorts = [(0, 1), (1, 2), (0, 1, 2), (0, 2)]
    ours, _, kept = rounds(parse("server", {"name": "fedjudge", "pull": 0.01}), cohorts, population=3)
    x, importance = np.zeros(2), [np.zeros(2) for _ in BOWLS]
    for place, cohort in zip(ours, cohorts, strict=True):
        moves = []
        for k in cohort:
            y, (curve, target) = x, (BOWLS[k].curve, BOWLS[k].target.numpy())
            for _ in range(3):
                total = importance[k] @ abs(y - x)
                pull = 0.01 * (1 + 2 * total) * importance[k] * np.sign(y - x)  # of 0.01 * (S + S^2)
                y = y - LR * (curve * (y - target) + pull)
            importance[k] = abs(x - y) / (3 * LR)
            moves.append(y - x)
        x = x + np.mean(moves, axis=0)
        np.testing.assert_allclose(place.numpy(), x, rtol=1e-12)
    for k, each in enumerate(importance):
        np.testing.assert_allclose(kept[k]["importance.w"].numpy(), each, rtol=1e-12)


def test_fedjudges_first_round_is_fedavgs_and_so_are_all_without_a_pull():
    ours, off, plain = (
        rounds(parse("server", fields), [EVERYONE] * 2, 3)[0]
        for fields in ("fedjudge", {"name": "fedjudge", "pull": 0.0}, "fedavg")
    )
    assert torch.equal(ours[0], plain[0]) and not torch.allclose(ours[1], plain[1], atol=1e-3)
    assert torch.equal(off, plain)


# Rules that see each delta ----------------------------------------------------------------------------------------


def test_a_median_goes_parameter_by_parameter_and_halves_the_middle_of_an_even_number():
    median = parse("server", "median")
    assert stepped(median, deltas([1, 9], [2, 8], [1e9, -1e9])).tolist() == [2.0, 8.0]
    assert stepped(median, deltas([1.0], [2.0], [4.0], [1e9])).tolist() == [3.0]


def test_a_trimmed_mean_cuts_as_many_at_each_end_as_the_share_says_rounded_down():
    each = [[0.0], [100.0], [2.0], [3.0], [7.0]]
    trimmed = {share: parse("server", {"name": "trimmed_mean", "share": share}) for share in (0.19, 0.2, 0.4)}
    assert stepped(trimmed[0.2], deltas(*each)).tolist() == [4.0]  # (2 + 3 + 7) / 3
    assert stepped(trimmed[0.4], deltas(*each)).tolist() == [3.0]
    assert stepped(trimmed[0.19], deltas(*each)) == pytest.approx(22.4)
    many = parse("server", {"name": "trimmed_mean", "share": 0.29})  # of 100: 29, though 0.29 * 100 is below it
    each = [[0.0]] * 28 + [[-30.0]] + [[1.0]] * 42 + [[30.0]] * 29
    assert stepped(many, deltas(*each)).tolist() == [1.0]


@pytest.mark.parametrize("seed", range(10))
def test_krum_is_its_papers_score(seed):
    rng = np.random.default_rng(seed)
    each = np.concatenate([rng.standard_normal((6, 2)), 1 + rng.standard_normal((2, 2))]).astype(np.float32)
    scores = []
    for k in range(8):  # f = 2: the sum over the 8 - 2 - 2 nearest others
        apart = sorted(((each[k].astype(float) - each[j]) ** 2).sum() for j in range(8) if j != k)
        scores.append(sum(apart[:4]))
    for m in (1, 3):
        best = np.argsort(scores)[:m]
        ours = stepped(parse("server", {"name": "krum", "f": 2, "m": m}), deltas(*each))
        np.testing.assert_allclose(ours, each[best].astype(float).mean(axis=0), rtol=1e-12)


def test_krum_takes_the_first_of_those_that_tie():
    # 0 and 1 lie 1 apart, as do 8 and 9; f = 0 leaves each its 2 nearest: scores 65, 50, 50 and 65.
    assert stepped(parse("server", {"name": "krum", "f": 0}), deltas([0.0], [1.0], [8.0], [9.0])).tolist() == [1.0]
    assert stepped(parse("server", {"name": "krum", "f": 0}), deltas([9.0], [8.0], [1.0], [0.0])).tolist() == [8.0]


def test_krum_says_how_many_clients_it_wants():
    with pytest.raises(InputError, match="krum with f 1 needs at least 5 clients per round, not 4"):
        parse("server", "krum").check({}, 4)
    with pytest.raises(InputError, match="can average at most 4 of 5 clients, not 5"):
        parse("server", {"name": "krum", "m": 5}).check({}, 5)


def test_krum_changes_nothing_where_too_few_have_answered():
    params = {"w": torch.tensor([7.0])}
    four = deltas([1.0], [1.0], [1.0], [1.0])
    assert parse("server", "krum").step(params, {}, four, RNG)[0] is params


@pytest.mark.parametrize("name", ["median", {"name": "trimmed_mean", "share": 0.2}, "krum"])
def test_who_took_no_step_has_no_voice(name):
    # Zeros of two idle clients would be the median of six, and nearest to everybody.
    total = deltas([0.0], [5.0], [6.0], [7.0], [8.0], [9.0], [0.0])
    total.clients["steps"] = [0, 2, 2, 2, 2, 2, 0]
    moved_by = parse("server", name).step({"w": torch.tensor([0.0])}, {}, total, RNG)[0]["w"].item()
    assert moved_by == (6.0 if name == "krum" else 7.0)  # of 6, 7 and 8, which are equally near, the first
    total.clients["steps"] = 0
    assert parse("server", name).step({"w": torch.tensor([1.0])}, {}, total, RNG)[0]["w"].item() == 1.0


def test_a_trimmed_mean_that_trims_nobody_is_refused():
    rule = parse("server", "trimmed_mean")
    with pytest.raises(InputError, match=r"cuts none of 9 clients, which is fedavg; set --server.share to 0\.111"):
        rule.check({}, 9)
    assert rule.check({}, 10) is None and parse("server", {"name": "trimmed_mean", "share": 0}).check({}, 9) is None


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_rules_that_see_each_delta_see_all_of_a_large_one(name):
    # More parameters than are looked at at once; the tensors lie in the order of their names.
    rng = np.random.default_rng(0)
    each = rng.standard_normal((5, 70_000)).astype(np.float32)
    each[2] = 0.0
    params = {"b": torch.zeros(30_000), "a": torch.zeros(40_000)}
    expected = {
        "median": np.median(each, axis=0),
        "trimmed_mean": np.sort(each, axis=0)[1:4].mean(axis=0),
        "krum": each[2],
    }
    server = parse("server", {"name": name} | ({"share": 0.2} if name == "trimmed_mean" else {}))
    after, _ = server.step(params, {}, deltas(*each), RNG)
    like = unflatten(expected[name], params)
    for tensor in params:
        torch.testing.assert_close(after[tensor], like[tensor], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "scaffold", "feddyn"])
def test_rules_without_weights_say_so(name):
    with pytest.raises(InputError, match="no field 'weighting'"):
        parse("server", {"name": name, "weighting": "rows"})


def test_a_rule_that_reads_deltas_must_say_that_it_needs_them():
    total = RoundSum(np.zeros(2), 1.0, np.zeros(1, CLIENT_STATS))
    with pytest.raises(TypeError, match="set `needs_deltas = True` in the server rule"):
        list(blocks(total))


# FedPer ---------------------------------------------------------------------------------------------------------


def test_fedper_keeps_what_is_named_and_shares_the_rest():
    server = parse("server", "fedper")
    scopes = {name: server.scope(name, "shared") for name in ("head.weight", "ahead", "adapter.head")}
    assert scopes == {"head.weight": "private", "ahead": "shared", "adapter.head": "shared"}
    assert server.scope("head.weight", "frozen") == "frozen"
    assert parse("server", {"name": "fedper", "prefix": "adapter"}).scope("adapter.head", "shared") == "private"


def test_fedper_names_tensors_where_none_is_called_so():
    params = parse("method", "fedclip").build(a_backbone()).state_dict()
    with pytest.raises(InputError, match=r"begin with 'head'; .* --server\.prefix .* attention\.0\.bias, attention"):
        parse("server", "fedper").check(params, 3)
    assert parse("server", {"name": "fedper", "prefix": "attention.2"}).check(params, 3) is None
    for prefix, words in (
        ("attention.2,head", "none .* with 'head'"),
        ("attention.0,attention", "all .* 'attention.0"),
    ):
        with pytest.raises(InputError, match=words):
            parse("server", {"name": "fedper", "prefix": prefix}).check(params, 3)


def test_fedper_keeps_several_blocks_of_a_tower_and_sends_the_others():
    # As in FedSplitBERT; blocks 10 and 11 are not those that begin with 1.
    names = [f"text.transformer/resblocks/{k}/mlp/c_fc/weight" for k in range(12)]
    for prefix in (
        "text.transformer/resblocks/0/,text.transformer/resblocks/1/",
        ["text.transformer/resblocks/0/", names[1]],
    ):
        server = parse("server", {"name": "fedper", "prefix": prefix})
        assert [name for name in names if server.scope(name, "shared") == "private"] == names[:2]
        assert server.check(dict.fromkeys(names, torch.zeros(2, 2)), 3) is None


# Ditto ----------------------------------------------------------------------------------------------------------


def a_backbone(**fields):
    text = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Backbone(normalize(text, dim=1), 10.0, **fields)


def a_batch(*shape):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, WIDTH, generator=draw, dtype=torch.float64)
    return x, torch.randint(CLASSES, shape, generator=draw)


def built(method, **fields):
    torch.manual_seed(3)
    return method.build(a_backbone(**fields)).double()


def trains(method, module, server=FEDAVG):
    """The module's tensors after one client's round."""
    rows = TrainRows(*a_batch(21), [21])
    state = module.state_dict()
    shared = {name: state[name] for name in state if server.scope(name, method.scope(name)) == "shared"}
    optimizer, rng = (
        Optimizer(method, {n: v.data.unsqueeze(0) for n, v in module.named_parameters()}),
        torch.Generator().manual_seed(2),
    )
    train_client(module, optimizer, rows, method, server, RuleInputs(shared), rng)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def halves(state):
    return [{n.removeprefix(half): v for n, v in state.items() if n.startswith(half)} for half in ("shared.", "own.")]


@pytest.mark.parametrize("lam", [0.0, 2.0])
@pytest.mark.parametrize(
    "fields",
    [{"name": "probe"}, {"name": "fedclip", "optimizer": "sgd", "lr": 0.01}, {"name": "probe", "clip_norm": 0.1}],
)
def test_the_shared_half_of_ditto_is_fedavgs_and_with_lam_0_the_own_half_trains_alone(fields, lam):
    method = parse("method", fields | {"batch_size": 4, "local_epochs": 2})
    server = parse("server", {"name": "ditto", "lam": lam})
    twins = server.adapt(method)
    module, alone, elsewhere = built(twins), built(method), built(method)
    assert all(torch.equal(a, b) for a, b in zip(*(half.values() for half in halves(module.state_dict())), strict=True))
    with torch.no_grad():
        for name, tensor in module.own.named_parameters():
            tensor.add_(0.3)
            elsewhere.get_parameter(name).copy_(tensor)
    expected, apart = trains(method, alone), trains(method, elsewhere)
    shared, own = halves(trains(twins, module, server))
    assert shared.keys() == own.keys() == expected.keys()
    assert all(torch.equal(shared[name], expected[name]) for name in expected)
    assert all(torch.equal(own[name], apart[name]) for name in apart) == (lam == 0.0)


def test_a_huge_lam_pulls_a_clients_own_model_to_what_it_received():
    method = parse("method", {"name": "probe", "optimizer": "sgd", "lr": 1e-3, "batch_size": 4})
    server = parse("server", {"name": "ditto", "lam": 1000.0})  # times lr is 1: a step goes all the way
    twins = server.adapt(method)
    module = built(twins)
    received = module.shared.weight.detach().clone()
    with torch.no_grad():
        module.own.weight.add_(0.3)
    own = trains(twins, module, server)["own.weight"]
    assert 0 < (own - received).abs().max() < 0.03


def test_dittos_pull_is_lam_times_the_distance_and_moves_the_own_half_alone():
    server = parse("server", {"name": "ditto", "lam": 4.0})
    params = {"shared.w": torch.tensor([5.0]), "own.w": torch.tensor([3.0])}
    added = server.gradient(params, {"shared.w": torch.tensor([1.0])}, {}, {})
    assert added == {"own.w": 8.0}  # 4 * (3 - 1): to what was received, and not to what has become of it


def test_of_ditto_the_shared_half_travels_and_hyperparameters_are_the_methods():
    method = parse("method", {"name": "fedclip", "lr": 0.03, "batch_size": 7})
    twins = parse("server", "ditto").adapt(method)
    scopes = {name.partition(".")[0]: twins.scope(name) for name in built(twins).state_dict()}
    assert scopes == {"shared": "shared", "own": "private"}
    assert (twins.lr, twins.batch_size, twins.beta2, twins.min_batch) == (0.03, 7, 0.98, 2)
    assert twins.steps(15) == method.steps(15) == 2 and twins.reads == method.reads


def test_methods_that_hold_another_pass_on_everything_that_they_do_not_define():
    @component
    class Other(Lora):
        pass

    own = {field.name for field in dataclasses.fields(Method)} | {"reject_booleans_for_numbers"}
    hooks = {name for name in vars(LocalTraining) | vars(Method) if not name.startswith("_")} - own
    assert {"joint_classes", "fixed_rounds", "steps", "lr_in", "local_rows"} <= hooks
    for name in hooks:
        setattr(Other, name, f"its {name}")
    for rule in ("ditto", "fedex_lora", "pfedme", "moon"):
        holder = parse("server", rule).adapt(Other(lr=0.5, label_space="client"))
        above = [kind for kind in type(holder).mro() if issubclass(kind, Wrapper) and kind is not Wrapper]
        passed_on = hooks - {name for kind in above for name in vars(kind)}
        assert {name: getattr(holder, name) for name in passed_on} == {name: f"its {name}" for name in passed_on}
        assert (holder.lr, holder.label_space) == (0.5, "client")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fields", ["probe", "fedclip", {"name": "fedclip", "objective": "cross_entropy"}])
def test_dittos_gradients_are_those_of_both_losses_whatever_classes_are_active(fields, masked):
    twins = parse("server", "ditto").adapt(parse("method", fields))
    module = built(twins)
    draw = torch.Generator().manual_seed(7)
    params = {n: torch.randn(3, *t.shape, generator=draw, dtype=t.dtype) for n, t in module.state_dict().items()}
    x, y = a_batch(3, 5)
    masks = torch.ones(3, CLASSES, dtype=torch.bool)
    if masked:
        masks[0, 3], masks[1, 0] = False, False
        y = torch.where(masks.gather(1, y), y, 1)
    calls = []
    hook = module.own.register_forward_hook(lambda *args: calls.append(1))
    losses, grads = gradients(twins, module, params, Batch(x, y, masks if masked else None))
    hook.remove()
    if fields != "probe" and not (masked and "objective" in fields):
        assert not calls  # the closed form asks no forward
    assert grads.keys() == params.keys()
    for k in range(3):
        module.load_state_dict({name: tensor[k] for name, tensor in params.items()})
        loss = twins.loss(module, Batch(x[k], y[k], masks[k]))
        torch.testing.assert_close(losses[k], loss, rtol=1e-11, atol=1e-11)
        for name, grad in zip(trained(module), torch.autograd.grad(loss, list(module.parameters())), strict=True):
            torch.testing.assert_close(grads[name][k], grad, rtol=1e-9, atol=1e-12)


def test_ditto_predicts_with_the_own_half_and_inactive_classes_are_masked_in_both():
    twins = parse("server", "ditto").adapt(parse("method", "probe"))
    module, (x, _) = built(twins), a_batch(5)
    y = torch.tensor([0, 2, 1, 0, 2])
    with torch.no_grad():
        module.shared.weight.mul_(-1)
    assert torch.equal(module(x, None), module.own(x, None)) and not torch.equal(
        module(x, None), module.shared(x, None)
    )
    module.shared.load_state_dict(module.own.state_dict())
    classes = torch.tensor([True, True, True, False])
    alone = cross_entropy(10 * normalize(x, dim=1) @ module.own.weight[:3].T, y)
    assert twins.loss(module, Batch(x, y, classes)).item() == pytest.approx(2 * alone.item(), rel=1e-12)
    logits = module(x, classes)
    assert (logits[:, 3] == -torch.inf).all() and logits[:, :3].isfinite().all()


class Asked(nn.Module):
    """Computes for active classes alone, and holds a tower that is no part of it."""

    def __init__(self, backbone):
        super().__init__()
        self.tower = backbone.text
        self.weight = nn.Parameter(torch.randn(len(backbone.class_embeddings), backbone.width))

    def forward(self, x, classes):
        logits = x.new_full((len(x), len(self.weight)), -torch.inf)
        return logits.index_copy(1, classes.nonzero().flatten(), x @ self.weight[classes].T)


@component
class Asking(Method):
    def build(self, backbone):
        return Asked(backbone)

    def loss(self, module, batch):
        return cross_entropy(module(batch.x, batch.classes), batch.y) + batch.classes.sum()

    def scope(self, name):
        return "frozen" if name == "weight" else "shared"


@component
class TowersAsking(Asking):
    """Reads a tower, so that clients are computed one by one and indices may depend on values."""

    @property
    def sites(self):
        return ("text_tokens",)


def test_both_halves_of_ditto_are_given_the_active_classes_and_no_tower_is_copied():
    twins, tower = parse("server", "ditto").adapt(Asking()), object()
    module = built(twins, text_tower=tower)
    assert module.shared.tower is module.own.tower is tower
    assert torch.equal(module.shared.weight, module.own.weight) and module.shared.weight is not module.own.weight
    assert {twins.scope(name) for name in module.state_dict()} == {"frozen"} and len(module.state_dict()) == 2
    x, y = a_batch(5)[0], torch.tensor([0, 2, 1, 0, 2])
    classes = torch.ones(CLASSES, dtype=torch.bool)
    whole = twins.loss(module, Batch(x, y, classes))
    classes[3] = False
    assert (module(x, classes)[:, 3] == -torch.inf).all()
    one = cross_entropy((x @ module.own.weight.T)[:, :3], y) + 3
    assert twins.loss(module, Batch(x, y, classes)).item() == pytest.approx(2 * one.item()) != whole.item()
    params = {name: tensor.unsqueeze(0) for name, tensor in module.state_dict().items()}
    twins = parse("server", "ditto").adapt(TowersAsking())
    losses, grads = gradients(twins, module, params, Batch(x[None], y[None], classes[None]))
    assert losses.item() == pytest.approx(2 * one.item()) and grads.keys() == params.keys()
    assert torch.equal(losses, by_autograd(twins, module, params, Batch(x[None], y[None], classes[None]))[0])


# In a run -------------------------------------------------------------------------------------------------------

SGD = {"name": "probe", "optimizer": "sgd", "lr": 0.01, "batch_size": 8}
PER = {"name": "fedper", "prefix": "attention.2"}


def adapter(report):
    return flatten(report.adapter)


def test_in_a_run_rules_become_fedavg_where_they_should(config, tmp_path):
    def of(server, rounds):
        name = server if isinstance(server, str) else server["name"]
        fields = {"method": SGD, "clients": 4, "rounds": rounds, "partition": "iid", "dtype": "float64"}
        return adapter(run(config(server=server, **fields, out=tmp_path / f"{name}-{rounds}")))

    one, three = of("fedavg", 1), of("fedavg", 3)
    np.testing.assert_allclose(of("scaffold", 1), one, rtol=1e-12)
    np.testing.assert_allclose(of("fednova", 3), three, rtol=1e-12)
    # Each client's delta is rounded to float32.
    np.testing.assert_allclose(of({"name": "trimmed_mean", "share": 0.0}, 3), three, rtol=0, atol=1e-6)


@pytest.mark.parametrize("server", ["scaffold", "feddyn", "fedexp", "q_fedavg", "fedjudge", "ditto", "median", PER])
def test_in_a_run_stacked_clients_go_where_single_ones_go(server, config, tmp_path):
    method = SGD | {"name": "fedclip"} if server is PER else SGD  # which has more than one tensor
    fields = {"method": method, "server": server, "clients": 6, "cohort": 4, "dtype": "float64"}
    stacked, single = (run(config(**fields, chunk=4, engine=k, out=tmp_path / k)) for k in ("stacked", "reference"))
    np.testing.assert_allclose(adapter(stacked), adapter(single), rtol=1e-7)
    assert stacked.tables().trained.scores.correct.tolist() == single.tables().trained.scores.correct.tolist()


def test_in_a_run_scaffold_doubles_the_bytes_fedexp_sends_a_number_and_dittos_shared_half_is_fedavg(config, tmp_path):
    sent, last = {}, {}
    for name in ("fedavg", "scaffold", "ditto", "fedexp"):
        ours = config(method=SGD, server=name, clients=4, rounds=3, out=tmp_path / name)
        sent[name] = run(ours).tables().rounds[["bytes_up", "bytes_down"]].to_numpy()
        last[name] = load_checkpoint(ours.folder(), ours.experiment())[0].params
    assert (sent["scaffold"] == 2 * sent["fedavg"]).all() and (sent["ditto"] == sent["fedavg"]).all()
    assert (sent["fedexp"] - sent["fedavg"] == [4 * 8, 0]).all()  # a number of float64 of each client
    torch.testing.assert_close(last["ditto"]["shared.weight"], last["fedavg"]["weight"], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(last["scaffold"]["weight"], last["fedavg"]["weight"], rtol=0, atol=1e-5)


def test_krum_refuses_a_small_cohort_in_a_run(config):
    with pytest.raises(InputError, match="krum with f 1 needs at least 5 clients per round, not 3"):
        run(config(server="krum", clients=6, cohort=3, rounds=1))


def test_the_deltas_of_float64_are_not_rounded_where_a_rule_needs_each(config):
    """Of one client the median is its delta, which is also the mean."""
    fields = {"partition": "iid", "clients": 1, "rounds": 1, "dtype": "float64", "method": "probe"}
    found = [
        run(config(**fields, server=server, out=config().out.with_name(server))).adapter
        for server in ("median", "fedavg")
    ]
    for name, tensor in found[0].items():
        assert (tensor - found[1][name]).abs().max() < 1e-15

"""Step sizes by round, and limits of a gradient's norm: as torch's schedulers and `clip_grad_norm_` have them."""

import numpy as np
import pytest
import torch
from conftest import run_until
from test_stack import agree, clients, features, two_rounds  # noqa: F401
from torch.nn.functional import cross_entropy, normalize
from torch.optim import SGD, lr_scheduler

from fedsim import InputError, run
from fedsim.checkpoint import load_checkpoint
from fedsim.clients import make_clients
from fedsim.registry import parse
from fedsim.rng import torch_rng

PLAIN = {"name": "probe", "optimizer": "sgd", "lr": 0.1}


def same(one, other):
    return all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "exponential", "step"])
def test_a_schedule_has_the_step_sizes_of_torchs(schedule, warmup):
    rounds = 15
    method = parse(
        "method", PLAIN | {"schedule": schedule, "warmup_rounds": warmup, "lr_decay": 0.7, "decay_rounds": 3}
    )
    optimizer = SGD([torch.zeros(1)], lr=0.1)
    main = {
        "constant": lambda: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, rounds - warmup),
        "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, 0.7),
        "step": lambda: lr_scheduler.StepLR(optimizer, 3, 0.7),
    }[schedule]()
    if warmup:
        first = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        main = lr_scheduler.SequentialLR(optimizer, [first, main], [warmup])
    for round in range(1, rounds + 1):
        assert method.lr_in(round, rounds) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        main.step()


@pytest.mark.parametrize(
    ("fields", "rounds"),
    [
        ({"schedule": "cosine"}, 1),
        ({"schedule": "exponential", "lr_decay": 1.0}, 3),
        ({"schedule": "step", "decay_rounds": 3}, 3),
        ({"clip_norm": 1e30}, 3),
    ],
)
def test_what_changes_no_step_changes_no_bit(fields, rounds, config, tmp_path):
    plain = run(config(method=PLAIN, rounds=rounds, out=tmp_path / "plain"))
    assert same(plain, run(config(method=PLAIN | fields, rounds=rounds)))


def test_each_clients_gradient_is_clipped_as_torch_clips_it():
    method = parse("method", PLAIN | {"clip_norm": 2.0})
    draw = torch.Generator().manual_seed(0)
    shapes = {"w": (3, 4), "b": (4,), "scale": ()}
    grads = {name: torch.randn(3, *shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    for grad in grads.values():
        grad *= torch.tensor([0.01, 1.0, 100.0]).view(-1, *[1] * (grad.dim() - 1))  # one of them is not clipped
    ours = method.clipped(grads)
    for k in range(3):
        params = [torch.nn.Parameter(grad[k].clone()) for grad in grads.values()]
        for param in params:
            param.grad = param.detach().clone()
        torch.nn.utils.clip_grad_norm_(params, 2.0)
        for name, param in zip(grads, params, strict=True):
            torch.testing.assert_close(ours[name][k], param.grad, rtol=1e-15, atol=0)
    assert torch.equal(ours["w"][0], grads["w"][0]) and not torch.equal(ours["w"][1], grads["w"][1])


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adamw"}])
@pytest.mark.parametrize("server", [{"name": "fedprox", "mu": 0.5}, {"name": "ditto", "lam": 0.5}])
def test_stacked_clients_are_clipped_and_scheduled_as_one_by_one(server, optimizer, features, clients, tmp_path):  # noqa: F811
    def trained(reference, **fields):
        fields = {"name": "fedclip", "batch_size": 4, "local_epochs": 2, "lr": 1e-2, **optimizer, **fields}
        task = {"method": parse("method", fields), "server": parse("server", server), "dtype": "float64", "rounds": 2}
        return two_rounds(features, clients, tmp_path, reference, **task)

    stacked, single = (trained(reference, clip_norm=0.02, warmup_rounds=1) for reference in (False, True))
    agree(stacked, single, 1e-7, 1e-12)
    for fields in ({"warmup_rounds": 1}, {"clip_norm": 0.02}):
        assert not np.allclose(trained(False, **fields)[0][0].delta, stacked[0][0].delta)


def test_a_late_client_has_the_step_size_of_the_round_that_sent_it_its_parameters(features, clients, tmp_path):  # noqa: F811
    ours, plain = (
        two_rounds(
            features,
            clients,
            tmp_path / schedule,
            False,
            method=parse("method", PLAIN | {"schedule": schedule}),
            server=parse("server", "fedavg"),
            rounds=2,
        )
        for schedule in ("cosine", "constant")
    )  # in both rounds from the parameters of round 0
    assert np.array_equal(ours[0][1].delta, plain[0][1].delta)


@pytest.mark.parametrize("engine", ["stacked", "reference"])
def test_a_run_is_a_loop_of_torchs_optimizer_scheduler_and_clipping(engine, config, features_dir):
    # FedProx's term is part of the loss; its gradient is clipped with the rest, and SGD then adds the weight decay.
    mu, rounds, limit = 0.5, 4, 3.0
    hyper = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    fields = {"name": "probe", "optimizer": "sgd", "clip_norm": limit, "schedule": "cosine", "warmup_rounds": 1}
    server = {"name": "fedprox", "mu": mu}
    ours = config(dtype="float64", rounds=rounds, method=fields | hyper, server=server, engine=engine)
    data = ours.dataset.load(features_dir)
    population = make_clients(data, ours.partition, None, ("ink",), 0)
    x, y = normalize(torch.tensor(data.x).double(), dim=1), torch.tensor(data.y)
    shared, clips = torch.tensor(data.class_embeddings).float().double(), 0  # round 0 is built in float32
    for round in range(1, rounds + 1):
        trained = []
        for k in range(population.trainers):
            weight = shared.clone().requires_grad_()
            sgd = SGD([weight], **hyper)
            warmup, cosine = lr_scheduler.LinearLR(sgd, 0.5, total_iters=1), lr_scheduler.CosineAnnealingLR(sgd, 3)
            scheduler = lr_scheduler.SequentialLR(sgd, [warmup, cosine], [1])
            for _ in range(round - 1):
                sgd.step()
                scheduler.step()
            rows = torch.tensor(population[k].train)
            for batch in rows[torch.randperm(len(rows), generator=torch_rng(0, "batches", round, k))].split(32):
                loss = cross_entropy(data.logit_scale * x[batch] @ weight.T, y[batch])
                loss = loss + mu / 2 * (weight - shared).square().sum()
                sgd.zero_grad()
                loss.backward()
                clips += int(torch.nn.utils.clip_grad_norm_([weight], limit) > limit)
                sgd.step()
            trained.append(weight.detach())
        shared = sum(trained) / len(trained)
    run(ours)
    assert 0 < clips < rounds * population.trainers * 3
    state, _ = load_checkpoint(ours.folder(), ours.experiment())
    torch.testing.assert_close(state.params["weight"], shared, rtol=1e-9, atol=1e-12)


def test_scaffold_computes_its_variates_with_the_step_size_of_the_round(config, tmp_path):
    states = []
    for k, method in enumerate((PLAIN | {"warmup_rounds": 1}, PLAIN | {"lr": 0.05})):  # round 1 of 2 has half of 0.1
        ours = config(method=method, server="scaffold", rounds=1, out=tmp_path / str(k))
        run(ours)
        states.append(load_checkpoint(ours.folder(), ours.experiment())[0])
    assert states[0].slots["variate"]["weight"].any()
    assert torch.equal(states[0].slots["variate"]["weight"], states[1].slots["variate"]["weight"])
    with pytest.raises(InputError, match=r"which clipping would shorten; set --method\.clip-norm none, not 1"):
        run(config(method=PLAIN | {"clip_norm": 1.0}, server="scaffold"))
    with pytest.raises(InputError, match=r"--method\.warmup-rounds can be at most --rounds 1, got 2"):
        run(config(method=PLAIN | {"warmup_rounds": 2}, rounds=1))


@pytest.mark.parametrize("schedule", ["cosine", "exponential"])
def test_a_resumed_run_goes_on_with_the_step_sizes_of_an_uninterrupted_one(schedule, config, tmp_path):
    method = PLAIN | {"schedule": schedule, "lr_decay": 0.5, "warmup_rounds": 1}
    whole = run(config(method=method, rounds=5, out=tmp_path / "whole"))
    ours = config(method=method, rounds=5)
    run_until(3, ours)
    assert same(whole, run(ours)) and not same(whole, run(config(method=PLAIN, rounds=5, out=tmp_path / "constant")))


def test_a_run_continues_with_more_rounds_unless_its_step_sizes_depend_on_their_number(config, tmp_path):
    decaying = PLAIN | {"schedule": "step", "lr_decay": 0.5, "decay_rounds": 2}
    run(config(method=decaying, rounds=3))
    assert same(run(config(method=decaying, rounds=5)), run(config(method=decaying, rounds=5, out=tmp_path / "whole")))

    cosine, out = PLAIN | {"schedule": "cosine"}, tmp_path / "cosine"
    run_until(2, config(method=cosine, rounds=3, out=out))
    for other in (2, 5):
        with pytest.raises(InputError) as refused:
            run(config(method=cosine, rounds=other, out=out))
        assert str(refused.value) == (
            f"{out} holds a run of 3 rounds, each of which depends on that number (as with --method.schedule cosine, "
            f"--server.average beta or --privacy.epsilon), so it cannot continue with --rounds {other}; give "
            "--rounds 3, or another --out"
        )
    assert run(config(method=cosine, rounds=3, out=out)).last_round == 3
    assert run(config(method=cosine, rounds=0, out=tmp_path / "none")).last_round == 0

"""What is evaluated where it is not what clients are sent: moving averages of the server's models."""

import json

import numpy as np
import pytest
import torch
from conftest import run_until
from safetensors import safe_open
from torch.distributions import Beta

from fedsim import InputError, run
from fedsim.checkpoint import load_checkpoint
from fedsim.params import flatten
from fedsim.registry import parse
from fedsim.reporting.remarks import remarks
from fedsim.updates import CLIENT_STATS, RoundSum

PLAIN = {"name": "probe", "optimizer": "sgd", "lr": 0.05, "batch_size": 8}
DECAY_0 = {"name": "moving_average", "average": "exponential", "decay": 0.0}


def averages(rounds, **fields):
    """The server's models of a run of its own, (rounds + 1, 5), and what is evaluated after each round."""
    server = parse("server", {"name": "moving_average", **fields})
    deltas = np.random.default_rng(0).standard_normal((rounds, 5))
    params = {"w": torch.ones(5, dtype=torch.float64)}
    slots, _ = server.init(params)
    models, evaluated = [params["w"]], [server.evaluated(params, slots)["w"]]
    for k, delta in enumerate(deltas):
        total = RoundSum(delta, 1.0, np.zeros(1, CLIENT_STATS), round=k + 1, rounds=rounds)
        params, slots = server.step(params, slots, total, torch.Generator())
        models.append(params["w"])
        evaluated.append(server.evaluated(params, slots)["w"])
    return torch.stack(models).numpy(), torch.stack(evaluated).numpy()


@pytest.mark.parametrize("shape", [0.2, 1.0, 3.0])
def test_the_average_of_beta_is_numpys_with_torchs_densities(shape):
    models, evaluated = averages(7, shape=shape)
    positions = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    weights = (
        np.ones(8)
        if shape == 1
        else Beta(*torch.full((2,), shape, dtype=torch.float64)).log_prob(positions).exp().numpy()
    )
    expected = [np.average(models[: k + 1], axis=0, weights=weights[: k + 1]) for k in range(8)]
    np.testing.assert_allclose(evaluated, expected, rtol=1e-12)


@pytest.mark.parametrize(("center", "width"), [(3.0, 1.5), (1.0, 0.5), (6.5, 10.0)])
def test_the_gaussian_average_is_numpys_without_the_untrained_model(center, width):
    models, evaluated = averages(7, average="gaussian", center=center, width=width)
    weights = np.exp(-(((np.arange(8) - center) / width) ** 2) / 2)
    expected = [np.average(models[1 : k + 1], axis=0, weights=weights[1 : k + 1]) for k in range(1, 8)]
    np.testing.assert_allclose(evaluated, [models[0], *expected], rtol=1e-12)


def test_a_narrow_gaussian_is_the_model_nearest_to_its_center_and_does_not_underflow():
    models, evaluated = averages(7, average="gaussian", center=4.2, width=0.01)
    np.testing.assert_allclose(evaluated, models[[0, 1, 2, 3, 4, 4, 4, 4]], rtol=1e-12)
    assert np.array_equal(*averages(7, average="gaussian", center=1e6, width=1.0))


def test_the_exponential_average_is_a_plain_loop_and_with_decay_0_the_model_itself():
    models, evaluated = averages(6, average="exponential", decay=0.7)
    mean = models[0]
    for model, ours in zip(models[1:], evaluated[1:], strict=True):
        mean = 0.7 * mean + 0.3 * model
        np.testing.assert_allclose(ours, mean, rtol=1e-12)
    models, evaluated = averages(6, average="exponential", decay=0.0)
    assert np.array_equal(models, evaluated)


@pytest.mark.parametrize("fields", [{"shape": 1.0}, {"shape": 0.2}, {"average": "exponential", "decay": 0.7}])
def test_a_round_without_an_update_counts_as_one_of_the_same_model(fields):
    server = parse("server", {"name": "moving_average", **fields})
    finals = []
    for deltas in ({1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0}, {1: 1.0, 4: 1.0}):  # in the second, no client responds in between
        params = {"w": torch.zeros(1, dtype=torch.float64)}
        slots, _ = server.init(params)
        for k, delta in deltas.items():
            total = RoundSum(np.array([delta]), 1.0, np.zeros(1, CLIENT_STATS), round=k, rounds=4)
            params, slots = server.step(params, slots, total, torch.Generator())
        finals.append(server.evaluated(params, slots)["w"].item())
    assert finals[1] == pytest.approx(finals[0], rel=1e-12)
    if fields == {"shape": 1.0}:
        assert finals[1] == pytest.approx(1.0, rel=1e-12)  # of 0, 1, 1, 1, 2


def test_clients_are_sent_the_model_and_the_average_is_evaluated_reported_and_written(config, tmp_path):
    plain = {"method": PLAIN, "out": tmp_path / "plain"}
    models = [flatten(run(config(**plain, rounds=0)).adapter)]

    def note(event):
        if event.stage == "training":
            models.append(flatten(model_of(config(**plain))))

    fedavg = run(config(**plain), note)
    ours = config(method=PLAIN, server={"name": "moving_average", "shape": 1.0}, page=True)
    report = run(ours)
    assert np.array_equal(flatten(model_of(ours)), models[3])
    chosen = report.chosen_round
    assert chosen  # else the average is of one model
    np.testing.assert_allclose(flatten(report.adapter), np.mean(models[: chosen + 1], axis=0), rtol=1e-5, atol=1e-7)
    with safe_open(ours.folder() / "adapter.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight"), report.adapter["weight"])
        assert json.loads(file.metadata()["fedsim"])["evaluated"] == "beta-weighted moving average"
    words = "Evaluated parameters: beta-weighted moving average; clients are sent others."
    assert words in remarks(report.tables())
    assert words in (ours.folder() / "report.html").read_text()
    assert not any("moving average" in remark for remark in remarks(fedavg.tables()))
    costs = [each.tables().rounds[["bytes_up", "bytes_down"]] for each in (report, fedavg)]
    assert costs[0].equals(costs[1])


def model_of(config):
    """What the clients of the next round would be sent."""
    state, _ = load_checkpoint(config.folder(), config.experiment())
    return state.params


def test_decay_0_is_fedavg_to_the_bit(config, tmp_path):
    rules = {"zero": {"name": "moving_average", "average": "exponential", "decay": 0.0}, "fedavg": "fedavg"}
    ours, plain = (run(config(server=rule, rounds=2, out=tmp_path / name)) for name, rule in rules.items())
    assert ours.tables().scores.equals(plain.tables().scores)
    assert all(torch.equal(ours.adapter[name], plain.adapter[name]) for name in plain.adapter)


@pytest.mark.parametrize("average", ["exponential", "beta"])
def test_a_resumed_run_has_the_bits_of_a_whole_one(average, config, tmp_path):
    server = {"name": "moving_average", "average": average, "decay": 0.5}
    fields = {"method": PLAIN, "server": server, "rounds": 3, "eval_every": 2}  # so the last is evaluated as the last
    whole = run(config(**fields, out=tmp_path / "whole"))
    run_until(1, config(**fields))
    resumed, finished = run(config(**fields)), run(config(**fields))
    for again in (resumed, finished):
        assert torch.equal(whole.adapter["weight"], again.adapter["weight"])
        assert whole.tables().scores.equals(again.tables().scores)
    more = config(**fields | {"rounds": 5})
    if average == "exponential":
        assert run(more).last_round == 5
        return
    with pytest.raises(InputError, match=r"a run of 3 rounds.*--server\.average beta.*give --rounds 3"):
        run(more)

"""Rules that send each client tensors of its own."""

import numpy as np
import pytest
import torch
from conftest import run_until
from test_bits import result

from fedsim import InputError, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.params import flatten, unflatten
from fedsim.registry import parse
from fedsim.servers.fedamp import FedAMP
from fedsim.training.client_store import PrivateStore

PROBE = {"name": "probe", "optimizer": "sgd", "lr": 0.01, "batch_size": 8}
FIELDS = {"method": PROBE, "clients": 4, "partition": "dirichlet", "dtype": "float64"}
EQUAL = {"name": "fedamp", "attention": 1.0, "sigma": 1e300}  # the attention does not depend on distances


def private_of(config, report):
    """What each client stored in the chosen round."""
    store = PrivateStore(config.folder() / "private")
    return [store.read(client, written) for client, written in enumerate(report.private)]


@pytest.mark.parametrize("attention", [1.0, 0.3])
def test_a_cloud_model_is_the_mean_of_the_models_by_their_attention(attention):
    rule = parse("server", {"name": "fedamp", "attention": attention, "sigma": 5.0})
    models = np.random.default_rng(0).standard_normal((5, 7))
    squared = np.square(models[:, None] - models[None]).sum(axis=2)
    weights = attention / 5 * np.exp(-squared / 5.0)
    np.fill_diagonal(weights, 0)
    np.fill_diagonal(weights, 1 - weights.sum(axis=1))
    bank = {3 * k: model for k, model in enumerate(models)}  # other clients have not trained yet
    like = {"b": torch.zeros(3, dtype=torch.float64), "a": torch.zeros(2, 2, dtype=torch.float64)}
    for k, expected in enumerate(weights @ models):
        cloud = rule.unicast(3 * k, bank, like)
        assert {name: tensor.shape for name, tensor in cloud.items()} == {n: t.shape for n, t in like.items()}
        np.testing.assert_allclose(flatten(cloud), expected, rtol=1e-12)
    assert weights.min() >= 0 and np.ptp(weights) > 0.1


def test_a_client_without_a_model_is_sent_the_mean_of_the_others():
    params = {"w": torch.tensor([1.0, 2.0])}
    assert parse("server", "fedamp").unicast(1, {0: np.ones(2, np.float32)}, params) == params


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_with_equal_attention_fedamp_is_fedprox(mu, config, tmp_path):
    servers = {"amp": EQUAL | {"mu": mu}, "prox": {"name": "fedprox", "mu": mu}}
    amp, prox = (run(config(server=server, **FIELDS, out=tmp_path / name)) for name, server in servers.items())
    np.testing.assert_allclose(flatten(amp.adapter), flatten(prox.adapter), rtol=1e-10)
    np.testing.assert_allclose([row[3] for row in amp.rounds], [row[3] for row in prox.rounds], rtol=1e-10)


def test_without_attention_and_pull_clients_train_alone(config, tmp_path):
    servers = {"amp": {"name": "fedamp", "attention": 0.0, "mu": 0.0}, "alone": "local_only"}
    configs = [config(server=server, **FIELDS, out=tmp_path / name) for name, server in servers.items()]
    amp, alone = map(run, configs)
    ours, theirs = (report.tables().trained.scores for report in (amp, alone))
    assert ours.correct.tolist() == theirs.correct.tolist() and ours.total.tolist() == theirs.total.tolist()
    assert amp.chosen_round == alone.chosen_round
    for mine, other in zip(private_of(configs[0], amp), private_of(configs[1], alone), strict=True):
        torch.testing.assert_close(mine["weight"], other["weight"], rtol=1e-10, atol=1e-12)


def test_stacked_clients_of_fedamp_go_where_single_ones_go(config, tmp_path):
    fields = FIELDS | {"clients": 6, "cohort": 4, "chunk": 4, "server": {"name": "fedamp", "sigma": 0.05, "mu": 0.5}}
    configs = [config(**fields, engine=engine, out=tmp_path / engine) for engine in ("stacked", "reference")]
    stacked, single = map(run, configs)
    np.testing.assert_allclose(flatten(stacked.adapter), flatten(single.adapter), rtol=1e-7)
    assert stacked.tables().trained.scores.correct.tolist() == single.tables().trained.scores.correct.tolist()
    banks = [load_checkpoint(ours.folder(), ours.experiment())[0].bank for ours in configs]
    np.testing.assert_allclose(*banks, rtol=1e-7)
    assert banks[0].shape == (6, 24 * 4)


def test_the_bank_has_what_clients_stored_and_a_client_is_sent_as_many_bytes_as_with_fedavg(config, tmp_path):
    ours = config(**FIELDS | {"cohort": 2, "server": "fedamp"}, rounds=2, out=tmp_path / "amp")
    report = run(ours)
    state, _ = load_checkpoint(ours.folder(), ours.experiment())
    store = PrivateStore(ours.folder() / "private")
    for client, written in enumerate(state.private.tolist()):
        stored = store.read(client, written)
        assert stored.keys() == ({"weight"} if written else set())
        np.testing.assert_allclose(state.bank[client], flatten(stored) if written else 0.0, rtol=1e-12, atol=1e-15)
    assert 2 <= (state.private > 0).sum() < 4
    plain = run(config(**FIELDS | {"cohort": 2, "server": "fedavg"}, rounds=2, out=tmp_path / "avg"))
    bytes_of = [one.tables().rounds[["bytes_down", "bytes_up"]].to_numpy().tolist() for one in (report, plain)]
    assert bytes_of[0] == bytes_of[1] == [[2 * 8 * 96] * 2] * 2


def test_a_resumed_run_of_fedamp_is_an_uninterrupted_one(config, tmp_path):
    fields = {"method": "probe", "clients": 5, "partition": "iid", "cohort": 3, "server": "fedamp", "rounds": 5}
    whole, ours = (config(**fields, out=tmp_path / name) for name in ("whole", "resumed"))
    expected = run(whole)
    run_until(3, ours)
    report = run(ours)
    assert result(ours.folder()) == result(whole.folder())
    for mine, other in zip(private_of(ours, report), private_of(whole, expected), strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    banks = [load_checkpoint(c.folder(), c.experiment())[0].bank for c in (ours, whole)]
    assert np.array_equal(*banks)


def test_a_bank_that_is_too_large_is_refused(config):
    data = {"dataset": "synthetic", "data_dir": None, "held_out": (), "partition": "natural"}
    with pytest.raises(
        InputError, match=r"server fedamp stores .* 2,004 MiB for 1,000 clients with 525,312 parameters"
    ):
        run(config(server="fedamp", method="fedclip", **data, clients=1000, cohort=10))


def test_an_asynchronous_rule_cannot_unicast(config):
    @component
    class Late(FedAMP):
        buffer = 2
        concurrency = 3

    with pytest.raises(InputError, match=r"server .*Late unicasts, which needs synchronous rounds"):
        run(config(server=Late(), clients=4, partition="iid", fleet="lognormal"))


def test_a_rule_sends_only_tensors_that_clients_receive(config):
    @component
    class Astray(FedAMP):
        def unicast(self, client, bank, params):
            return {"bias": torch.zeros(2)}

    with pytest.raises(TypeError, match="unicast gives bias, which clients do not receive"):
        run(config(server=Astray(), method="probe"))


def test_a_rule_that_unicasts_nothing_before_clients_have_trained_is_refused(config):
    @component
    class Late(FedAMP):
        def unicast(self, client, bank, params):
            return params if bank else {}

    with pytest.raises(TypeError, match="unicast gives nothing; it must give the same names in every call"):
        run(config(server=Late(), method="probe"))


def test_a_rule_that_unicasts_cannot_define_what_is_evaluated(config):
    @component
    class Both(FedAMP):
        def evaluated(self, params, slots):
            return params

    with pytest.raises(InputError, match=r"Both unicasts, so .* it cannot define what is evaluated"):
        run(config(server=Both(), method="probe"))


@pytest.mark.parametrize("engine", ["stacked", "reference"])
def test_an_update_has_what_was_received_before_start_replaced_it(engine, config):
    received = []

    @component
    class Both(FedAMP):
        def unicast(self, client, bank, params):
            return {"weight": torch.full_like(params["weight"], client + 0.5)}

        def start(self, params, rng):
            return {"weight": torch.full_like(params["weight"], -1.0)}

        def reply(self, update):
            received.append(update.received["weight"].unique().tolist())
            return super().reply(update)

    run(config(server=Both(mu=0.0), engine=engine, rounds=1, **FIELDS))
    assert sorted(received[-4:]) == [[0.5], [1.5], [2.5], [3.5]]


def test_a_method_without_shared_tensors_has_an_empty_bank(config):
    ours = config(server="fedamp", method="zero_shot", rounds=1)
    assert run(ours).rounds and unflatten(np.empty(0), {}) == {}

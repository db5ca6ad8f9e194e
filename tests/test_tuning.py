"""Models that clients tune after the last round (`tune_epochs`)."""

import pytest
import torch
from conftest import run_until
from test_show import cells, shown
from torch.nn.functional import cross_entropy, normalize

from fedsim import InputError, run
from fedsim.__main__ import main
from fedsim.checkpoint import load_checkpoint
from fedsim.federation import Federation
from fedsim.prepare import prepare
from fedsim.reporting.parquet import read_tables
from fedsim.reporting.remarks import remarks
from fedsim.rng import torch_rng
from fedsim.training.tuner import Tuner

SGD = {"name": "probe", "optimizer": "sgd", "lr": 0.02, "batch_size": 8}
FIELDS = {"method": SGD, "clients": 4, "partition": "dirichlet", "rounds": 2, "dtype": "float64"}
FILES = "scores.parquet", "labels.parquet", "calibration.parquet", "adapter.safetensors"


def files(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def counted(tables):
    """What a model's evaluation has counted, without the round."""
    columns = ["client", "domain", "split", "correct", "total", "correct_own"]
    return tables.scores.sort_values(columns[:3])[columns].to_numpy().tolist()


def confidence(tables):
    """By group of rows, the sum of the probabilities of all predictions."""
    return tables.calibration.groupby("group").confidence.sum().to_dict()


@pytest.mark.parametrize("schedule", ["constant", "cosine"])  # which has nearly ended in the last round
def test_a_tuned_model_is_what_plain_torch_trains_from_the_model_of_the_last_round(schedule, config):
    ours = config(**FIELDS | {"method": SGD | {"schedule": schedule}}, tune_epochs=3, eval_clients=1)
    tuned = run(ours).tables().tuned
    state, _ = load_checkpoint(ours.folder(), ours.experiment())
    experiment = prepare(ours)
    source, (k,) = experiment.data.source, set(tuned.scores.client) - {4}
    client, scale = experiment.clients[k], source.class_embeddings.logit_scale
    x, y = torch.tensor(source.representations.features).double(), torch.from_numpy(source.y)

    weight = state.params["weight"].clone().requires_grad_()
    optimizer, order = torch.optim.SGD([weight], lr=SGD["lr"]), torch_rng(ours.seed, "batches", 3, k)
    for _ in range(3):
        for batch in torch.randperm(len(client.train), generator=order).split(8):
            rows = client.train[batch.numpy()]
            optimizer.zero_grad()
            cross_entropy(scale * normalize(x[rows], dim=1) @ weight.T, y[rows]).backward()
            optimizer.step()
    expected = {}
    for group, rows in {"own": client.test, "held_out": experiment.clients[4].test}.items():
        likely, predicted = (scale * normalize(x[rows], dim=1) @ weight.detach().T).softmax(dim=1).max(dim=1)
        expected[group] = likely.float().double().sum().item()
        own = tuned.scores[(tuned.scores.split == "test") & ((tuned.scores.domain == "ink") == (group == "held_out"))]
        assert own.correct.sum() == (predicted == y[rows]).sum()
    assert confidence(tuned) == pytest.approx(expected, rel=1e-6)
    assert confidence(tuned)["own"] != pytest.approx(confidence(run(ours).tables().of("trained", 2))["own"], rel=1e-5)


RULES = {
    "fedavg": {},
    "local_only": {},
    "fedamp": {"cohort": 2},  # some clients have never trained
    "ditto": {"cohort": 3},
    "scaffold": {},
    "moving_average": {},
}


@pytest.mark.parametrize("server", RULES)
def test_stacked_clients_tune_as_single_ones_whatever_the_chunks(server, config, tmp_path):
    fields = FIELDS | RULES[server] | {"server": server, "tune_epochs": 2}
    variants = {"one": {"engine": "reference"}, "all": {"chunk": 4}, "pairs": {"chunk": 2}}
    one, *stacked = (run(config(**fields, **more, out=tmp_path / name)).tables() for name, more in variants.items())
    for tables in stacked:
        assert counted(tables.tuned) == counted(one.tuned) and set(tables.tuned.scores["round"]) == {2}
        assert confidence(tables.tuned) == pytest.approx(confidence(one.tuned), rel=1e-6)


@pytest.mark.parametrize(
    "method", [SGD, {"name": "probe", "lr": 1e-2, "persist_optimizer": True, "batch_size": 8}], ids=["sgd", "adam"]
)
def test_a_client_that_is_alone_tunes_as_it_trains_in_one_round_more(method, config, tmp_path):
    fields = FIELDS | {"method": method | {"local_epochs": 2}, "server": "local_only"}
    tuned = run(config(**fields, tune_epochs=2)).tables().tuned
    longer = run(config(**fields | {"rounds": 3}, out=tmp_path / "longer")).tables().of("trained", 3)
    assert counted(tuned) == counted(longer) and confidence(tuned) == confidence(longer)


def test_models_of_clients_before_they_are_averaged_are_tuned_models(config, tmp_path):
    """The mean of the tuned models of two rounds is what FedAvg has after three."""
    fields = FIELDS | {"method": SGD | {"local_epochs": 2}}
    trained = []

    def store(self, task, received, chunk):
        for client, tensors in original(self, task, received, chunk):
            trained.append({name: tensor.clone() for name, tensor in tensors.items()})
            yield client, tensors

    original = Tuner._tuned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "_tuned", store)
        run(config(**fields, tune_epochs=2))
    longer = config(**fields | {"rounds": 3}, out=tmp_path / "longer")
    run(longer)
    state, _ = load_checkpoint(longer.folder(), longer.experiment())
    mean = torch.stack([tensors["weight"] for tensors in trained]).mean(dim=0)
    assert len(trained) == 4
    torch.testing.assert_close(mean, state.params["weight"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("server", ["fedavg", "fedamp"])
def test_a_model_starts_as_it_was_evaluated(server, config):
    """A step size of nearly nothing changes no prediction, under rules that send each client another model too."""
    fields = FIELDS | {"method": SGD | {"lr": 1e-12}, "server": server, "cohort": 3, "rounds": 3}
    report = run(config(**fields, tune_epochs=1)).tables()
    last = report.of("trained", 3)
    assert confidence(report.tuned)["own"] == pytest.approx(confidence(last)["own"], rel=1e-9)
    own = {name: tables.scores[tables.scores.client < 4] for name, tables in {"a": last, "b": report.tuned}.items()}
    correct = {name: scores[scores.domain != "ink"].correct.tolist() for name, scores in own.items()}
    assert correct["a"] == correct["b"]


@pytest.mark.parametrize("server", ["fedavg", "ditto"])
def test_a_run_that_is_killed_while_models_are_tuned_loses_nothing(server, config, tmp_path, monkeypatch):
    fields = FIELDS | {"server": server, "eval_every": 3, "tune_epochs": 2, "rounds": 4}
    whole, ours = (config(**fields, out=tmp_path / name) for name in ("whole", "killed"))
    run(whole)

    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Federation, "tune", kill)
        run(ours)
    assert load_checkpoint(ours.folder(), ours.experiment())[0].round == 4
    with monkeypatch.context() as patched:
        patched.setattr(Federation, "train", kill)
        run(ours)
    assert files(ours.folder()) == files(whole.folder()) and prepare(ours).done


def test_a_finished_run_continues_with_tuning_and_then_with_more_rounds(config, tmp_path, monkeypatch):
    fields = FIELDS | {"eval_every": 3, "method": SGD | {"lr": 0.3}}
    ours = config(**fields)
    before = run(ours).tables()
    tuning = ours.model_copy(update={"tune_epochs": 2})
    assert prepare(tuning).done is None
    whole = config(**fields, tune_epochs=2, out=tmp_path / "whole")
    after, expected = run(tuning).tables(), run(whole).tables()
    assert files(ours.folder()) == files(whole.folder())
    assert after.of("trained").scores.equals(before.scores[before.scores.model == "trained"])
    assert counted(run(tuning).tables().tuned) == counted(expected.tuned)  # of a finished run
    longer = tuning.model_copy(update={"rounds": 4})
    run_until(3, longer)
    run(longer)
    whole = config(**fields | {"rounds": 4}, tune_epochs=2, out=tmp_path / "longer")
    run(whole)
    assert files(ours.folder()) == files(whole.folder())
    assert set(read_tables(ours.folder()).tuned.scores["round"]) == {4}
    for epochs in (0, 3):
        with pytest.raises(InputError, match=f"tune_epochs 2 there, {epochs} here"):
            run(longer.model_copy(update={"tune_epochs": epochs}))


def test_results_are_gone_while_a_finished_run_is_tuned(config, monkeypatch):
    ours = config(rounds=1)
    run(ours)
    tuning = ours.model_copy(update={"tune_epochs": 1})

    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fedsim.simulate.write_tables", kill)
        run(tuning)
    assert prepare(tuning).done is None
    with pytest.raises(InputError, match="is not a finished run of fedsim: it lacks facts"):
        read_tables(ours.folder())
    run(tuning)
    assert read_tables(ours.folder()).tuned


def test_evaluated_clients_alone_are_tuned_and_judged_on_held_out_domains_and_new_classes(config):
    fields = FIELDS | {"new_classes": 0.5, "partition": "iid"}
    tables = run(config(**fields, eval_clients=2, tune_epochs=1)).tables()
    scores = tables.tuned.scores
    clients = set(scores.client)
    assert len(clients) == 2 and clients <= set(range(4))
    for client in clients:
        own = scores[scores.client == client]
        assert set(own.split) == {"val", "test", "new"} and "ink" in set(own.domain)
    assert tables.summary("tuned")["new"] == pytest.approx(
        scores[scores.split == "new"].correct.sum() / scores[scores.split == "new"].total.sum()
    )


def test_tuned_models_are_shown_and_said_to_be_of_the_last_round(config, capsys, tmp_path):
    fields = FIELDS | {"rounds": 3, "method": SGD | {"lr": 0.5}}
    ours = config(**fields, tune_epochs=2, page=True)
    report = run(ours)
    tables = report.tables()
    assert tables.chosen_round < 3
    sentence = (
        f"Tuned models: after the last round (3, not round {tables.chosen_round}), each client has trained its model "
        "for 2 more local epochs on its own train rows."
    )
    assert sentence in remarks(tables) and sentence in (ours.folder() / "report.html").read_text()
    accuracy = f"{100 * tables.summary('tuned')['personalization']:.1f}"
    assert cells(shown(report, ours.folder()), "tuned models")[1] == accuracy
    assert main(["compare", str(ours.folder()), "--out", str(tmp_path / "compared")]) == 0
    text = capsys.readouterr().out
    assert "tuned, personalization" in text and accuracy in text
    assert "tuned models" in (ours.folder() / "report.html").read_text()


def test_what_cannot_be_tuned_is_refused(config, features_dir, tmp_path, capsys):
    with pytest.raises(InputError, match="--tune-epochs tunes the model of the last round, and there is none"):
        run(config(rounds=0, tune_epochs=1))
    flags = ["--dataset", "features", "--data-dir", str(features_dir), "--tune-epochs", "1", "--search", "method.lr"]
    assert main(["sweep", *flags, "--out", str(tmp_path / "sweep")]) == 2
    assert "a sweep does not tune its trials' models" in capsys.readouterr().err

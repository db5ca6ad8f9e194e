"""Clients' models on the test rows of other clients (`neighbors`), and the means that combine models or rows."""

import numpy as np
import pytest
import torch
from test_tuning import FIELDS, SGD
from torch.nn.functional import normalize

from fedsim import InputError, run
from fedsim.checkpoint import load_checkpoint
from fedsim.clients import neighbors_of
from fedsim.events import Event
from fedsim.prepare import prepare
from fedsim.simulate import simulate
from fedsim.training.client_store import PrivateStore


def correct(scores, split):
    """Correct predictions and rows by client, of rows of training domains."""
    rows = scores[(scores.split == split) & (scores.domain != "ink")]
    return rows.groupby("client")[["correct", "total"]].sum()


def test_neighbors_are_others_drawn_once_and_all_others_if_there_are_no_more():
    for client in range(6):
        drawn = neighbors_of(client, 6, 3, seed=0)
        assert drawn == sorted(set(drawn)) and len(drawn) == 3 and client not in drawn
        assert neighbors_of(client, 6, 5, seed=0) == [other for other in range(6) if other != client]
    assert len({tuple(neighbors_of(7, 100, 5, seed)) for seed in range(5)}) == 5
    assert len(neighbors_of(3, 10**8, 4, seed=0)) == 4


@pytest.mark.parametrize("count", [2, 3])
def test_a_personal_model_is_judged_on_the_test_rows_of_its_neighbors(count, config):
    ours = config(**FIELDS, server="local_only", neighbors=count)
    tables = run(ours).tables()
    state, _ = load_checkpoint(ours.folder(), ours.experiment())
    experiment, store = prepare(ours), PrivateStore(ours.folder() / "private")
    x, y = torch.tensor(experiment.data.source.representations.features).double(), experiment.data.source.y
    counted = correct(tables.of("trained", 2).scores, "neighbor")
    accuracies = []
    for client in range(4):
        others = neighbors_of(client, 4, count, ours.partition_seed)
        rows = np.concatenate([experiment.clients[other].test for other in others])
        weight = store.read(client, int(state.private[client]))["weight"]
        right = (normalize(x[rows], dim=1) @ weight.T).argmax(dim=1).numpy() == y[rows]
        assert counted.loc[client].tolist() == [right.sum(), len(rows)]
        accuracies.append(right.mean())
    assert tables.summary("trained", 2)["neighbor"] == pytest.approx(np.mean(accuracies))


def test_one_model_for_all_is_right_on_all_rows_but_a_client_s_own_and_nothing_else_changes(config, tmp_path):
    fields = FIELDS | {"tune_epochs": 2}
    with_them = run(config(**fields, neighbors=3)).tables()
    without = run(config(**fields, out=tmp_path / "without")).tables()
    for model in "zero_shot", "trained":
        scores = with_them.of(model).scores
        scores = scores[scores["round"] == scores["round"].max()]
        own, others = correct(scores, "test"), correct(scores, "neighbor")
        assert (own + others == own.sum()).all(axis=None)
    columns = [*without.scores.columns]
    rest = with_them.scores[with_them.scores.split != "neighbor"].sort_values(columns).reset_index(drop=True)
    assert rest.equals(without.scores.sort_values(columns).reset_index(drop=True))
    assert with_them.labels.equals(without.labels) and with_them.calibration.equals(without.calibration)
    tuned = with_them.tuned.scores
    assert (tuned.split == "neighbor").any() and (tuned[tuned.split == "neighbor"].client < 4).all()
    assert "neighbor" not in without.summary() and without.summary().items() <= with_them.summary().items()


def test_stacked_and_single_clients_are_judged_alike(config, tmp_path):
    fields = FIELDS | {"server": "ditto", "tune_epochs": 1, "neighbors": 2, "new_classes": 0.5, "partition": "iid"}
    tables = [run(config(**fields, engine=e, out=tmp_path / e)).tables() for e in ("stacked", "reference")]
    assert tables[0].scores.equals(tables[1].scores) and "neighbor" in set(tables[0].tuned.scores.split)


def test_dual_is_the_harmonic_mean_of_one_model_on_all_rows_and_tuned_ones_on_their_own(config, tmp_path):
    tables = run(config(**FIELDS | {"method": SGD | {"lr": 0.3}}, tune_epochs=2)).tables()
    shared, own = correct(tables.of("trained", 2).scores, "test"), correct(tables.tuned.scores, "test")
    one, many = shared.correct.sum() / shared.total.sum(), (own.correct / own.total).mean()
    assert tables.summary("tuned")["dual"] == pytest.approx(2 * one * many / (one + many))
    assert "dual" not in tables.summary()
    alone = run(config(**FIELDS, server="local_only", tune_epochs=1, out=tmp_path / "alone")).tables()
    assert "dual" not in alone.summary("tuned")


def test_pooled_and_balanced_accuracy_weigh_rows_and_classes_alike(config):
    tables = run(config(**FIELDS | {"method": SGD | {"lr": 0.3}})).tables()
    means, own = tables.summary(), correct(tables.chosen.scores, "test")
    assert means["pooled"] == pytest.approx(own.correct.sum() / own.total.sum())
    labels = tables.chosen.labels
    recalls = [c / n for c, n in labels[labels.group == "own"][["correct", "support"]].to_numpy() if n]
    assert means["balanced"] == pytest.approx(np.mean(recalls)) and 0 < len(recalls) <= 4


def test_where_test_rows_are_not_read_those_of_neighbors_are_not_either(config):
    def ignore(event: Event) -> None: ...

    report = simulate(prepare(config(**FIELDS, neighbors=2), splits=("val",)), ignore)
    assert set(report.tables().scores.split) == {"val"}


def test_more_neighbors_than_others_are_refused(config):
    with pytest.raises(InputError, match="neighbors of 4 from 4 clients; each has 3 others"):
        run(config(**FIELDS, neighbors=4))

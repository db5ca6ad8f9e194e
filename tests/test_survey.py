"""The survey, which sums what all clients contribute once, before round 1; and the methods that need it."""

from itertools import islice

import numpy as np
import pytest
import torch
from conftest import run_until
from test_clients_known import right, rows_of
from test_stack import clients, features  # noqa: F401
from torch import nn

from fedsim import Config, Fleet, InputError, Method, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.methods.ncm import NCM
from fedsim.params import flatten
from fedsim.registry import parse
from fedsim.schedule import schedule
from fedsim.training.task import Task, backbone_of, initial_params
from fedsim.training.worker import ClientWorker

SKEWED = {"partition": {"name": "dirichlet", "alpha": 0.3}, "clients": 5}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def train_rows(config, features_dir):
    """The data, and the train rows of all clients together."""
    data, population = rows_of(config, features_dir)
    return data, np.concatenate([population[k].train for k in range(population.trainers)])


# Nearest class means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, SKEWED, {"partition": "iid", "clients": 9, "cohort": 2, "chunk": 2}])
def test_ncm_has_the_class_means_of_the_train_rows_of_all_clients(fields, config, features_dir):
    ours = config(method="ncm", dtype="float64", rounds=1, **fields)
    data, rows = train_rows(ours, features_dir)
    x, y, classes = unit(data.x[rows].astype(np.float64)), data.y[rows], range(len(data.classes))
    means = unit(np.stack([x[y == label].mean(axis=0) for label in classes]))
    report = run(ours)
    assert report.chosen_round == 1 and set(data.domain[rows]) == {1, 2}  # nothing of the held-out domain
    np.testing.assert_allclose(report.adapter["means"], means, rtol=0, atol=1e-12)

    counts, zero_shot, start = right(report, "trained"), right(report, "zero_shot"), report.tables().scores
    held_out = np.flatnonzero(data.domain == 0)
    predicted = (unit(data.x[held_out].astype(np.float64)) @ means.T).argmax(axis=1)
    assert counts[max(counts)] == (predicted == data.y[held_out]).sum()
    start = start[(start.model == "trained") & (start["round"] == 0)].groupby(["client", "split"]).correct.sum()
    assert start.to_dict() == zero_shot != counts  # round 0 is zero-shot CLIP


def test_the_survey_is_counted_in_the_bytes_of_round_1_for_all_clients_that_train(config, tmp_path):
    rows = {"partition": "iid", "clients": 9, "cohort": 2, "rounds": 2}
    costs = run(config(method="ncm", **rows)).tables().rounds
    # Up, float64: the rows of each of 4 classes and the sum of their 24 numbers. Down, float32: the means.
    assert costs.bytes_up.tolist() == [9 * 8 * (4 + 4 * 24), 0]
    assert costs.bytes_down.tolist() == [9 * 4 * 4 * 24, 0]
    assert costs.steps.tolist() == [0, 0] and costs.clients.tolist() == [2, 2]
    twice = run(config(method="ncm", server="ditto", out=tmp_path / "ditto", **rows))
    assert twice.tables().rounds.bytes_down.tolist() == [9 * 4 * 4 * 24, 0]  # the personal models have copies
    assert torch.equal(twice.adapter["shared.means"], twice.adapter["own.means"])


def test_classes_without_train_rows_keep_their_class_embeddings(config, features_dir):
    ours = config(method="ncm", new_classes=0.5, rounds=1, held_out=())
    data, _ = rows_of(ours, features_dir)
    report = run(ours)
    state, _ = load_checkpoint(ours.folder(), ours.experiment())
    np.testing.assert_allclose(state.params["means"][2:], unit(data.class_embeddings)[2:], rtol=1e-6)
    new = [key for key in right(report, "trained") if key[1] == "new"]
    assert new and all(right(report, "trained")[key] == right(report, "zero_shot")[key] for key in new)


# The survey -----------------------------------------------------------------------------------------------------

SEEN = []


@component
class Counting(NCM):
    """Notes the rows of each client that it surveys."""

    def survey(self, module, batch):
        SEEN.append(len(batch.y))
        return super().survey(module, batch)


def test_a_run_surveys_before_round_1_and_never_again_however_it_is_interrupted(config, tmp_path):
    fields = {"method": Counting(), "partition": "iid", "clients": 4, "rounds": 2}
    whole = run(config(**fields, out=tmp_path / "whole"))
    ours = config(**fields)
    run(config(**fields | {"rounds": 0}))
    SEEN.clear()
    run_until(1, ours)
    assert len([rows for rows in SEEN if rows]) == 4  # once each, and without rows, for the shapes
    SEEN.clear()
    again = run(ours)
    assert not any(SEEN)
    assert torch.equal(whole.adapter["means"], again.adapter["means"]) and whole.chosen_round == again.chosen_round
    assert whole.tables().rounds.bytes_up.tolist() == again.tables().rounds.bytes_up.tolist()


def test_what_a_chunk_contributes_depends_on_no_earlier_call(features, clients):  # noqa: F811
    task = Task(parse("method", "ncm"), parse("server", "fedavg"), seed=0)
    params = initial_params(task, backbone_of(features))
    worker, fresh = ClientWorker(features, clients), ClientWorker(features, clients)
    first = fresh.survey(task, flatten(params), [2, 0])
    worker.evaluate(task, 1, flatten(params) + 1, [], [], ("val",), [(0, 0)])
    assert np.array_equal(worker.survey(task, flatten(params), [2, 0]), first)
    alone = [worker.survey(task, flatten(params), [k]) for k in (2, 0)]
    assert np.array_equal(alone[0] + alone[1], first) and first.dtype == np.float64
    assert first[:5].sum() == 33 + 9  # of `rows`, before `sums`


@component
class Linked(Fleet):
    """Two clients that train in no time, with 1 and 2 seconds per byte down, 3 and 1 per byte up."""

    def costs(self, clients, rng):  # noqa: F811
        return np.array([(0.0, 1.0, 3.0), (0.0, 2.0, 1.0)])


@pytest.mark.parametrize("server", ["fedavg", {"name": "fedbuff", "buffer": 1, "concurrency": 1}])
def test_the_clock_starts_when_the_slowest_link_has_carried_the_survey(server):
    arguments = Config(fleet=Linked(), server=server), 2, np.zeros_like, 1, 1
    plain, late = (list(islice(schedule(*arguments, once), 3)) for once in ((0, 0), (10, 100)))
    assert [planned.trained for planned in late] == [planned.trained for planned in plain]
    assert [b.clock_s - a.clock_s for a, b in zip(plain, late, strict=True)] == [10 * 1 + 100 * 3] * 3


@component
class Uneven(NCM):
    def survey(self, module, batch):
        return {"x": batch.x}


@component
class Nameless(NCM):
    def surveyed(self, module, total):
        return {"mean": module.means}


@component
class Infinite(NCM):
    def surveyed(self, module, total):
        return {"means": module.means / 0}


@component
class Patches(Method):
    sites = ("patch_tokens",)

    def build(self, backbone):
        module = nn.Module()
        module.register_buffer("mean", torch.zeros(3))
        return module

    def scope(self, name):
        return "surveyed"


def test_surveys_that_cannot_work_say_why(config, features, tmp_path):  # noqa: F811
    for method, error, sentence in (
        (Uneven(), TypeError, "survey must return the same names and shapes for every client"),
        (Nameless(), TypeError, "surveyed must return means, in their shapes"),
        (Infinite(), InputError, "the survey gives means that are not finite"),
    ):
        with pytest.raises(error, match=sentence):
            run(config(method=method, out=tmp_path / sentence))
    with pytest.raises(InputError, match="makes a survey, which needs image features, not tokens"):
        initial_params(Task(Patches(), parse("server", "fedavg"), 0), backbone_of(features))

"""The survey, which sums what all clients contribute once, before round 1; and the methods that need it."""

from itertools import islice

import numpy as np
import pytest
import torch
from conftest import run_until
from test_clients_known import right, rows_of
from test_stack import clients, features  # noqa: F401
from torch import nn

from fedsim import Backbone, Batch, ClientContext, Config, Fleet, InputError, Method, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.methods.ncm import NCM
from fedsim.params import flatten
from fedsim.registry import parse
from fedsim.schedule import schedule
from fedsim.training.evaluator import EvaluationRows
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task, backbone_of
from fedsim.training.trainer import Chunk
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
    arguments = task, flatten(params), {"rows": (5,), "sums": (5, 12)}
    first = fresh.survey(*arguments, [2, 0])
    worker.evaluate(task, 1, flatten(params) + 1, [], EvaluationRows(("val",)), [(0, 0)])
    assert np.array_equal(worker.survey(*arguments, [2, 0]), first)
    alone = [worker.survey(*arguments, [k]) for k in (2, 0)]
    assert np.array_equal(alone[0] + alone[1], first) and first.dtype == np.float64
    assert first[:5].sum() == 33 + 9  # of `rows`, before `sums`


@component
class Mixed(NCM):
    def survey(self, module, batch):
        return {"half": torch.ones(1), "whole": torch.tensor([2**24 + 1])}


def test_a_sum_has_the_precision_of_float64_whatever_other_tensors_have(features, clients):  # noqa: F811
    task = Task(Mixed(), parse("server", "fedavg"), seed=0)
    params = flatten(initial_params(task, backbone_of(features)))
    total = ClientWorker(features, clients).survey(task, params, {"half": (1,), "whole": (1,)}, [0])
    assert total.tolist() == [1, 2**24 + 1]


@component
class Linked(Fleet):
    """Two clients that train in no time, with 1 and 2 seconds per byte down, 3 and 1 per byte up."""

    def costs(self, clients, rng):  # noqa: F811
        return np.array([(0.0, 1.0, 3.0), (0.0, 2.0, 1.0)])


@pytest.mark.parametrize("server", ["fedavg", {"name": "fedbuff", "buffer": 1, "concurrency": 1}])
def test_the_clock_starts_when_the_slowest_link_has_carried_the_survey(server):
    arguments = Config(fleet=Linked(), server=server), 2, lambda ids, round: np.zeros_like(ids), 1, 1
    plain, late = (list(islice(schedule(*arguments, once), 3)) for once in ((0, 0), (10, 100)))
    assert [planned.trained for planned in late] == [planned.trained for planned in plain]
    assert [b.clock_s - a.clock_s for a, b in zip(plain, late, strict=True)] == [10 * 1 + 100 * 3] * 3


@component
class Uneven(NCM):
    def survey(self, module, batch):
        return {"x": batch.x}


@component
class Renamed(NCM):
    def survey(self, module, batch):
        return {"some" if len(batch.y) else "none": torch.zeros(3)}


@component
class Silent(NCM):
    def survey(self, module, batch):
        return {}


@component
class Hidden(NCM):
    """Contributes what its output does not show."""

    def survey(self, module, batch):
        return super().survey(module, batch) | {"inverse": torch.tensor([len(batch.y)]) / 0}


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


@component
class Prompted(NCM):
    sites = ("image_feature", "text_tokens")


def test_surveys_that_cannot_work_say_why(config, features, tmp_path):  # noqa: F811
    for method, error, sentence in (
        (Uneven(), TypeError, "survey must return the same names and shapes for every client"),
        (Renamed(), TypeError, "survey must return the same names and shapes for every client"),
        (Silent(), TypeError, "survey must return what a client contributes, and returns nothing"),
        (Hidden(), InputError, "the survey sums up to values that are not finite, in inverse"),
        (Nameless(), TypeError, "surveyed must return means, in their shapes"),
        (Infinite(), InputError, "the survey gives means that are not finite"),
    ):
        with pytest.raises(error, match=sentence):
            run(config(method=method, out=tmp_path / type(method).__name__))
    with pytest.raises(InputError, match="makes a survey, which needs image features, not tokens"):
        initial_params(Task(Patches(), parse("server", "fedavg"), 0), backbone_of(features))
    with pytest.raises(InputError, match="makes a survey, which needs text features, not text embeddings"):
        initial_params(Task(Prompted(), parse("server", "fedavg"), 0), backbone_of(features))


# GGEUR ----------------------------------------------------------------------------------------------------------

NONE = {"name": "ggeur", "samples": 0}


def covariances(x, y, classes):
    return np.stack([np.cov(x[y == label].T, bias=True) for label in range(classes)])


@pytest.mark.parametrize("fields", [{}, SKEWED, {"partition": "iid", "clients": 9, "cohort": 2, "chunk": 2}])
def test_ggeur_has_the_covariance_of_the_train_rows_of_all_clients(fields, config, features_dir):
    ours = config(method=NONE | {"local_epochs": 1}, dtype="float64", rounds=1, **fields)
    data, rows = train_rows(ours, features_dir)
    x, y, domain = data.x[rows].astype(np.float64), data.y[rows], data.domain[rows]
    costs = run(ours).tables().rounds
    state, _ = load_checkpoint(ours.folder(), ours.experiment())
    factors = state.params["factors"]
    np.testing.assert_allclose(factors @ factors.mT, covariances(x, y, 4), rtol=0, atol=1e-10)
    several = bool(fields)  # each client has rows of both domains
    assert state.params["present"].sum(dim=1).tolist() == [0, 4 * (not several), 4 * (not several)]
    if not fields:
        means = np.stack([x[(y == label) & (domain == 2)].mean(axis=0) for label in range(4)])
        np.testing.assert_allclose(state.params["means"][2], means, rtol=0, atol=1e-12)
    head, clients_ = 8 * (4 * 24 + 4), fields.get("clients", 2)
    down, up = 8 * (3 * 4 * 25 + 4 * 24 * 24), 8 * (4 * 4 * 25) + 4 * 4 * 24 * 25
    assert costs.bytes_down.tolist() == [costs.asked[0] * head + clients_ * down]
    assert costs.bytes_up.tolist() == [costs.clients[0] * head + clients_ * up]


@component
class Plain(Method):
    """The head of GGEUR alone."""

    local_epochs: int = 10
    batch_size: int = 16

    def build(self, backbone):
        module = Named()
        module.head = nn.Linear(backbone.width, len(backbone.class_embeddings))
        return module


class Named(nn.Module):
    def forward(self, x, classes=None):
        return self.head(x)


def test_without_synthetic_rows_ggeur_is_a_plain_linear_head_to_the_bit(config, tmp_path):
    methods = Plain(), parse("method", NONE)
    reports = [run(config(method=m, rounds=1, out=tmp_path / str(k))) for k, m in enumerate(methods)]
    plain, ours = (report.adapter for report in reports)
    assert plain.keys() == {"head.weight", "head.bias"} and all(torch.equal(plain[name], ours[name]) for name in plain)
    assert reports[0].tables().rounds.steps.tolist() == reports[1].tables().rounds.steps.tolist()


def test_clients_are_trained_on_expanded_rows_in_stacks_as_one_by_one(config, features_dir, tmp_path):
    fields = {"method": {"name": "ggeur", "samples": 20, "local_epochs": 1}, "dtype": "float64", "rounds": 2, **SKEWED}
    ours = config(**fields)
    data, population = rows_of(ours, features_dir)
    counts = [np.bincount(data.y[population[k].train]) for k in range(5)]
    rows = [np.maximum(count[count > 0], 20).sum() for count in counts]
    assert len(set(rows)) > 1
    others = {"reference": {"engine": "reference"}, "ditto": {"server": {"name": "ditto", "lam": 0.5}}}
    runs = [ours] + [config(**fields, **other, out=tmp_path / name) for name, other in others.items()]
    tables = [run(each).tables().rounds for each in runs]
    stacked, single, twice = (flatten(head(load_checkpoint(each.folder(), each.experiment())[0])) for each in runs)
    np.testing.assert_allclose(stacked, single, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(stacked, twice, rtol=1e-9, atol=1e-11)  # the shared half of Ditto is FedAvg's
    assert tables[0].steps.tolist() == tables[1].steps.tolist() == [sum(-(-count // 16) for count in rows)] * 2
    assert tables[0].flops[0] == pytest.approx(sum(rows) * 4 * 24 * 2 * 2)  # forward, and the gradient of the weights


def head(state):
    """The shared tensors of a linear head."""
    return {
        name.rpartition(".")[2]: tensor
        for name, tensor in state.params.items()
        if "head." in name and "own" not in name
    }


def test_simulated_time_is_that_of_the_rows_with_synthetic_ones(config, features_dir):
    fleet = {"name": "lognormal", "rows_per_s": 10, "speed_sigma": 0, "up_mbps": 1e9, "down_mbps": 1e9}
    ours = config(method={"name": "ggeur", "samples": 200, "local_epochs": 2}, fleet=fleet, rounds=1)
    assert run(ours).tables().rounds.clock_s[0] == pytest.approx(4 * 200 * 2 / 10, rel=1e-3)


def test_synthetic_rows_have_the_covariance_of_their_class_around_own_rows_and_other_domains():
    draw = torch.Generator().manual_seed(0)
    module = parse("method", NONE).build(Backbone(torch.eye(2, 3), 1.0, domains=4))
    module.factors[1] = torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.1]])
    module.present[2:, 1], module.means[2, 1], module.means[3, 1] = 1, torch.tensor([50.0, 0, 0]), 100.0
    x, y = torch.tensor([[0.0, 0, -100], [0, 0, 100]]), torch.tensor([1, 1])
    method = parse("method", {"name": "ggeur", "samples": 20_002})
    for domain, shares in (
        (1, (1, 1, 1)),
        (2, (1, 0, 1)),
        (-1, (1, 0, 0)),
    ):  # domains 0 and 1 have no rows of the class
        client = ClientContext(torch.tensor(domain), torch.tensor([0, 2]), 1)
        xs, ys = method.expand(module, Batch(x, y, client=client), draw)
        assert (
            torch.equal(xs[:2], x) and torch.equal(ys, torch.ones(20_002)) and len(ys) == method.local_rows(y.numpy())
        )
        centres = torch.cat([x, module.means[2:, 1]])
        nearest = torch.cdist(xs[2:], centres).argmin(dim=1)
        found = torch.bincount(nearest, minlength=4) / 20_000
        own, first, second = (share / sum(shares) for share in shares)
        torch.testing.assert_close(found, torch.tensor([own / 2, own / 2, first, second]), rtol=0, atol=0.02)
        torch.testing.assert_close(
            (xs[2:] - centres[nearest]).T.cov(), module.factors[1] @ module.factors[1].T, rtol=0.05, atol=0.05
        )


def test_every_round_and_every_worker_draws_the_same_rows(features, clients):  # noqa: F811
    method = parse(
        "method", {"name": "ggeur", "samples": 30, "local_epochs": 1, "optimizer": "sgd", "batch_size": 4096}
    )
    task = Task(method, parse("server", "fedavg"), seed=0)
    params = initial_params(task, backbone_of(features))
    params["factors"] += torch.randn(params["factors"].shape, generator=torch.Generator().manual_seed(1))
    sent = {0: flatten(params)}
    first, later = (
        ClientWorker(features, clients)
        .train(task, round, sent, flatten({}), Chunk(0, [(0, 0), (1, 0)]))
        .clients["loss"]
        for round in (1, 2)
    )
    np.testing.assert_allclose(first, later, rtol=1e-6)  # one step on all rows, in another order

"""What a method is told of the client whose rows it sees, in training and in evaluation; and the baseline `prior`."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, DOMAINS
from test_stack import agree, clients, features, two_rounds  # noqa: F401
from torch.nn.functional import cross_entropy, normalize

from fedsim import Backbone, ClientContext, InputError, Method, component, run
from fedsim.clients import make_clients
from fedsim.methods.probe import Probe
from fedsim.registry import find, parse

SKEWED = {"partition": {"name": "dirichlet", "alpha": 0.3}, "clients": 4, "rounds": 1}


@component
class Balanced(Probe):
    """Takes the client's class shares, of those of all clients, out of the loss; a survey adds up the latter."""

    reads_client = True

    def build(self, backbone):
        module = super().build(backbone)
        module.register_buffer("total", torch.zeros(len(backbone.class_embeddings)))
        return module

    def scope(self, name):
        return "surveyed" if name == "total" else "shared"

    def survey(self, module, batch):
        return {"counts": batch.client.counts}

    def surveyed(self, module, total):
        return {"total": total["counts"]}

    def loss(self, module, batch):
        own, all_clients = (counts.double() + 1 for counts in (batch.client.counts, module.total))
        return cross_entropy(module(batch.x, batch.classes) + (own / all_clients).log(), batch.y)


def right(report, model):
    """Correct predictions by client and split, of the last round."""
    scores = report.tables().scores
    scores = scores[scores.model == model]
    return scores[scores["round"] == scores["round"].max()].groupby(["client", "split"]).correct.sum().to_dict()


def rows_of(config, features_dir):
    data = config.dataset.load(features_dir)
    given = config.partition, config.clients, config.held_out, config.partition_seed, config.train_share
    return data, make_clients(data, *given)


def test_prior_adds_the_log_of_the_clients_own_class_shares(config, features_dir):
    ours = config(method={"name": "prior", "smoothing": 0.5}, dtype="float64", **SKEWED)
    data, population = rows_of(ours, features_dir)
    text = normalize(torch.tensor(data.class_embeddings).double(), dim=1)
    cosines = normalize(torch.tensor(data.x).double(), dim=1) @ text.T
    expected, plain = {}, {}
    for client in population:
        shares = torch.bincount(torch.tensor(data.y[client.train]), minlength=len(data.classes)) + 0.5
        for split, rows in (("val", client.val), ("test", client.test)):
            logits, y = data.logit_scale * cosines[rows], torch.tensor(data.y[rows])
            expected[client.id, split] = int(((logits + (shares / shares.sum()).log()).argmax(dim=1) == y).sum())
            plain[client.id, split] = int((logits.argmax(dim=1) == y).sum())
    report = run(ours)
    found, zero_shot = right(report, "trained"), right(report, "zero_shot")
    assert found == {key: expected[key] for key in found} and zero_shot == {key: plain[key] for key in found}
    assert sum(found.values()) > sum(zero_shot.values())  # knowing the labels helps here
    twice = run(config(method=ours.method, server="ditto", dtype="float64", out=ours.folder() / "ditto", **SKEWED))
    assert right(twice, "trained") == found
    held_out = population.trainers, "test"
    assert found[held_out] == zero_shot[held_out]  # it has no train rows, so its prior is uniform


def test_with_equal_counts_prior_has_the_bits_of_zero_shot_clip():
    method, draw = parse("method", {"name": "prior", "smoothing": 0.3}), torch.Generator().manual_seed(0)
    x, text = torch.randn(50, 8, generator=draw), normalize(torch.randn(4, 8, generator=draw), dim=1)
    module, none = method.build(Backbone(text, 30.0)), torch.zeros(4, dtype=torch.int64)
    plain = module(x)
    for counts in (none, none + 7):
        assert torch.equal(method.logits(module, x, None, ClientContext(torch.tensor(0), counts, 1)), plain)
    skewed = ClientContext(torch.tensor(0), none + torch.arange(4), 1)
    difference = (method.logits(module, x, None, skewed) - plain).softmax(dim=1)
    torch.testing.assert_close(difference, ((torch.arange(4) + 0.3) / 7.2).expand(50, 4))


@pytest.mark.parametrize("method", [Balanced, find("method", "prior")], ids=["balanced", "prior"])
def test_stacked_clients_are_told_what_single_ones_are(method, features, clients, tmp_path):  # noqa: F811
    task = {"method": method(batch_size=4), "server": parse("server", "fedavg"), "dtype": "float64"}
    stacked, single = (two_rounds(features, clients, tmp_path, reference, **task) for reference in (False, True))
    agree(stacked, single, 1e-7, 1e-12)


def test_a_loss_that_reads_the_client_is_that_of_a_plain_loop(config, features_dir):
    # One step of SGD on all train rows of each client.
    fields = {"optimizer": "sgd", "lr": 0.1, "batch_size": 1000}
    ours = config(method=Balanced(**fields), dtype="float64", **SKEWED)
    data, population = rows_of(ours, features_dir)
    x, y = normalize(torch.tensor(data.x).double(), dim=1), torch.tensor(data.y)
    parts = [population[k].train for k in range(population.trainers)]
    counts = torch.tensor(np.stack([np.bincount(data.y[rows], minlength=len(CLASSES)) for rows in parts]))
    start, trained = torch.tensor(data.class_embeddings).float().double(), []
    for rows, own in zip(parts, counts, strict=True):
        weight = start.clone().requires_grad_()
        shift = ((own + 1).double() / (counts.sum(dim=0) + 1)).log()
        loss = cross_entropy(data.logit_scale * x[rows] @ weight.T + shift, y[rows])
        trained.append(start - 0.1 * torch.autograd.grad(loss, [weight])[0])
    for engine in ("stacked", "reference"):
        report = run(ours.model_copy(update={"engine": engine, "out": ours.folder() / engine}))
        torch.testing.assert_close(report.adapter["weight"], sum(trained) / len(trained), rtol=1e-9, atol=1e-12)


SEEN = []


@component
class Curious(Method):
    """Notes what it is told."""

    reads_client = True

    def build(self, backbone):
        return Probe().build(backbone)

    def logits(self, module, x, classes=None, client=None):
        SEEN.append(client)
        return module(x, classes)


@component
class Hurried(Curious):
    """Depends on the number of rounds."""

    fixed_rounds = True


def test_a_client_is_described_by_its_domain_its_rounds_and_its_train_rows(config, features_dir, tmp_path):
    ours = config(method=Curious(), clients=None, engine="reference", rounds=2)
    _, population = rows_of(ours, features_dir)
    SEEN.clear()
    run(ours)
    assert {context.round for context in SEEN} == {0, 1, 2} and {context.rounds for context in SEEN} == {None}
    trained = [DOMAINS.index("oil"), DOMAINS.index("photo")]
    assert {int(context.domain) for context in SEEN} == {*trained, DOMAINS.index("ink")}
    for context in SEEN:
        rows = len(population[trained.index(int(context.domain))].train) if int(context.domain) in trained else 0
        assert context.counts.sum() == rows

    SEEN.clear()
    fields = {"method": Hurried(), "partition": "iid", "clients": 3, "engine": "reference", "out": tmp_path / "hurried"}
    run(config(**fields, rounds=2))
    with pytest.raises(InputError, match="holds a run of 2 rounds, each of which depends on that number"):
        run(config(**fields, rounds=3))
    assert {context.rounds for context in SEEN} == {2}
    assert {int(context.domain) for context in SEEN} == {-1, DOMAINS.index("ink")}  # -1: rows of two domains


def test_a_method_that_does_not_read_the_client_is_told_nothing(config):
    @component
    class Incurious(Curious):
        """Does not read it."""

        reads_client = False

    SEEN.clear()
    run(config(method=Incurious(), engine="reference"))
    assert SEEN and set(SEEN) == {None}

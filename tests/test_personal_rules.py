"""Rules that change what a client's loss is, against few lines of their papers' arithmetic in float64."""

import numpy as np
import pytest
import torch
from test_rules import RNG, a_backbone, a_batch, a_chunk, built
from test_rules import Bowl as Client
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from fedsim import run
from fedsim.checkpoint import load_checkpoint
from fedsim.methods import Batch, RuleContext, masked, trained
from fedsim.methods._calls import with_tensors
from fedsim.registry import parse
from fedsim.training.client_store import PrivateStore
from fedsim.training.optimizer import Optimizer
from fedsim.training.rows import RuleInputs, TrainRows
from fedsim.training.stack import gradients
from fedsim.training.train import train_client
from fedsim.updates import sum_chunks

SGD = {"name": "probe", "optimizer": "sgd", "lr": 0.01, "batch_size": 8}
FIELDS = {"clients": 6, "cohort": 4, "dtype": "float64", "partition": "dirichlet"}
PFEDME = {"name": "pfedme", "lam": 3.0, "steps": 3, "inner_lr": 0.02}


def batches(size, rows, epochs=2):
    """The batches of a client, as its generator draws them."""
    rng = torch.Generator().manual_seed(2)
    return [batch for _ in range(epochs) for batch in torch.randperm(rows, generator=rng).split(size)]


def last(config):
    """The server's tensors after the last round, and those that each client has stored by then."""
    state, store = load_checkpoint(config.folder(), config.experiment())[0], PrivateStore(config.folder() / "private")
    return state.params, [store.read(k, written) for k, written in enumerate(state.private.tolist()) if written]


# pFedMe ---------------------------------------------------------------------------------------------------------


def test_pfedme_takes_the_steps_of_the_paper():
    method, rule = parse("method", SGD | {"local_epochs": 2}), parse("server", PFEDME)
    envelope = rule.adapt(method)
    module, (x, y), text = built(envelope), a_batch(21), a_backbone().class_embeddings
    optimizer = Optimizer(envelope, {name: t.data[None] for name, t in module.named_parameters()})
    rows, inputs = TrainRows(x, y, [21]), RuleInputs(dict(module.named_parameters()))
    recorded = train_client(module, optimizer, rows, envelope, rule, inputs, torch.Generator().manual_seed(2))
    w, theta, losses = text.clone(), text.clone(), []

    def loss(weight, rows):
        return cross_entropy(10 * normalize(x[rows], dim=1) @ weight.T, y[rows])

    for rows in batches(8, 21):
        theta = w
        for _ in range(3):
            live = theta.clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss(live, rows), live)
            theta = theta - 0.02 * (slope + 3.0 * (theta - w))
        losses.append(loss(theta, rows) + 3.0 / 2 * (w - theta).square().sum())
        w = w - 0.01 * 3.0 * (w - theta)
    torch.testing.assert_close(module.shared.weight.detach(), w, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(module.own.weight, theta, rtol=1e-12, atol=1e-13)
    assert recorded == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
    assert (theta - w).abs().max() > 1e-3
    assert torch.equal(envelope.logits(module, x), 10 * normalize(x, dim=1) @ module.own.weight.T)


def test_the_server_of_pfedme_moves_by_beta_times_the_mean():
    chunks = [a_chunk(parse("server", "pfedme"), k, Client(1.0, []), np.array([went])) for k, went in enumerate([1, 5])]
    server = parse("server", {"name": "pfedme", "beta": 2.0})
    assert server.step({"w": torch.tensor([1.0])}, {}, sum_chunks(chunks), RNG)[0]["w"] == 7.0


def test_with_one_inner_step_the_shared_model_of_pfedme_is_fedavgs_and_only_it_travels(config, tmp_path):
    """Its step size is lr * lam * inner_lr: 0.5 * 2 * 0.01."""
    envelope = {"name": "pfedme", "lam": 2.0, "steps": 1, "inner_lr": 0.01}
    ours = config(server=envelope, method=SGD | {"lr": 0.5}, **FIELDS, out=tmp_path / "a")
    theirs = config(server="fedavg", method=SGD, **FIELDS, out=tmp_path / "b")
    (one, two), columns = (run(ours), run(theirs)), ["bytes_up", "bytes_down"]
    (params, private), (plain, _) = last(ours), last(theirs)
    torch.testing.assert_close(params["shared.weight"], plain["weight"], rtol=1e-9, atol=1e-12)
    assert (one.tables().rounds[columns] == two.tables().rounds[columns]).all(axis=None)
    assert len(private) == 6 and {name for tensors in private for name in tensors} == {"own.weight"}


def test_stacked_clients_of_pfedme_go_where_single_ones_go(config, tmp_path):
    ended = []
    for engine in ("stacked", "reference"):
        method = SGD | {"name": "fedclip", "lr": 0.3, "local_epochs": 2}
        ours = config(server=PFEDME, method=method, **FIELDS, chunk=4, engine=engine, out=tmp_path / engine)
        run(ours)
        ended.append(last(ours))
    torch.testing.assert_close(*ended, rtol=1e-9, atol=1e-12)
    params, private = ended[0]
    for tensors in private:
        assert len(tensors) == 4 and not torch.equal(tensors["own.attention.0.bias"], params["own.attention.0.bias"])


# MOON -----------------------------------------------------------------------------------------------------------

MOON = {"name": "moon", "mu": 5.0, "temperature": 0.2}


def gated(tensors, x):
    hidden = (x @ tensors["attention.0.weight"].T + tensors["attention.0.bias"]).tanh()
    attention = (hidden @ tensors["attention.2.weight"].T + tensors["attention.2.bias"]).softmax(dim=1)
    return normalize(attention * x, dim=1)


def scaled(tensors, x):
    return 10 * normalize(x, dim=1) @ tensors["weight"].T


@pytest.mark.parametrize("name, represented", [("fedclip", gated), ("probe", scaled)])
def test_moons_loss_is_that_of_the_paper_for_stacked_clients_and_single_ones(name, represented):
    method = parse("method", name)
    contrasted = parse("server", MOON).adapt(method)
    module, (x, y), draw = built(contrasted), a_batch(3, 6), torch.Generator().manual_seed(4)
    names = trained(module)

    def near(*shape):
        return {
            n: module.get_parameter(n)
            + 0.3 * torch.randn(*shape, *module.get_parameter(n).shape, generator=draw).double()
            for n in names
        }

    with torch.no_grad():
        params, received, before = near(3), near(), near(3)
    states = {"last." + n: tensor for n, tensor in before.items()}
    losses, grads = gradients(contrasted, module, params, Batch(x, y, rule=RuleContext(received, states, {})))
    for k in range(3):
        own = {n: params[n][k].clone().requires_grad_() for n in names}
        made, others = represented(own, x[k]), [received, {n: tensor[k] for n, tensor in before.items()}]
        cosines = [cosine_similarity(made, represented(other, x[k])) for other in others]
        contrast = cross_entropy(torch.stack(cosines, dim=1) / 0.2, torch.zeros(6, dtype=torch.int64))
        expected = with_tensors(method.loss, module, own, Batch(x[k], y[k])) + 5.0 * contrast
        torch.testing.assert_close(losses[k], expected.detach(), rtol=1e-11, atol=1e-12)
        for n, slope in zip(names, torch.autograd.grad(expected, list(own.values())), strict=True):
            torch.testing.assert_close(grads[n][k], slope, rtol=1e-9, atol=1e-12)


def test_classes_that_do_not_compete_have_no_part_in_moons_contrast():
    contrasted = parse("server", MOON).adapt(parse("method", "probe"))
    module, (x, _) = masked(built(contrasted)), a_batch(5)
    classes, losses = torch.tensor([True, True, True, False]), []
    for away in (0.0, 9.0):
        before = {"weight": module.weight.detach() + torch.tensor([[0.1], [-0.2], [0.3], [away]])}
        rule = RuleContext({"weight": module.weight.detach()}, {"last.weight": before["weight"]}, {})
        losses.append(contrasted.loss(module, Batch(x, torch.tensor([0, 2, 1, 0, 2]), classes, rule=rule)).item())
    assert losses[0] == losses[1] and np.isfinite(losses[0])


@pytest.mark.parametrize("name", ["probe", "fedclip"])
def test_a_run_of_moon_begins_as_fedavg_and_goes_elsewhere_and_stores_each_clients_last_model(name, config, tmp_path):
    method, ended = SGD | {"name": name, "lr": 0.01 if name == "probe" else 0.1}, {}
    runs = {("moon", 1): MOON, ("moon", 3): MOON, ("fedavg", 1): "fedavg", ("fedavg", 3): "fedavg"}
    runs |= {("off", 3): MOON | {"mu": 0.0}, ("single", 3): MOON}
    for (rule, rounds), server in runs.items():
        engine = "reference" if rule == "single" else "stacked"
        fields = FIELDS | {"server": server, "method": method, "rounds": rounds, "engine": engine, "chunk": 4}
        ours = config(**fields, out=tmp_path / f"{rule}-{rounds}")
        report = run(ours)
        ended[rule, rounds] = last(ours)
        sent = report.tables().rounds[["bytes_up", "bytes_down"]].to_numpy()[-1].tolist()
        assert sent == ended.setdefault("bytes", sent)
    close = {"rtol": 1e-8, "atol": 1e-11}
    torch.testing.assert_close(ended["moon", 1][0], ended["fedavg", 1][0], **close)
    torch.testing.assert_close(ended["off", 3][0], ended["fedavg", 3][0], **close)
    torch.testing.assert_close(ended["single", 3], ended["moon", 3], **close)
    params, private = ended["moon", 3]
    plain = ended["fedavg", 3][0]
    assert max((params[n] - plain[n]).abs().max() for n in params) > 1e-5
    assert len(private) == 6 and all(tensors.keys() == {"rule/last." + n for n in params} for tensors in private)

"""Fed-MP: residuals on class texts, and the weight of clients by the likeness of their classes to the new ones."""

import numpy as np
import pytest
import torch
from test_adapters import CLASSES, SCALE, X, Y, build, draw
from test_adapters import backbone as backbone  # a fixture
from test_personal_rules import last
from test_rules import RNG, Bowl, a_chunk, replied
from torch.nn.functional import cross_entropy, normalize

from fedsim import InputError, run
from fedsim.methods import Batch, ClientContext, trained
from fedsim.registry import parse
from fedsim.training.stack import by_autograd, gradients
from fedsim.updates import sum_chunks

FIELDS = {"lr": 0.01, "batch_size": 8, "local_epochs": 1}
OLD = torch.tensor([True, True, True, False, True])  # class 3 is new
COUNTS = torch.tensor([[3, 0, 1, 0, 3], [0, 5, 2, 0, 0]])


def context(counts):
    return ClientContext(torch.zeros(counts.shape[:-1], dtype=torch.int64), counts, 1)


def test_losses_likenesses_and_gradients_are_those_of_the_paper(backbone):
    method, module = build(backbone, "fedmp", alpha=0.4, spread=0.7)
    assert module.residual.abs().max() <= 0.7 and module.residual.std() > 0.3
    params = {n: torch.stack([t, t + 0.1 * draw(1, *t.shape, seed=4)[0]]) for n, t in module.state_dict().items()}
    batch = Batch(X.repeat(2, 1, 1), Y.repeat(2, 1), OLD.repeat(2, 1), context(COUNTS))
    losses, grads = gradients(method, module, params, batch)
    text = backbone.class_embeddings
    for k in range(2):
        own = {n: t[k].clone().requires_grad_() for n, t in params.items() if n in trained(module)}
        texts = normalize(text + 0.4 * own["residual"], dim=1)
        hidden = (X @ own["attention.0.weight"].T + own["attention.0.bias"]).tanh()
        gate = (hidden @ own["attention.2.weight"].T + own["attention.2.bias"]).softmax(dim=1)
        pairs = SCALE * normalize(gate * X, dim=1) @ texts[Y].T
        loss = (cross_entropy(pairs, torch.arange(len(Y))) + cross_entropy(pairs.T, torch.arange(len(Y)))) / 2
        torch.testing.assert_close(losses[k], loss.detach(), rtol=1e-11, atol=0)
        for n, slope in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            torch.testing.assert_close(grads[n][k], slope, rtol=1e-9, atol=1e-12)
        likeness = sum(text[3] @ texts[j] for j in range(CLASSES) if COUNTS[k, j])
        torch.testing.assert_close(params["likeness"][k], likeness.detach(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("objective", ["contrastive", "cross_entropy"])
def test_without_residuals_it_is_fedclip_and_predictions_never_have_any(objective, backbone):
    method, module = build(backbone, "fedmp", alpha=0.0, objective=objective)
    fedclip, plain = build(backbone, "fedclip", objective=objective)
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if n.startswith("attention")})
    assert torch.equal(module(X), plain(X))
    x, y = X.repeat(2, 1, 1), Y.repeat(2, 1)
    ours = {n: torch.stack([t, t]) for n, t in module.state_dict().items()}
    theirs = {n: torch.stack([t, t]) for n, t in plain.state_dict().items()}
    losses, grads = gradients(method, module, ours, Batch(x, y, OLD.repeat(2, 1), context(COUNTS)))
    expected, slopes = by_autograd(fedclip, plain, theirs, Batch(x, y))
    if objective == "contrastive":
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
        assert all(torch.allclose(grads[n], slopes[n], rtol=1e-10, atol=1e-13) for n in slopes)
    assert grads["residual"].abs().max() == 0
    with torch.no_grad():
        module.residual.add_(5)
    assert torch.equal(module(X), plain(X))


def test_the_rule_refuses_other_methods_and_other_label_spaces():
    rule = parse("server", "likeness")
    with pytest.raises(InputError, match="server likeness needs the residuals of method fedmp, not fedclip"):
        rule.adapt(parse("method", "fedclip"))
    with pytest.raises(InputError, match=r"set --method\.label-space all, not client"):
        rule.adapt(parse("method", {"name": "fedmp", "label_space": "client"}))


def test_a_run_of_fed_mp_sends_the_gate_and_a_number_and_is_the_same_for_single_clients(config, tmp_path):
    ended, sent, common = {}, {}, {"new_classes": 0.25, "dtype": "float64"}
    for name, engine in (("fedmp", "stacked"), ("fedmp", "reference"), ("fedclip", "stacked")):
        fields = {"clients": 4, "partition": "dirichlet", "chunk": 4, "out": tmp_path / f"{name}-{engine}"}
        rule = "likeness" if name == "fedmp" else "fedavg"
        ours = config(method={"name": name} | FIELDS, server=rule, engine=engine, **common, **fields)
        report = run(ours)
        ended[name, engine] = last(ours)
        sent[name] = report.tables().rounds[["bytes_up", "bytes_down"]].to_numpy()
    torch.testing.assert_close(ended["fedmp", "stacked"], ended["fedmp", "reference"], rtol=1e-7, atol=1e-10)
    assert (sent["fedmp"] - sent["fedclip"] == 4 * 8).all()  # a number of float64 of each client, both ways
    params, private = ended["fedmp", "stacked"]
    plain, _ = ended["fedclip", "stacked"]
    assert all((params[name] - plain[name]).abs().max() > 1e-6 for name in plain)
    assert len(private) == 4 and all(tensors.keys() == {"residual"} for tensors in private)
    assert all((tensors["residual"] - params["residual"]).abs().max() > 1e-3 for tensors in private)


def test_the_mean_of_the_rule_is_weighted_by_likeness():
    rule, chunks = parse("server", "likeness"), []
    params = {"w": torch.zeros(1), "likeness": torch.ones(())}
    for k, (went, likeness) in enumerate([(1.0, 3.0), (9.0, 1.0), (100.0, -2.0)]):
        trained_params = {"w": torch.tensor([went]), "likeness": torch.tensor(likeness)}
        delta = np.array([likeness - 1, went])  # by name
        chunks.append(a_chunk(rule, k, Bowl(1.0, []), delta, replied(rule, params, trained_params)))
    after, _ = rule.step(params, {}, sum_chunks(chunks), RNG)
    assert after["w"] == pytest.approx((3 * 1 + 1 * 9 + 1e-6 * 100) / (4 + 1e-6))
    assert rule.step(params, {}, chunks[-1], RNG)[0]["w"] == 100  # alone, a client that is not like them counts

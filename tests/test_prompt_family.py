"""Prompt methods that tables of this field have as baselines, against formulas of a few lines in float64."""

import numpy as np
import pytest
import torch
from test_prompts import a_backbone, a_batch, cosines, made

from fedsim.methods import Batch
from fedsim.methods.prograd import aligned

MASK = torch.tensor([True, False, True, True, False])


@pytest.fixture(scope="module")
def backbone():
    return a_backbone(torch.float64)[1]


def gradient(method, module, batch):
    """The loss and its gradients, by name."""
    loss, params = method.loss(module, batch), dict(module.named_parameters())
    return loss.item(), dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def probabilities(scores):
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [None, MASK])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_prograd_removes_what_leads_away_from_zero_shot_clip(share, classes, backbone):
    """Both gradients by the chain rule, from those of the scores on paper."""
    method, module = made("prograd", backbone, init="a picture of a", projection=share)
    x, _ = a_batch(backbone)
    active = torch.arange(5) if classes is None else classes.nonzero().flatten()
    written = probabilities(cosines(x, backbone.class_embeddings[active], backbone.logit_scale).numpy())
    conflicts = []
    for y in (active[written.argmax(axis=1)].tolist(), [0, 2, 3, 0, 2, 3], [2, 3, 0, 3, 0, 2]):
        texts = module.texts(module.tokens, classes)
        scores = cosines(x, texts, backbone.logit_scale)
        guessed = probabilities(scores.detach().numpy())
        right = (active.numpy() == np.array(y)[:, None]).astype(float)
        domain, general = (
            torch.autograd.grad(scores, module.tokens, torch.tensor(guessed - wanted) / 6, retain_graph=True)[0].numpy()
            for wanted in (right, written)
        )
        against = min(0.0, (domain * general).sum()) / (general**2).sum()
        expected = domain - share * against * general
        loss, grads = gradient(method, module, Batch(x, torch.tensor(y), classes))
        np.testing.assert_allclose(grads["tokens"].numpy(), expected, rtol=1e-9, atol=1e-13)
        assert loss == pytest.approx(-np.log(guessed[right == 1]).mean(), rel=1e-12)
        conflicts.append(against < 0)
        if share == 1 and against < 0:
            assert abs((grads["tokens"].numpy() * general).sum()) < 1e-12 < abs((domain * general).sum())
    assert any(conflicts) and not all(conflicts)


def test_gradients_without_a_conflict_are_not_changed_by_a_bit():
    draw = torch.Generator().manual_seed(0)
    domain = torch.randn(4, 8, generator=draw)
    across = domain.roll(1) - (domain.roll(1) * domain).sum() / domain.square().sum() * domain
    for general in (domain, domain + 0.5 * across, 1e-20 * domain, -1e-25 * domain, 0 * domain):
        assert torch.equal(aligned(domain, general, 1.0), domain)
    assert aligned(domain, -3 * domain, 1.0).abs().max() < 1e-6


@pytest.mark.parametrize("classes", [None, MASK])
def test_prograd_without_a_projection_is_promptfl_to_the_bit(classes, backbone):
    x, _ = a_batch(backbone)
    batch = Batch(x, torch.tensor([0, 2, 3, 3, 3, 0]), classes)
    (prograd, one), (promptfl, two) = made("prograd", backbone, projection=0), made("promptfl", backbone)
    (ours, grads), (theirs, expected) = gradient(prograd, one, batch), gradient(promptfl, two, batch)
    assert ours == theirs and torch.equal(grads["tokens"], expected["tokens"])
    assert torch.equal(one(x, classes), two(x, classes))


def test_a_single_class_leaves_prograd_nothing_to_conflict_with(backbone):
    method, module = made("prograd", backbone)
    x, _ = a_batch(backbone)
    batch = Batch(x, torch.ones(6, dtype=torch.long), torch.tensor([False, True, False, False, False]))
    loss, grads = gradient(method, module, batch)
    assert loss == 0 and (grads["tokens"] == 0).all()

"""Prompt methods that tables of this field have as baselines, against formulas of a few lines in float64."""

import numpy as np
import pytest
import torch
from test_prompts import CLASSES, a_backbone, a_batch, cosines, crossed, made
from torch.nn.functional import normalize

from fedsim.errors import InputError
from fedsim.methods import Batch
from fedsim.methods._transport import plan
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


def test_cocoop_encodes_texts_for_each_image(backbone, monkeypatch):
    """An image and a class at a time, by open_clip's own path from embeddings to features."""
    method, module = made("cocoop", backbone)
    x, y = a_batch(backbone, "cocoop")
    state = {name: tensor.detach() for name, tensor in module.named_parameters()}
    assert state["network.0.weight"].shape == (backbone.width // 16, backbone.width)
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for i, image in enumerate(x / x.norm(dim=1, keepdim=True)):
        hidden = (state["network.0.weight"] @ image + state["network.0.bias"]).clamp(min=0)
        shift = state["network.2.weight"] @ hidden + state["network.2.bias"]
        for c, name in enumerate(CLASSES):
            tokens = backbone.text.tokenize([f"a photo of a {name}."])
            text = backbone.text.embed(tokens)[0].clone()
            text[1:5] += shift
            feature = backbone.text.encode(text[None], backbone.text.ends(tokens))[0]
            expected[i, c] = backbone.logit_scale * image @ feature / feature.norm()
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
    spread = module(x).detach() - cosines(x, module.texts(module.tokens), backbone.logit_scale).detach()
    assert spread.abs().max() > 1e-3  # the network counts
    assert method.loss(module, Batch(x, y)).item() == pytest.approx(crossed(expected, y), rel=1e-9)
    calls, encode = [], backbone.text.encode_after
    monkeypatch.setattr(backbone.text, "encode_after", lambda *args: calls.append(0) or encode(*args))
    for texts, count in ((1 << 12, 1), (10, 3), (1, 6)):  # never less than an image at a time
        monkeypatch.setattr("fedsim.methods.cocoop.MAX_TEXTS", texts)
        calls.clear()
        torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
        assert len(calls) == count


@pytest.mark.parametrize("classes", [None, MASK])
def test_cocoop_whose_network_says_nothing_is_promptfl(classes, backbone):
    x, _ = a_batch(backbone)
    batch = Batch(x, torch.tensor([0, 2, 3, 3, 3, 0]), classes)
    (cocoop, one), (promptfl, two) = made("cocoop", backbone), made("promptfl", backbone, init="a photo of a")
    torch.nn.init.zeros_(one.network[2].weight)
    torch.nn.init.zeros_(one.network[2].bias)
    (ours, grads), (theirs, expected) = gradient(cocoop, one, batch), gradient(promptfl, two, batch)
    assert ours == pytest.approx(theirs, rel=1e-12)
    torch.testing.assert_close(grads["tokens"], expected["tokens"], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(grads["network.2.bias"], expected["tokens"].sum(dim=0), rtol=1e-9, atol=1e-13)
    assert (grads["network.0.weight"] == 0).all()


def test_proda_bounds_the_cross_entropy_by_means_and_covariances(backbone):
    """With the covariances of two classes written out, feature by feature."""
    method, module = made("proda", backbone, prompts=3, length=5, orthogonality=0.7)
    x, _ = a_batch(backbone, "proda")
    with torch.no_grad():
        module.tokens += 0.3 * torch.randn_like(module.tokens)  # random ones of 0.02 give nearly the same texts
    for classes, y in ((None, [0, 1, 4, 3, 2, 0]), (MASK, [0, 2, 3, 3, 2, 0])):
        active = range(5) if classes is None else classes.nonzero().flatten().tolist()
        texts = texts_of(module, classes)
        mean = texts.mean(axis=0)
        covariance = np.einsum("kid,kjd->dij", texts - mean, texts - mean) / (3 + 1)
        losses = []
        for image, label in zip(normalize(x, dim=1).numpy(), y, strict=True):
            right, scores = list(active).index(label), []
            for i in range(len(active)):
                both = covariance[:, i, i] + covariance[:, right, right] - 2 * covariance[:, i, right]
                variance = (image**2 * both).sum()
                scores.append(backbone.logit_scale * image @ mean[i] + backbone.logit_scale**2 / 2 * variance)
            losses.append(np.log(np.exp(np.array(scores) - scores[right]).sum()))
        stop = backbone.text.embed(backbone.text.tokenize(["."]))[0]
        bare = [torch.cat([stop[:1], tokens, stop[1:]])[None] for tokens in module.tokens]
        bare = normalize(torch.cat([backbone.text.encode(text, torch.tensor([7])) for text in bare]), dim=1)
        likeness = np.mean([abs((bare[j] @ bare[k]).item()) for j, k in ((0, 1), (0, 2), (1, 2))])
        expected = np.mean(losses) + 0.7 * likeness
        assert method.loss(module, Batch(x, torch.tensor(y), classes)).item() == pytest.approx(expected, rel=1e-9)
    scores = (
        np.einsum("bd,kcd->bc", normalize(x, dim=1).numpy(), texts_of(module)) / 3
    )  # of the mean texts, not stretched
    np.testing.assert_allclose(module(x).detach(), backbone.logit_scale * scores, rtol=1e-9, atol=1e-9)


def texts_of(module, classes=None):
    """(K, n, D) text features with each of K prompts."""
    return np.stack([module.texts(tokens, classes).detach().numpy() for tokens in module.tokens])


@pytest.mark.parametrize("classes", [None, MASK])
def test_proda_with_one_prompt_is_promptfl(classes, backbone):
    x, _ = a_batch(backbone)
    batch = Batch(x, torch.tensor([0, 2, 3, 3, 3, 0]), classes)
    (proda, one), (promptfl, two) = made("proda", backbone, prompts=1), made("promptfl", backbone)
    (ours, grads), (theirs, expected) = gradient(proda, one, batch), gradient(promptfl, two, batch)
    assert ours == pytest.approx(theirs, rel=1e-12)
    torch.testing.assert_close(grads["tokens"][0], expected["tokens"], rtol=1e-10, atol=1e-14)
    assert torch.equal(one(x, classes), two(x, classes))


def sinkhorn(near, entropy, rounds):
    """The balanced transport between the patches and the texts of one image and class."""
    held = np.exp((near - 1) / entropy)
    for _ in range(rounds):
        held = held / held.sum(axis=1, keepdims=True) / len(held)
        held = held / held.sum(axis=0) / held.shape[1]
    return held


def test_plot_scores_a_class_by_a_transport_to_which_every_patch_gives_alike(backbone, monkeypatch):
    method, module = made("plot", backbone, prompts=3, length=5, tolerance=0, iterations=300)
    x, y = a_batch(backbone, "plot")
    with torch.no_grad():
        module.tokens += 0.3 * torch.randn_like(module.tokens)
    texts = torch.stack([module.texts(tokens) for tokens in module.tokens], dim=1).detach()  # (C, K, D)
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for i, patches in enumerate(normalize(x, dim=2)):
        for c in range(5):
            near = (patches @ texts[c].T).numpy()
            held = sinkhorn(near, 0.1, 300)
            np.testing.assert_allclose(held.sum(axis=1), 1 / 9, rtol=1e-9)
            expected[i, c] = backbone.logit_scale * (held * near).sum()
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
    assert method.loss(module, Batch(x, y)).item() == pytest.approx(crossed(expected, y), rel=1e-9)
    monkeypatch.setattr("fedsim.methods._transport.MAX_SIMILARITIES", 1)  # an image at a time
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


def test_the_whole_mass_of_fedotp_is_plots_transport():
    near = 0.3 + 0.2 * torch.randn(3, 4, 7, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    partial, balanced = (plan(near, 0.1, 1.0, 0.0, 3000, balanced) for balanced in (False, True))
    torch.testing.assert_close(partial, balanced, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(
        balanced.sum(dim=-1), torch.full((3, 4, 7), 1 / 7, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert torch.equal(plan(near, 0.1, 1.0, 1e-2, 100, True)[1], plan(near[1], 0.1, 1.0, 1e-2, 100, True))


def test_plot_with_one_prompt_reads_the_mean_patch_and_with_one_patch_it_is_promptfl(backbone):
    x, y = a_batch(backbone, "plot")
    (plot, one), (promptfl, two) = made("plot", backbone, prompts=1), made("promptfl", backbone)
    means = normalize(x, dim=2).mean(dim=1) @ two.texts(two.tokens).T
    torch.testing.assert_close(one(x), backbone.logit_scale * means, rtol=1e-9, atol=1e-9)
    ours, grads = gradient(plot, one, Batch(x[:, :1], y))
    theirs, expected = gradient(promptfl, two, Batch(x[:, 0], y))
    assert ours == pytest.approx(theirs, rel=1e-12)
    torch.testing.assert_close(grads["tokens"][0], expected["tokens"], rtol=1e-9, atol=1e-13)
    three = made("plot", backbone, prompts=3)[1]
    texts = torch.stack([three.texts(tokens) for tokens in three.tokens]).mean(dim=0)  # with one patch, all get a third
    torch.testing.assert_close(three(x[:, :1]), cosines(x[:, 0], texts, backbone.logit_scale), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["proda", "plot"])
def test_several_prompts_that_start_alike_are_refused(name, backbone):
    with pytest.raises(
        InputError, match=r"--method\.init would give all 4 prompts the same tokens, .*--method\.prompts 1"
    ):
        made(name, backbone, init="a photo of a")
    assert made(name, backbone, init="a photo of a", prompts=1)[1].tokens.shape[:2] == (1, 4)

"""Adapters and keys on the image feature, against a few lines of arithmetic in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from fedsim import Backbone, InputError
from fedsim.methods import Batch, trained
from fedsim.registry import parse
from fedsim.training.stack import gradients

CLASSES, WIDTH, ROWS, SCALE = 5, 12, 7, 20.0


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(ROWS, WIDTH, seed=1), torch.tensor([0, 0, 2, 4, 4, 4, 0])  # no row of classes 1 and 3


@pytest.fixture
def backbone():
    return Backbone(normalize(draw(CLASSES, WIDTH, seed=2), dim=1), SCALE)


def build(backbone, name, seed=5, **fields):
    torch.manual_seed(seed)
    method = parse("method", {"name": name, **fields})
    return method, method.build(backbone).double()


def test_the_clip_adapter_of_vit_b_32_has_131072_parameters():
    _, module = build(Backbone(torch.eye(512)[:7], 100.0), "clip_adapter")
    assert sum(p.numel() for p in module.parameters()) == 2 * 512 * 128 == 131_072


def test_a_clip_adapter_mixes_the_normalised_feature_with_its_bottleneck(backbone):
    _, module = build(backbone, "clip_adapter", ratio=0.3)
    down, up = (module.state_dict()[f"adapter.{k}.weight"] for k in (0, 2))
    logits = module(X)
    for i in range(ROWS):
        f = X[i] / X[i].norm()
        mixed = 0.3 * (up @ (down @ f).clamp(min=0)).clamp(min=0) + 0.7 * f
        expected = SCALE * backbone.class_embeddings @ mixed / mixed.norm()
        torch.testing.assert_close(logits[i], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(9 * X), logits)


def test_a_clip_adapter_of_ratio_0_is_zero_shot_clip_and_of_little_width_is_whole(backbone):
    _, module = build(backbone, "clip_adapter", ratio=0.0)
    torch.testing.assert_close(module(X), SCALE * normalize(X, dim=1) @ backbone.class_embeddings.T)
    _, narrow = build(Backbone(torch.eye(3, dtype=torch.float64), 1.0), "clip_adapter")
    assert narrow(X[:, :3]).shape == (ROWS, 3) and narrow.adapter[0].weight.shape == (1, 3)


def test_a_tip_adapter_adds_the_answers_of_its_keys(backbone):
    _, module = build(backbone, "tip_adapter", alpha=0.5, shots=3, beta=2.0)
    keys = draw(CLASSES, WIDTH, seed=3)
    module.load_state_dict({"keys": keys})
    logits = module(X)
    for i in range(ROWS):
        f = X[i] / X[i].norm()
        for c in range(CLASSES):
            expected = SCALE * f @ backbone.class_embeddings[c] + 1.5 * torch.exp(-2.0 * (1 - f @ keys[c]))
            assert logits[i, c].item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_tip_adapter_starts_with_the_ranking_of_zero_shot_clip(backbone):
    _, module = build(backbone, "tip_adapter", alpha=50.0)
    plain = SCALE * normalize(X, dim=1) @ backbone.class_embeddings.T
    assert torch.equal(module(X).argsort(dim=1), plain.argsort(dim=1))
    assert (module(X) > plain).all()
    assert list(module.state_dict()) == ["keys"]


def test_a_tip_adapters_keys_move_along_the_clients_own_features(backbone):
    # What its docstring warns of: of a class with one image, the update has that image's direction.
    method, module = build(backbone, "tip_adapter")
    (slope,) = torch.autograd.grad(method.loss(module, Batch(X[3:4], Y[3:4])), [module.keys])
    cosines = torch.cosine_similarity(slope, X[3:4], dim=1)
    assert cosines[4].item() == pytest.approx(-1) and cosines[[0, 1, 2, 3]].tolist() == pytest.approx([1] * 4)


def test_one_step_to_the_class_means_is_the_training_free_cache(backbone):
    method, module = build(backbone, "tip_adapter", objective="means", optimizer="sgd", lr=1.0)
    (slope,) = torch.autograd.grad(method.loss(module, Batch(X, Y)), [module.keys])
    keys = (module.keys - method.lr * slope).detach()
    unit = X / X.norm(dim=1, keepdim=True)
    for c in range(CLASSES):
        expected = unit[c == Y].mean(dim=0) if (c == Y).any() else backbone.class_embeddings[c]
        torch.testing.assert_close(keys[c], expected)


@pytest.mark.parametrize(
    "fields", [{"name": "clip_adapter"}, {"name": "tip_adapter"}, {"name": "tip_adapter", "objective": "means"}]
)
def test_stacked_clients_have_the_gradients_that_they_have_alone(fields, backbone):
    method, module = build(backbone, **fields)
    assert not method.reads.towers
    assert all(tensor.is_floating_point() for tensor in module.state_dict().values())
    params = {name: tensor + 0.1 * draw(3, *tensor.shape, seed=4) for name, tensor in module.state_dict().items()}
    x, y = draw(3, ROWS, WIDTH, seed=6), torch.stack([Y, Y.flip(0), (Y + 1) % CLASSES])
    losses, grads = gradients(method, module, params, Batch(x, y))
    assert sorted(grads) == sorted(trained(module))
    for k in range(3):
        module.load_state_dict({name: tensor[k] for name, tensor in params.items()})
        loss = method.loss(module, Batch(x[k], y[k]))
        torch.testing.assert_close(losses[k], loss.detach())
        alone = torch.autograd.grad(loss, list(module.parameters()))
        for name, grad in zip(trained(module), alone, strict=True):
            assert grad.abs().max() > 1e-6
            torch.testing.assert_close(grads[name][k], grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("blocks", [1, 3])
def test_fedot_turns_features_by_the_cayley_transform_of_each_block(blocks, backbone):
    _, module = build(backbone, "fedot", blocks=blocks)
    with torch.no_grad():
        module.rotation.copy_(draw(*module.rotation.shape, seed=7))
        module.weight.add_(0.1 * draw(CLASSES, WIDTH, seed=8))
    whole, eye = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), torch.eye(WIDTH // blocks, dtype=torch.float64)
    for k, trained_matrix in enumerate(module.rotation.detach()):
        skew, own = (trained_matrix - trained_matrix.T) / 2, slice(k * len(eye), (k + 1) * len(eye))
        whole[own, own] = (eye + skew) @ torch.linalg.inv(eye - skew)
    torch.testing.assert_close(whole @ whole.T, torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (whole - torch.eye(WIDTH, dtype=torch.float64)).abs().max() > 0.5
    expected = SCALE * (X @ whole.T) @ module.weight.T / X.norm(dim=1, keepdim=True)
    torch.testing.assert_close(module(X), expected, rtol=1e-11, atol=1e-11)


def test_fedot_starts_as_the_probe_and_is_it_if_nothing_is_left_to_rotate(backbone):
    x, y, (probe, head) = X.repeat(2, 1, 1), Y.repeat(2, 1), build(backbone, "probe")
    weight = (head.weight + 0.1 * draw(CLASSES, WIDTH, seed=8)).detach().expand(2, -1, -1)
    loss, grads = gradients(probe, head, {"weight": weight}, Batch(x, y))
    for blocks in (1, WIDTH):
        method, module = build(backbone, "fedot", blocks=blocks)
        assert {name: method.scope(name) for name in module.state_dict()} == {"weight": "shared", "rotation": "private"}
        params = {"weight": weight, "rotation": module.rotation.detach().expand(2, -1, -1, -1)}
        ours, slopes = gradients(method, module, params, Batch(x, y))
        torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(slopes["weight"], grads["weight"], rtol=1e-10, atol=1e-13)
        assert (slopes["rotation"].abs().max() == 0) == (blocks == WIDTH)


def test_blocks_that_do_not_divide_a_feature_are_refused(backbone):
    with pytest.raises(InputError, match=r"--method\.blocks must be a divisor of the 12 numbers of a feature, not 5"):
        build(backbone, "fedot", blocks=5)

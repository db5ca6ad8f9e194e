"""A CNN that learns zero-shot CLIP's predictions, against both written out in float64."""

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.nn.functional import cross_entropy, normalize, relu

from fedsim import Backbone
from fedsim.clip.towers import ImageTower
from fedsim.methods import Batch, masked, trained
from fedsim.registry import parse
from fedsim.training.stack import gradients
from fedsim.training.task import Task

SMALL = {"image_size": 24, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "output_dim": 6}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
STUDENT = {"name": "distil", "resolution": 12, "width": 8, "layers": 2}
X = torch.randint(256, (5, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 3, 1, 3, 0])


@pytest.fixture(scope="module")
def visual():
    torch.manual_seed(4)
    return VisionTransformer(**SMALL).double().eval().requires_grad_(False)


@pytest.fixture
def built(visual):
    """The method with these fields, and its module in float64, as the engine masks it."""
    text = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    backbone = Backbone(normalize(text, dim=1), 20.0, image_tower=ImageTower(visual, MEAN, STD))

    def build(**fields):
        method = parse("method", STUDENT | fields)
        torch.manual_seed(2)
        return method, masked(method.build(backbone)).double()

    return build


def student(w, x):
    """(B, 3, 24, 24) bytes -> (B, C), with the weights of the module by name."""
    x = (x.double() / 127.5 - 1).view(len(x), 3, 12, 2, 12, 2).mean(dim=(3, 5))
    for k in (0, 3):
        height = x.shape[-1] // 2
        patches = torch.nn.functional.unfold(x, 3, padding=1, stride=2)  # (B, c * 9, height * height)
        x = (w[f"layers.{k}.weight"].flatten(1) @ patches).view(len(x), -1, height, height)
        groups = x.view(len(x), 8, -1)
        mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, correction=0, keepdim=True)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).view(x.shape)
        x = relu(w[f"layers.{k + 1}.weight"].view(-1, 1, 1) * x + w[f"layers.{k + 1}.bias"].view(-1, 1, 1))
    return x.mean(dim=(2, 3)) @ w["head.weight"].T + w["head.bias"]


def zero_shot(visual, module, x):
    pixels = (x.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return 20 * normalize(visual(pixels), dim=1) @ module.class_embeddings.T


@pytest.mark.parametrize("classes", [None, (0, 1, 3)])
def test_the_loss_is_that_of_labels_and_of_clips_predictions_at_a_temperature(built, visual, classes):
    method, module = built(distillation=0.7, temperature=2.0)
    active = [0, 1, 2, 3] if classes is None else [*classes]
    w = dict(module.named_parameters())
    logits, teacher = student(w, X)[:, active], zero_shot(visual, module, X)[:, active]
    p, q = ((some / 2).softmax(dim=1) for some in (teacher, logits))
    labels = -logits.log_softmax(dim=1)[range(5), [active.index(y) for y in Y]].mean()
    expected = labels + 0.7 * 4 * (p * (p / q).log()).sum(dim=1).mean()

    mask = None if classes is None else torch.tensor([True, True, False, True])
    loss = method.loss(module, Batch(X, Y, mask))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the statistics that CLIP reads are in float32
    found = torch.autograd.grad(loss, list(w.values()))
    for one, other in zip(found, torch.autograd.grad(expected, list(w.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert one.isfinite().all()


def test_a_cnn_that_predicts_as_clip_diverges_by_nothing(built, visual, monkeypatch):
    method, module = built(distillation=3.0)
    monkeypatch.setattr(type(module), "teacher", lambda self, x: self(x, None).detach())
    loss = method.loss(module, Batch(X, Y))
    torch.testing.assert_close(loss, cross_entropy(module(X, None), Y))


class Calls:
    def __init__(self, visual):
        self.count, self.handle = 0, visual.register_forward_pre_hook(self.add)

    def add(self, *_):
        self.count += 1


def test_clip_is_run_for_training_with_a_weight_and_never_to_predict(built, visual):
    calls = Calls(visual)
    plain, module = built(distillation=0.0)
    loss = plain.loss(module, Batch(X, Y))
    module.eval()
    assert torch.equal(loss, cross_entropy(plain.logits(module, X), Y))
    assert calls.count == 0
    method, module = built()
    method.loss(module, Batch(X, Y))
    assert calls.count == 1
    calls.handle.remove()


def test_with_a_weight_of_0_gradients_are_those_of_a_plain_cnn(built):
    method, module = built(distillation=0.0)
    params = {name: tensor.detach()[None] for name, tensor in module.state_dict().items()}
    losses, grads = gradients(method, module, params, Batch(X[None], Y[None]))
    expected = cross_entropy(student(dict(module.named_parameters()), X), Y)
    torch.testing.assert_close(losses[0], expected)
    for name, parameter in module.named_parameters():
        (grad,) = torch.autograd.grad(expected, parameter, retain_graph=True)
        torch.testing.assert_close(grads[name][0], grad)


def test_the_cnn_travels_and_nothing_of_clip(built):
    method, module = built()
    state = module.state_dict()
    assert sorted(state) == sorted(trained(module)) and not any("tower" in name for name in state)
    # Two convolutions without bias, a scale and a shift for each of their channels, and the head.
    count = 8 * 3 * 9 + 2 * 8 + 16 * 8 * 9 + 2 * 16 + 4 * 16 + 4
    task = Task(method, parse("server", "fedavg"), seed=0)
    floats = {name: tensor.float() for name, tensor in state.items()}
    assert task.payload(floats, cohort=1) == (4 * count, 4 * count)

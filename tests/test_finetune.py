"""Full fine-tuning through the towers, on the embedded model and on small towers of other kinds."""

import json
from functools import lru_cache

import pytest
import torch
from torch.nn.functional import normalize

from fedsim import Backbone, InputError
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.model import Clip
from fedsim.clip.towers import ImageTower, TextTower
from fedsim.methods import Batch, trained
from fedsim.registry import parse
from fedsim.training.stack import gradients

CLASSES = "cat", "dog", "owl", "pig"
Y = torch.tensor([2, 0, 2, 3])  # a class twice, a class not at all
OTHERS = {
    "resnet": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 64},
    "vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 64},
}


@lru_cache
def embedded():
    clip = Clip(find_weights(*EMBEDDED))
    return clip.model.double(), clip.tokenizer


@lru_cache
def other(kind, folder):
    """A small CLIP whose image tower is a ResNet of CLIP's own, or a vision transformer."""
    import open_clip

    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    name = f"small-{kind}"
    (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": OTHERS[kind], "text_cfg": text}))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    return open_clip.create_model(name).eval().requires_grad_(False).double(), embedded()[1]


def whole(model, tokenizer):
    """A backbone in float64 with both towers, and zero-shot CLIP's own features and logits of four pictures."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    pixels = torch.randint(256, (4, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    stretched = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    features = model.encode_image(stretched)
    texts = model.encode_text(tokenizer([f"a picture of a {name}" for name in CLASSES]), normalize=True)
    scale = model.logit_scale.exp().item()
    towers = TextTower(model, tokenizer), ImageTower(model.visual, mean, std)
    backbone = Backbone(texts, scale, CLASSES, ("a picture of a {}",), *towers, groups=("old", "young"))
    return backbone, pixels, features


def zero_shot(backbone, features):
    return backbone.logit_scale * normalize(features, dim=1) @ backbone.class_embeddings.T


def inputs(method, pixels, features):
    return pixels if method.reads.image == "pixels" else features


@pytest.fixture(scope="module")
def tiny():
    return whole(*embedded())


@pytest.mark.parametrize(
    ("fields", "reads"),
    [
        ({}, ("pixels", "blocks")),
        ({"towers": "image"}, ("pixels", "features")),
        ({"towers": "text"}, ("features", "blocks")),
        ({"towers": "image", "head": True}, ("pixels", "features")),
    ],
)
def test_it_starts_as_zero_shot_clip_and_owns_what_it_trains(fields, reads, tiny):
    backbone, pixels, features = tiny
    method = parse("method", {"name": "finetune"} | fields)
    assert (method.reads.image, method.reads.text) == reads
    module = method.build(backbone).double()
    x = inputs(method, pixels, features)
    torch.testing.assert_close(module(x), zero_shot(backbone, features), rtol=1e-5, atol=1e-5)

    sides = {"image": backbone.image.weights, "text": backbone.text.weights}
    image, text = reads[0] == "pixels", reads[1] == "blocks"
    owned = [f"image.{n.replace('.', '/')}" for n in sides["image"] if image]
    owned += [f"text.{n.replace('.', '/')}" for n in sides["text"] if text] + ["logit_scale"] * text
    owned += ["head"] * ("head" in fields)
    assert sorted(module.state_dict()) == sorted(trained(module)) == sorted(owned)
    assert all(tensor.is_contiguous() for tensor in module.state_dict().values())


def test_every_weight_learns_and_the_towers_themselves_stay_as_they_were(tiny):
    backbone, pixels, _ = tiny
    method = parse("method", "finetune")
    module = method.build(backbone).double().train()
    before = {name: w.clone() for name, w in (backbone.image.weights | backbone.text.weights).items()}
    statistics = {name: b.clone() for name, b in embedded()[0].visual.named_buffers()}
    params = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    losses, grads = gradients(method, module, params, Batch(pixels.unsqueeze(0), Y.unsqueeze(0)))
    assert grads.keys() == params.keys()
    assert [name for name, grad in grads.items() if not grad.abs().max() > 0] == []
    stepped = {name: value - 1e-3 * grads[name][0] for name, value in params.items()}
    assert gradients(method, module, stepped, Batch(pixels.unsqueeze(0), Y.unsqueeze(0)))[0] < losses
    assert all(torch.equal(before[n], w) for n, w in (backbone.image.weights | backbone.text.weights).items())
    assert all(torch.equal(statistics[n], b) for n, b in embedded()[0].visual.named_buffers())


def test_two_clients_are_each_trained_at_their_own_weights(tiny):
    backbone, _, features = tiny
    method = parse("method", {"name": "finetune", "towers": "text"})
    module = method.build(backbone).double()
    one = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    other = one | {"logit_scale": one["logit_scale"] - 1}
    stacked = {name: torch.stack([one[name], other[name]]) for name in one}
    losses, grads = gradients(method, module, stacked, Batch(torch.stack([features] * 2), torch.stack([Y] * 2)))
    module.load_state_dict(other)
    loss = method.loss(module, Batch(features, Y))
    torch.testing.assert_close(losses[1], loss.detach())
    (slope,) = torch.autograd.grad(loss, [module.logit_scale])
    torch.testing.assert_close(grads["logit_scale"][1], slope)
    assert abs(grads["logit_scale"][0] - slope) > 1e-3


@pytest.mark.parametrize("fields", [{"towers": "text"}, {"towers": "image", "head": True}])
def test_the_contrastive_loss_is_over_the_texts_of_the_batch(fields, tiny):
    backbone, pixels, features = tiny
    logits = zero_shot(backbone, features)
    pairs = [[logits[i, Y[j]].item() for j in range(4)] for i in range(4)]
    lines = [*((pairs[i], i) for i in range(4)), *(([row[j] for row in pairs], j) for j in range(4))]
    expected = sum(torch.tensor(line).logsumexp(0).item() - line[own] for line, own in lines) / 8
    for objective, value in (
        ("contrastive", expected),
        ("cross_entropy", (logits.logsumexp(1) - logits[torch.arange(4), Y]).mean().item()),
    ):
        method = parse("method", {"name": "finetune", "objective": objective} | fields)
        module = method.build(backbone).double()
        assert method.loss(module, Batch(inputs(method, pixels, features), Y)).item() == pytest.approx(value, rel=1e-5)


def test_fedprox_pulls_every_weight_back_by_mu_times_its_distance(tiny):
    backbone, *_ = tiny
    method, server = (
        parse("method", {"name": "finetune", "towers": "text"}),
        parse("server", {"name": "fedprox", "mu": 3}),
    )
    module = method.build(backbone).double()
    received = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        module.logit_scale.add_(0.25)
    live = dict(module.named_parameters())
    added = server.gradient(live, received, {}, {})
    assert added.keys() == live.keys()
    for name in live:
        torch.testing.assert_close(added[name], 3 * (live[name] - received[name]))
    assert added["logit_scale"].item() == pytest.approx(0.75)


def test_inactive_classes_cost_nothing_and_change_nothing(tiny):
    backbone, _, features = tiny
    method = parse("method", {"name": "finetune", "towers": "text", "objective": "cross_entropy"})
    module = method.build(backbone).double()
    whole = module(features)
    classes = torch.tensor([True, False, True, True])
    logits = module(features, classes)
    torch.testing.assert_close(logits[:, classes], whole[:, classes])
    assert (logits[:, 1] == -torch.inf).all()
    grads = torch.autograd.grad(method.loss(module, Batch(features, Y, classes)), list(module.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", OTHERS)
def test_resnets_and_vision_transformers_are_trained_through(kind, tmp_path_factory):
    backbone, pixels, features = whole(*other(kind, tmp_path_factory.getbasetemp()))
    method = parse("method", {"name": "finetune", "towers": "image"})
    module = method.build(backbone).double()
    torch.testing.assert_close(module(pixels), zero_shot(backbone, features), rtol=1e-5, atol=1e-5)
    params = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    _, grads = gradients(method, module, params, Batch(pixels.unsqueeze(0), Y.unsqueeze(0)))
    first = {"resnet": "image.conv1/weight", "vit": "image.class_embedding"}[kind]
    assert grads[first].abs().max() > 0


def test_class_weights_go_with_the_image_tower_alone():
    with pytest.raises(InputError, match=r"finetune\.head .* needs towers: image, not 'both'"):
        parse("method", {"name": "finetune", "head": True})


def test_without_names_there_are_no_texts_to_train_through(tiny):
    backbone, *_ = tiny
    nameless = Backbone(backbone.class_embeddings, backbone.logit_scale, text_tower=backbone.text)
    with pytest.raises(InputError, match="needs the names of the classes"):
        parse("method", {"name": "finetune", "towers": "text"}).build(nameless)


def test_a_method_without_a_tower_says_which_site_it_forgot(tiny):
    backbone, *_ = tiny
    with pytest.raises(TypeError, match="image_blocks"):
        parse("method", {"name": "finetune", "towers": "image"}).build(
            Backbone(backbone.class_embeddings, 1.0, CLASSES)
        )

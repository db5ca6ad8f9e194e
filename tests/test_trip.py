"""TRIP: prompts of experts, mixed by where the patches of an image belong, against loops of a few lines."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from test_prompts import CLASSES, a_backbone, a_batch, by_open_clip, made, tokens_of
from test_stack import SIZES, agree, two_rounds
from test_stack import clients as clients  # a fixture
from torch.nn.functional import normalize

from fedsim.clip.checkpoints import EMBEDDED, find_weights, width_of
from fedsim.clip.model import Clip
from fedsim.datasets import TRAIN, Features
from fedsim.encoding import from_features
from fedsim.methods import Batch
from fedsim.methods.trip import route
from fedsim.registry import parse
from fedsim.representations import Representations
from fedsim.training.inputs import Inputs
from fedsim.training.round_zero import initial_params
from fedsim.training.stack import gradients
from fedsim.training.task import Task


@pytest.fixture(scope="module")
def double():
    return a_backbone(torch.float64)


@pytest.fixture(scope="module")
def backbone(double):
    return double[1]


def routed(tokens, keys, room, iterations):
    """(T, D), (E, D) -> (E,) shares: one patch after the other, and all assignments of clusters to keys."""
    count, experts = len(tokens), len(keys)
    places = [int(count // experts * room) + (k < count % experts) for k in range(experts)]
    centres = tokens[[(2 * k + 1) * count // (2 * experts) for k in range(experts)]].copy()
    bonus = np.zeros(experts)
    for _ in range(iterations):
        distances = np.linalg.norm(tokens[:, None] - centres, axis=2)
        members = [[] for _ in range(experts)]
        for patch in np.argsort((distances + bonus).min(axis=1), kind="stable"):
            wish = int((distances + bonus)[patch].argmin())
            if len(members[wish]) < places[wish]:
                members[wish].append(patch)
        farthest = tokens[distances.min(axis=1).argmax()]
        means = np.stack([tokens[own].mean(axis=0) if own else farthest for own in members])
        bonus = np.array([bonus[k] + 1e-4 * (len(own) - places[k]) if own else 0 for k, own in enumerate(members)])
        if np.linalg.norm(means - centres, axis=1).mean() < 1e-4:
            break
        centres = means
    near = centres / np.linalg.norm(centres, axis=1, keepdims=True) @ keys.T
    best = max(permutations(range(experts)), key=lambda order: sum(near[k, e] for k, e in enumerate(order)))
    shares = np.zeros(experts)
    shares[list(best)] = [len(own) for own in members]
    return shares / shares.sum()


@pytest.mark.parametrize("room", [1.0, 2.0])
@pytest.mark.parametrize("iterations", [1, 4, 100])
def test_patches_are_clustered_one_by_one_and_clusters_matched_with_keys(room, iterations):
    draw = torch.Generator().manual_seed(4)
    keys = torch.nn.init.orthogonal_(torch.empty(3, 6), generator=draw).double()
    # Patches of unequal groups; in the first image all are the same but one, so that clusters run empty.
    tokens = torch.randn(5, 14, 6, generator=draw).double() + 2 * keys[torch.randint(2, (5, 14), generator=draw)]
    tokens[0, 1:] = tokens[0, 0]
    ours = route(tokens, keys, room, iterations=iterations)
    expected = np.stack([routed(image.numpy(), keys.numpy(), room, iterations) for image in tokens])
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15)
    if iterations == 100:
        assert len(ours.unique(dim=0)) > 2 and (room == 2.0) == (ours[1:].max() > 0.5)
        for k in range(5):  # nothing depends on the other images
            assert torch.equal(route(tokens[k : k + 1], keys, room), ours[k : k + 1])


def test_an_image_has_the_weighted_tokens_of_the_experts_and_is_distilled_from_zero_shot_clip(double, backbone):
    clip = double[0]
    method, module = made("trip", backbone, length=4, experts=2, distillation=0.7, room=1.5, test_room=1.2)
    x, y = a_batch(backbone, "trip")
    first, second = (tokens_of(backbone, text) for text in ("a picture of some", "one small drawing of"))
    with torch.no_grad():
        module.tokens.copy_(torch.stack([first, second]))
        module.keys.copy_(torch.eye(backbone.width)[:2])
        assert module(x).shape == (6, len(CLASSES))

        def scores(room):
            rows = []
            for image in x:
                share = routed(image[1:].numpy(), module.keys.numpy(), room, 100)
                texts = module.texts(share[0] * first + share[1] * second)
                rows.append(clip.logit_scale * normalize(image[0], dim=0) @ texts.T)
            return torch.stack(rows)

        torch.testing.assert_close(module(x), scores(1.2), rtol=1e-9, atol=1e-9)
        log = scores(1.5).log_softmax(dim=1)
        teacher = (clip.logit_scale * normalize(x[:, 0], dim=1) @ backbone.class_embeddings.T).softmax(dim=1)
        expected = -log[range(6), y].mean() - 0.7 * (teacher * log).sum(dim=1).mean()
    torch.testing.assert_close(method.loss(module, Batch(x, y)).detach(), expected, rtol=1e-9, atol=0)
    # Of the active classes alone, teacher and student.
    classes = torch.tensor([True, True, False, False, True])
    with torch.no_grad():
        log, teacher = scores(1.5)[:, classes].log_softmax(dim=1), teacher[:, classes]
        teacher = teacher / teacher.sum(dim=1, keepdim=True)
        expected = -log[range(6), y % 2].mean() - 0.7 * (teacher * log).sum(dim=1).mean()
    torch.testing.assert_close(method.loss(module, Batch(x, y % 2, classes)).detach(), expected, rtol=1e-9, atol=0)


def test_one_expert_without_distillation_is_promptfl_and_equal_experts_are_too(double, backbone, monkeypatch):
    clip = double[0]
    (plain, one), (method, two) = (
        made("promptfl", backbone, length=3),
        made("trip", backbone, length=3, experts=1, distillation=0),
    )
    assert torch.equal(one.tokens, two.tokens[0])
    x, y = a_batch(backbone, "trip")
    torch.testing.assert_close(two(x), one(x[:, 0]), rtol=1e-12, atol=1e-12)
    alone, expected = gradients(plain, one, {"tokens": one.tokens.detach()[None]}, Batch(x[None, :, 0], y[None]))
    losses, grads = gradients(method, two, {n: t[None] for n, t in two.state_dict().items()}, Batch(x[None], y[None]))
    torch.testing.assert_close(losses, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads["tokens"][:, 0], expected["tokens"], rtol=1e-9, atol=1e-13)
    # Weights have the sum 1, so equal experts are one.
    _, four = made("trip", backbone, init="a picture of a")
    monkeypatch.setattr("fedsim.methods.trip.MAX_TEXTS", 1)  # an image at a time
    texts = by_open_clip(clip, "a picture of a {}.")
    torch.testing.assert_close(four(x), clip.logit_scale * normalize(x[:, 0], dim=1) @ texts.T, rtol=1e-9, atol=1e-9)


def test_experts_start_apart_and_travel_and_keys_never_do(backbone):
    task = Task(parse("method", "trip"), parse("server", "moving_average"), seed=0, rounds=15)
    params = initial_params(task, backbone)
    assert {name: tuple(tensor.shape) for name, tensor in params.items()} == {"tokens": (4, 2, 128), "keys": (4, 256)}
    assert set(task.select(params, "frozen")) == {"keys"} and not task.is_personal(params)
    assert task.payload(params, cohort=3) == (4 * 4 * 2 * 128, 4 * 4 * 2 * 128)
    torch.testing.assert_close(params["keys"] @ params["keys"].T, torch.eye(4), rtol=0, atol=1e-5)
    assert len(params["tokens"].unique(dim=0)) == 4


def test_an_image_is_read_as_its_feature_and_then_its_patches_each_of_the_same_view():
    draw = np.random.default_rng(0)
    arrays = {"features": draw.standard_normal((8, 3)), "tokens": draw.standard_normal((8, 5, 3))}
    source = Representations(4, "here", arrays=arrays, views=2)
    inputs = Inputs(source, "all_tokens", np.array([3, 1]), np.array([0, 1]), "cpu", torch.float64)
    expected = [np.vstack([arrays["features"][at], arrays["tokens"][at]]) for at in (3, 1 + 4)]
    assert np.array_equal(inputs.whole(), expected)
    assert np.array_equal(inputs[torch.tensor([[1, 0], [0, 0]])][0, 0], expected[1])


def test_clients_are_trained_on_both_paths_alike(clients, tmp_path):
    frozen, rng = Clip(find_weights(*EMBEDDED)).frozen(), np.random.default_rng(3)
    width, count = width_of(frozen.weights), sum(SIZES)
    text = rng.standard_normal((len(CLASSES), width))
    names = {"classes": CLASSES, "domains": ("ink",), "split": np.full(count, TRAIN, np.int8)}
    x, y = rng.standard_normal((count, width)).astype(np.float32), rng.integers(0, len(CLASSES), count)
    text = (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)
    features = Features(x=x, y=y, domain=np.zeros(count, np.int64), logit_scale=20.0, class_embeddings=text, **names)
    data = from_features(features)
    arrays = {"features": x, "tokens": rng.standard_normal((count, 9, width)).astype(np.float16)}
    data = replace(data, representations=Representations(count, "here", arrays=arrays))
    method = parse("method", {"name": "trip", "lr": 1e-2, "experts": 2, "batch_size": 32})
    task = {"method": method, "server": parse("server", "fedavg"), "dtype": "float64", "frozen": frozen}
    stacked, single = (two_rounds(data, clients, tmp_path, reference, **task) for reference in (False, True))
    agree(stacked, single, 1e-8, 1e-10)
    assert np.abs(single[0][1].delta).sum() > 0

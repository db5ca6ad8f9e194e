"""Prompts per class and domain, and shared ones with private ones (FedAPT, FedPHA), against formulas of a few lines."""

from dataclasses import replace

import pytest
import torch
from test_prompts import CLASSES, a_backbone, a_batch, by_open_clip, made, tokens_of
from test_stack import agree, two_rounds
from test_stack import clients as clients  # fixtures
from test_stacked_towers import features as features
from test_stacked_towers import frozen as frozen
from torch.nn.functional import cross_entropy, normalize

from fedsim import InputError, component, run
from fedsim.clip.sites import stackable
from fedsim.methods import Batch, ClientContext
from fedsim.methods.probe import Probe
from fedsim.registry import parse
from fedsim.training.client_store import PrivateState
from fedsim.training.round_zero import initial_params
from fedsim.training.stack import gradients
from fedsim.training.task import Task

DOMAINS = 3


@pytest.fixture(scope="module")
def double():
    return a_backbone(torch.float64)


@pytest.fixture(scope="module")
def backbone(double):
    return replace(double[1], domains=DOMAINS)


def client_of(domain):
    return ClientContext(torch.tensor(domain), torch.ones(len(CLASSES), dtype=torch.int64), round=1)


def by_open_clips_blocks(clip, prompts, names=CLASSES):
    """(n, L, W) tokens, those of each text -> (n, D) unit rows, padded to the full context and text by text."""
    model = clip.model
    length = prompts.shape[1]
    tokens = clip.tokenizer([f"{'X ' * length}{name}." for name in names])
    x = model.token_embedding(tokens)
    x[:, 1 : 1 + length] = prompts
    x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
    ends = tokens.argmax(dim=1)
    return normalize(model.ln_final(x)[torch.arange(len(names)), ends] @ model.text_projection, dim=-1)


def fedapt(backbone, **fields):
    method, module = made("fedapt", backbone, **{"length": 4, **fields})
    with torch.no_grad():
        module.tokens.mul_(20)  # so that keys and tokens change the texts visibly
    return method, module


def test_fedapt_trains_with_the_key_of_the_clients_domain_and_learns_that_domain(double, backbone):
    clip, (method, module) = double[0], fedapt(backbone)
    x, y = a_batch(backbone)
    with torch.no_grad():
        prompts = module.tokens * (1 + module.keys[1])
        texts = by_open_clips_blocks(clip, prompts)
        logits = clip.logit_scale * normalize(x, dim=1) @ texts.T
        known = (x @ module.query.weight.T).log_softmax(dim=1)[:, 1]
        expected = -logits.log_softmax(dim=1)[range(6), y].mean() - known.mean()
        other = method.loss(module, Batch(x, y, client=client_of(0)))
    loss = method.loss(module, Batch(x, y, client=client_of(1)))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=0)
    assert abs(other - expected) > 1e-3
    # A client whose rows are of several domains trains with the mean of the keys.
    mixed = method.loss(module, Batch(x, y, client=client_of(-1)))
    with torch.no_grad():
        texts = by_open_clips_blocks(clip, module.tokens * (1 + module.keys.mean(dim=0)))
        logits = clip.logit_scale * normalize(x, dim=1) @ texts.T
        known = (x @ module.query.weight.T).log_softmax(dim=1).mean(dim=1)
        expected = -logits.log_softmax(dim=1)[range(6), y].mean() - known.mean()
    torch.testing.assert_close(mixed.detach(), expected, rtol=1e-10, atol=0)


def test_fedapt_scores_an_image_as_the_program_does_which_encodes_texts_for_each(double, backbone):
    """Where one weight is nearly 1, which the standardized scores and the low temperature see to."""
    clip, (_, module) = double[0], fedapt(backbone, temperature=0.01)
    x, _ = a_batch(backbone)
    with torch.no_grad():
        scores = x @ module.query.weight.T
        standardized = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True)
        weights = (standardized / 0.01).softmax(dim=1)
        torch.testing.assert_close(module.weights(x), weights, rtol=1e-9, atol=1e-12)
        assert weights.amax(dim=1).min() > 0.99 and len(weights.argmax(dim=1).unique()) > 1
        expected = []
        for row, weight in zip(x, weights, strict=True):
            key = torch.einsum("k,klw->lw", weight, module.keys)
            texts = by_open_clips_blocks(clip, module.tokens * (1 + key))
            expected.append(clip.logit_scale * normalize(row, dim=0) @ texts.T)
        ours = module(x)
    near = weights.amax(dim=1) > 1 - 1e-9
    assert near.sum() >= 3
    torch.testing.assert_close(ours[near], torch.stack(expected)[near], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, torch.stack(expected), rtol=0.02, atol=0.02)


def test_fedapt_with_equal_keys_or_one_domain_is_a_prompt_per_class(double, backbone):
    clip, (_, module) = double[0], fedapt(backbone, temperature=1.0)
    x, _ = a_batch(backbone)
    _, single = fedapt(replace(backbone, domains=1), temperature=1.0)
    with torch.no_grad():
        module.keys.copy_(module.keys[:1].clone())
        for prompts in (module, single):
            texts = by_open_clips_blocks(clip, prompts.tokens * (1 + prompts.keys[0]))
            expected = clip.logit_scale * normalize(x, dim=1) @ texts.T
            torch.testing.assert_close(prompts(x), expected, rtol=1e-10, atol=1e-10)
        # Without a key, and with the same tokens before all names, it is PromptFL.
        _, plain = made("promptfl", backbone, length=4)
        module.keys.zero_()
        module.tokens.copy_(plain.tokens.expand_as(module.tokens))
        torch.testing.assert_close(module(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classes", [None, [True, False, True, False, True]])
def test_clients_of_fedapt_train_as_alone_each_with_its_key(classes, backbone):
    method, module = fedapt(backbone)
    x, y = a_batch(backbone, rows=8)
    x, y = x.view(2, 4, -1), torch.tensor([[0, 2, 4, 0], [2, 2, 4, 0]])
    masks = None if classes is None else torch.tensor([classes, classes])
    context = ClientContext(torch.tensor([2, 0]), torch.ones(2, len(CLASSES), dtype=torch.int64), round=1)
    params = {n: torch.stack([t.detach(), t.detach() + 0.01]) for n, t in module.state_dict().items()}
    losses, grads = gradients(method, module, params, Batch(x, y, masks, context))
    assert grads.keys() == {"tokens", "query.weight"}
    for k in range(2):
        module.load_state_dict({n: t[k] for n, t in params.items()})
        module.zero_grad()
        loss = method.loss(module, Batch(x[k], y[k], masks if masks is None else masks[k], context.part(k)))
        loss.backward()
        torch.testing.assert_close(losses[k], loss.detach(), rtol=1e-12, atol=0)
        for n, parameter in module.named_parameters():
            torch.testing.assert_close(grads[n][k], parameter.grad, rtol=1e-9, atol=1e-14)
            assert parameter.grad.abs().max() > 0
    if classes:
        assert not module.tokens.grad[~torch.tensor(classes)].any()


def test_fedapt_sends_its_prompts_and_the_layer_and_never_a_key(backbone):
    task = Task(parse("method", "fedapt"), parse("server", "fedavg"), seed=0)
    params = initial_params(task, backbone)
    assert set(task.select(params, "shared")) == {"tokens", "query.weight"}
    assert set(task.select(params, "frozen")) == {"keys"} and params["keys"].shape == (DOMAINS, 24, 128)
    floats = len(CLASSES) * 24 * 128 + DOMAINS * backbone.width
    assert task.payload(params, cohort=2) == (4 * floats, 4 * floats)
    assert 0 <= params["keys"].min() < 0.01 and 0.99 < params["keys"].max() < 1
    assert params["tokens"].std().item() == pytest.approx(0.02, rel=0.05)


def test_fedpha_pulls_to_the_weak_directions_of_the_shared_prompt_and_pushes_off_its_texts(double, backbone):
    clip = double[0]
    method, module = made("fedpha", backbone, length=4, private_length=6, share=0.5, pull=300.0, push=3.0, margin=1.2)
    x, y = a_batch(backbone)
    with torch.no_grad():
        module.together.copy_(tokens_of(backbone, "a picture of some"))
        module.own.copy_(tokens_of(backbone, "one small drawing with many colours"))
        # By the eigenvectors of a Gram matrix, in place of a singular value decomposition.
        values, vectors = torch.linalg.eigh(module.together @ module.together.T)
        weak = vectors[:, :2].T @ module.together / values[:2].sqrt()[:, None]
        tokens = module.own @ weak.T @ weak
        projected = by_open_clips_blocks(clip, tokens.expand(len(CLASSES), -1, -1))
        own = by_open_clip(clip, "one small drawing with many colours {}.")
        shared = by_open_clip(clip, "a picture of some {}.")
        scores = [clip.logit_scale * normalize(x, dim=1) @ texts.T for texts in (own, shared)]
        entropies = [-logits.log_softmax(dim=1)[range(6), y].mean() for logits in scores]
        pull, distances = (own - projected).square().mean(), (own - shared).square().sum(dim=1).sqrt()
        push = (1.2 - distances).clamp(min=0).mean()
        assert 300 * pull > 1e-2 and push > 1e-2
        expected = sum(entropies) + 300 * pull + 3 * push
        torch.testing.assert_close(module(x), scores[0], rtol=1e-10, atol=1e-10)  # predicts with its own
    loss = method.loss(module, Batch(x, y))
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=0)


def test_fedpha_without_its_two_terms_is_promptfl_and_a_prompt_that_stays(backbone):
    x, y = a_batch(backbone, rows=8)
    (plain, one), (method, two) = (
        made("promptfl", backbone, length=4),
        made("fedpha", backbone, length=4, pull=0, push=0),
    )
    assert torch.equal(one.tokens, two.together)
    params = {name: tensor[None] for name, tensor in two.state_dict().items()}
    losses, grads = gradients(method, two, params, Batch(x[None], y[None]))
    for name in ("together", "own"):
        same, alone = gradients(plain, one, {"tokens": params[name]}, Batch(x[None], y[None]))
        losses = losses - same
        torch.testing.assert_close(grads[name], alone["tokens"], rtol=1e-12, atol=1e-15)
    assert losses.abs() < 1e-12
    # With the terms, the shared prompt hears of the private one, through the decomposition too.
    full, _ = made("fedpha", backbone, length=4, push=0, pull=100.0)
    _, changed = gradients(full, two, params, Batch(x[None], y[None]))
    assert (changed["together"] - grads["together"]).abs().max() > 1e-8


def test_fedpha_keeps_its_own_prompt_whatever_its_length_and_sends_the_shared_one(backbone):
    task = Task(parse("method", {"name": "fedpha", "private_length": 20}), parse("server", "fedavg"), seed=0)
    params = initial_params(task, backbone)
    assert {name: tuple(tensor.shape) for name, tensor in params.items()} == {"together": (16, 128), "own": (20, 128)}
    assert set(task.select(params, "private")) == {"own"} and task.is_personal(params)
    assert task.payload(params, cohort=2) == (4 * 16 * 128, 4 * 16 * 128)


def test_clients_of_fedpha_may_have_private_prompts_of_different_lengths(backbone):
    """Client 5 of spread 3 has one token more than client 4, and computes as with a prompt that is no longer."""
    x, y = a_batch(backbone)
    method, module = made("fedpha", backbone, length=4, private_length=2, spread=3)
    assert module.own.shape == (5, 128) and not stackable(method.sites) and stackable(parse("method", "fedpha").sites)
    for client, length in ((0, 2), (3, 5), (4, 2), (5, 3)):
        batch = Batch(x, y, client=client_of(0)._replace(id=torch.tensor(client)))
        plain, same = made("fedpha", backbone, length=4, private_length=length)
        same.load_state_dict({"together": module.together, "own": module.own[:length]})
        loss, expected = method.loss(module, batch), plain.loss(same, Batch(x, y))
        assert loss == expected
        assert torch.equal(method.logits(module, x, None, batch.client), same(x))
        grad, (shorter,) = torch.autograd.grad(loss, module.own)[0], torch.autograd.grad(expected, [same.own])
        assert torch.equal(grad[:length], shorter) and not grad[length:].any()


def test_each_client_trains_and_stores_its_length(features, clients, frozen, tmp_path):
    fields = {"name": "fedpha", "length": 2, "private_length": 1, "spread": 2, "batch_size": 64, "weight_decay": 0.0}
    task = {
        "method": parse("method", fields),
        "server": parse("server", "fedavg"),
        "dtype": "float64",
        "frozen": frozen,
    }
    stacked, single = (two_rounds(features, clients, tmp_path, reference, **task) for reference in (False, True))
    agree(stacked, single, 1e-8, 1e-10)
    start = PrivateState.from_tensors(stacked[1][0]).params["own"][1:]  # client 0 has one token
    for client, stored in enumerate(stacked[1]):
        changed = (PrivateState.from_tensors(stored).params["own"][1:] != start).any(dim=1)
        assert changed.tolist() == [client % 3 > 0, client % 3 > 1]


SEEN = []


@component
class Attentive(Probe):
    """Notes which client's parameters are evaluated on the rows of which domain."""

    reads_client = True

    def logits(self, module, x, classes=None, client=None):
        SEEN.append((int(client.id), int(client.domain)))
        return super().logits(module, x, classes)

    def loss(self, module, batch):
        return cross_entropy(module(batch.x, batch.classes), batch.y)

    def scope(self, name):
        return "private"


def test_a_method_is_told_whose_parameters_it_evaluates_and_whose_rows(config):
    SEEN.clear()
    run(config(method=Attentive(), rounds=1))
    # Two clients, of oil and photo, each on its own rows and on those of the held-out ink.
    assert {(0, 1), (1, 2), (0, 0), (1, 0)} <= set(SEEN)
    assert not {(0, 2), (1, 1)} & set(SEEN)


def test_fedpha_removes_a_whole_number_of_directions_and_needs_independent_tokens(backbone):
    for length, removed in ((16, 3), (10, 2), (5, 1), (4, 0)):
        assert made("fedpha", backbone, length=length)[1].removed == removed
    assert made("fedpha", backbone, length=4, share=1.0)[1].removed == 0
    with pytest.raises(InputError, match=r"--method\.init 'a photo of a' has tokens that depend on each other"):
        made("fedpha", backbone, init="a photo of a")
    with pytest.raises(InputError, match=r"--method\.private-length 27 leaves no room for 'hot air balloon\.'"):
        made("fedpha", backbone, private_length=27)

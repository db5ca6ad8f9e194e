"""Prompts that depend on the domain or on the image (FedAPT), against formulas of a few lines."""

from dataclasses import replace

import pytest
import torch
from test_prompts import CLASSES, a_backbone, a_batch, made
from torch.nn.functional import normalize

from fedsim.methods import Batch, ClientContext
from fedsim.registry import parse
from fedsim.training.stack import gradients
from fedsim.training.task import Task, initial_params

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

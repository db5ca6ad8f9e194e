"""Prompts of domains and attention over them (PLAN), against formulas of a few lines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_insertions import backbones as backbones  # fixtures
from test_insertions import built, draw, one_by_one, pixels, written_out
from test_insertions import texts as texts
from test_rules import RNG, Bowl, a_chunk, replied
from test_visual_tokens import pictures as pictures
from test_visual_tokens import run_on_both_engines
from test_visual_tokens import small as small
from torch.nn.functional import layer_norm, normalize

from fedsim import InputError
from fedsim.methods import Batch, ClientContext, RuleContext
from fedsim.registry import parse
from fedsim.updates import sum_chunks

X, Y, ACTIVE = pixels(), torch.tensor([0, 2, 3]), torch.tensor([True, False, True, True])
DOMAINS = {"text_prompts": (0, 1), "visual_prompts": (2, 3)}


def attended(prompts, aggregator):
    """(K, d, L, W) -> (d, L, W), of two heads, in plain arithmetic."""
    w = dict(aggregator.named_parameters())

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    blocks = []
    for k in range(prompts.shape[1]):
        x = prompts[:, k].transpose(0, 1)  # each token attends to those at its place in other domains
        packed = x @ w[f"attention.{k}.in_proj_weight"].T + w[f"attention.{k}.in_proj_bias"]
        query, key, value = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in packed.chunk(3, dim=2))
        shares = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        x = norm(x + linear((shares @ value).transpose(1, 2).flatten(2), f"attention.{k}.out_proj"), "norm")
        x = norm(x + linear(linear(x, f"widen.{k}").clamp(min=0), f"narrow.{k}"), "last_norm")
        blocks.append(x.mean(dim=1))
    return torch.stack(blocks)


def logits_of(model, visual, backbone, module, texts, tokens):
    """(3, n) of the active classes."""
    images = normalize(written_out(visual, backbone.image.normalized(X), tokens), dim=1)
    rows = module.names[ACTIVE]
    features = one_by_one(model, rows[0, :1], rows[:, 1:], module.ends[ACTIVE] - 1, texts)
    return 20 * images @ normalize(features, dim=1).T


def batch(round, domain, received=None):
    client = ClientContext(torch.tensor(domain), torch.ones(4, dtype=torch.int64), round)
    return Batch(X, Y, ACTIVE, client, rule=received and RuleContext(received, {}, {}))


@pytest.mark.parametrize("aggregation", ["mean", "attention"])
def test_plan_trains_the_prompt_of_a_domain_and_then_how_global_prompts_follow(aggregation, texts, backbones):
    (model, _), (visual, backbone) = texts, backbones()
    fields = {"length": 2, "heads": 2, "depth": 2, "text_aggregation": aggregation, "distillation": 0.7}
    method, module = built("plan", replace(backbone, domains=3), **fields)
    with torch.no_grad():
        module.text_prompts.mul_(20)
        module.visual_prompts.mul_(20)
    received = {name: getattr(module, name).detach() + draw(1, seed=3) for name in DOMAINS}

    def together(texts, tokens):
        mean = texts.mean(dim=0) if aggregation == "mean" else attended(texts, module.text_aggregator)
        return logits_of(model, visual, backbone, module, mean, attended(tokens, module.visual_aggregator))

    def own(shares):
        prompts = (torch.einsum("k,kdlw->dlw", torch.tensor(shares, dtype=torch.float64), p) for p in (
            module.text_prompts, module.visual_prompts))  # fmt: skip
        return logits_of(model, visual, backbone, module, *prompts)

    def entropy(logits):
        return -logits.log_softmax(dim=1)[range(3), torch.tensor([0, 1, 2])].mean()

    def divergence(logits, teacher):
        target = teacher.detach().softmax(dim=1)
        return (target * (target.log() - logits.log_softmax(dim=1))).sum(dim=1).mean()

    plain = normalize(visual(backbone.image.normalized(X)), dim=1)
    zero_shot = 20 * plain @ backbone.class_embeddings[ACTIVE].T
    before = together(received["text_prompts"], received["visual_prompts"])
    now = together(module.text_prompts, module.visual_prompts)
    first, third, mixed = own([0.0, 0, 1]), own([0.0, 1, 0]), own([1 / 3] * 3)
    parameters = list(module.parameters())
    for given, expected in (
        (batch(1, 2), entropy(first) + 0.7 * divergence(first, zero_shot)),
        (batch(3, 1, received), entropy(third) + 0.7 * divergence(third, before)),
        (batch(3, -1, received), entropy(mixed) + 0.7 * divergence(mixed, before)),
        (batch(2, 1, received), entropy(now)),
    ):
        loss = method.loss(module, given)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        ours, theirs = (torch.autograd.grad(each, parameters, **options) for each in (loss, expected))
        assert all(torch.allclose(one, two, rtol=1e-7, atol=1e-10) for one, two in zip(ours, theirs, strict=True))
    torch.testing.assert_close(module(X, ACTIVE)[:, ACTIVE], now, rtol=1e-9, atol=1e-9)
    names = [name for name, _ in module.named_parameters()]
    assert set(method.learned(names, 3)) == set(DOMAINS)
    assert set(method.learned(names, 4)) == set(names) - set(DOMAINS)


def test_plan_with_one_domain_in_round_1_is_the_prompts_of_both_towers(backbones):
    """Without a teacher, and with the tokens that MaPLe projects from the texts', it is MaPLe."""
    _, backbone = backbones()
    plain, maple = built("maple", backbone, init="", words="", length=2, depth=2)
    method, module = built("plan", backbone, length=2, depth=2, heads=2, distillation=0)
    with torch.no_grad():
        module.text_prompts.copy_(maple.tokens[None])
        module.visual_prompts.copy_(maple.visual_tokens()[None])
    given = batch(1, 0)
    torch.testing.assert_close(method.loss(module, given), plain.loss(maple, given), rtol=1e-12, atol=0)
    with pytest.raises(InputError, match=r"--method\.heads must divide 16, a tower's width; 5 does not"):
        built("plan", backbone, heads=5)


def test_domain_means_are_those_of_the_clients_of_a_domain():
    rule = parse("server", "domain_means")
    params = {"text_prompts": torch.zeros(3, 2), "visual_aggregator.norm.bias": torch.zeros(2)}
    params["visual_prompts"] = torch.zeros(3, 1)
    deltas, chunks = draw(3, 11, seed=5).float().numpy(), []
    for k, domain in enumerate((2, 1, 2)):
        bowl = Bowl(1.0, [], rows=k + 1, steps=1)
        reply = replace(replied(rule, params, params, client=bowl), message={"domain": torch.tensor(domain)})
        chunks.append(a_chunk(rule, k, bowl, deltas[k], reply))
    after, slots = rule.step(params, rule.init(params)[0], sum_chunks(chunks), RNG)
    own = [deltas[1], deltas[[0, 2]].mean(axis=0)]
    for name, columns in (("text_prompts", slice(0, 6)), ("visual_prompts", slice(8, 11))):
        expected = [delta[columns].reshape(3, -1)[k + 1] for k, delta in enumerate(own)]
        expected = [np.mean(expected, axis=0), *expected]  # no client is of the first domain
        np.testing.assert_allclose(after[name], expected, rtol=1e-5)
    np.testing.assert_allclose(after["visual_aggregator.norm.bias"], deltas[:, 6:8].mean(axis=0), rtol=1e-5)
    assert slots["trained"]["domains"].tolist() == [0, 1, 1]
    with pytest.raises(InputError, match="server domain_means needs the prompts of method plan, not adapt"):
        rule.adapt(parse("method", "adapt"))


def test_a_run_of_plan(small):
    method = {"name": "plan", "length": 2, "heads": 2, "depth": 1, "batch_size": 8, "weight_decay": 0.1}
    report, tensors = run_on_both_engines(small, interrupted=False, method=method, server="domain_means")
    for name in DOMAINS:  # the held-out domain is the first; no client trains its prompt
        torch.testing.assert_close(tensors[name][0], tensors[name][1:].mean(dim=0), rtol=1e-6, atol=0)
    shared = sum(tensor.numel() for tensor in tensors.values())
    assert report.tables().rounds.bytes_up.tolist() == [2 * (8 * shared + 8)] * 2

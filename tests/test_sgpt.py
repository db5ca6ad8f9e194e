"""Shared visual tokens and tokens of groups (SGPT), against formulas of a few lines."""

import numpy as np
import pytest
import torch
from test_insertions import backbones as backbones  # fixtures
from test_insertions import built, draw, pixels
from test_insertions import texts as texts
from test_rules import RNG, Bowl, a_chunk
from test_visual_tokens import pictures as pictures
from test_visual_tokens import run_on_both_engines
from test_visual_tokens import small as small
from torch.nn.functional import cosine_similarity, normalize

from fedsim import InputError
from fedsim.methods import Batch, ClientContext, RuleContext, masked
from fedsim.registry import parse
from fedsim.updates import sum_chunks

X, Y = pixels(), torch.tensor([0, 2, 3])
COUNTS = torch.ones(4, dtype=torch.int64)


def batch(round, classes=None, selections=None):
    rule = None if selections is None else RuleContext({}, {}, {"selections": selections})
    return Batch(X, Y, classes, ClientContext(torch.tensor(0), COUNTS, round), rule=rule)


def features_of(visual, backbone, module, groups=None):
    """(3, D), block by block: a token more in each, at the end; those of groups only if there are any."""
    x = visual._embeds(backbone.image.normalized(X))
    first = visual.ln_pre(module.common[0])
    added = [*module.common[1:]] + ([] if groups is None else [tokens[groups][:, None] for tokens in module.grouped])
    x = torch.cat([x, first.expand(3, 1, -1)], dim=1)
    for k, block in enumerate(visual.transformer.resblocks):
        if 0 < k <= len(added):
            x = torch.cat([x, added[k - 1].expand(3, 1, -1)], dim=1)
        x = block(x)
    return visual.ln_post(x[:, 0]) @ visual.proj


def cosines_of(visual, backbone, module):
    query = visual(backbone.image.normalized(X)).clamp(min=0)
    return torch.stack([cosine_similarity(query, key[None]) for key in module.keys], dim=1)


@pytest.mark.parametrize("classes", [None, torch.tensor([True, False, True, True])])
@pytest.mark.parametrize(("shared", "grouped", "shapes"), [(1, 1, (1, 1)), (1, 5, (1, 2)), (4, 3, (2, 1))])
def test_rounds_alternate_between_shared_tokens_and_those_of_groups(shared, grouped, shapes, classes, backbones):
    visual, backbone = backbones()
    fields = {"shared_blocks": shared, "group_blocks": grouped, "groups": 5, "pull": 0.7}
    method, module = built("sgpt", backbone, **fields)
    assert (len(module.common), len(module.grouped)) == shapes  # of a tower with three blocks
    cosines = cosines_of(visual, backbone, module)
    nearest = cosines.argmax(dim=1)
    selections = 1.0 + 5 * torch.bincount(nearest, minlength=5)
    filled = ((1 - cosines) * (selections / 20 + 5e-4)).argmin(dim=1)
    assert (filled != nearest).any()
    inactive = torch.zeros(4) if classes is None else torch.where(classes, 0, -torch.inf)

    def logits(groups):
        features = normalize(features_of(visual, backbone, module, groups), dim=1)
        return 20 * features @ backbone.class_embeddings.T + inactive

    def entropy(groups):
        return -logits(groups).log_softmax(dim=1)[range(3), Y].mean()

    masked(module)
    fit = cosines[range(3), filled].mean()
    for own, expected in (
        (batch(1, classes, selections), entropy(None)),
        (batch(2, classes, selections), entropy(filled) - 0.7 * fit),
        (batch(2, classes), entropy(nearest) - 0.7 * cosines.amax(dim=1).mean()),
    ):
        loss, parameters = method.loss(module, own), list(module.parameters())
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        ours, theirs = (
            torch.autograd.grad(each, parameters, materialize_grads=True, retain_graph=True)
            for each in (loss, expected)
        )
        assert all(torch.allclose(one, two, rtol=1e-8, atol=1e-12) for one, two in zip(ours, theirs, strict=True))
    counted = [torch.bincount(groups, minlength=5) for groups in (filled, nearest)]
    assert torch.equal(module.counts, sum(counted).double())  # not in the round of the shared tokens
    torch.testing.assert_close(module.eval()(X, classes), logits(nearest), rtol=1e-10, atol=1e-10)
    method.loss(module, batch(2, classes))
    assert module.counts.sum() == 6  # nor in evaluation mode
    assert method.learned(["common", "grouped", "keys"], 3) == ["common"]
    assert method.learned(["inner.common", "inner.grouped", "inner.keys"], 4) == ["inner.grouped", "inner.keys"]


def test_one_shared_token_is_fedvpt_and_equal_groups_are_one(backbones):
    _, backbone = backbones()
    plain, vpt = built("fedvpt", backbone, length=1, depth=1)
    method, module = built("sgpt", backbone, shared_blocks=1, groups=3)
    with torch.no_grad():
        vpt.tokens.copy_(module.common[None])
        module.grouped.copy_(module.grouped[:, :1].clone())
    torch.testing.assert_close(method.loss(module, batch(1)), plain.loss(vpt, batch(1)), rtol=1e-12, atol=0)
    alike = [module(X, None, torch.tensor(groups)[:, None]) for groups in ([0, 0, 0], [2, 1, 0])]
    torch.testing.assert_close(*alike, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(X), alike[0], rtol=1e-12, atol=1e-12)


def a_round_of_group_keys(counts, rows, **fields):
    """What a rule makes of parameters of 0; the sum of selections that it sends, and the clients' deltas."""
    rule = parse("server", {"name": "group_keys", **fields})
    params = {"common": torch.zeros(1, 2), "grouped": torch.zeros(1, 2, 2), "keys": torch.zeros(2, 3)}
    params["counts"] = torch.zeros(2)
    deltas = draw(len(rows), 14, seed=5).float().numpy()
    deltas[:, 2:4] = counts  # in the order of names
    chunks = [a_chunk(rule, k, Bowl(1.0, [], rows=own, steps=1), deltas[k]) for k, own in enumerate(rows)]
    after, slots = rule.step(params, rule.init(params)[0], sum_chunks(chunks), RNG)
    after, slots = rule.step(after, slots, sum_chunks(chunks), RNG)
    return after, rule.broadcast(slots, after)["selections"], deltas


def test_group_keys_weighs_clients_by_their_selections_and_keeps_a_share_of_the_old():
    after, selections, deltas = a_round_of_group_keys([(90, 10), (30, 40)], (50, 150), token_momentum=0.9)
    weights = np.array([0.25, 0.75])
    # The second group was selected 50 times, which is too few. Two rounds, each from where the first ended.
    keys = 0.5 * np.stack([[0.75, 0.25] @ deltas[:, 8:11], [0.5, 0.5] @ deltas[:, 11:14]])
    np.testing.assert_allclose(after["keys"], 2 * keys, rtol=1e-5)
    np.testing.assert_allclose(after["common"][0], 2 * weights @ deltas[:, :2], rtol=1e-5)
    np.testing.assert_allclose(after["grouped"].flatten(), 0.2 * weights @ deltas[:, 4:8], rtol=1e-5)
    assert selections.tolist() == [240, 100] and not after["counts"].any()


def test_group_keys_without_momentum_and_with_equal_selections_is_fedavg():
    fields = {"key_momentum": 0, "token_momentum": 0, "weighting": "uniform"}
    after, _, deltas = a_round_of_group_keys([(60, 0), (60, 0), (60, 0)], (1, 2, 3), **fields)
    trained = np.concatenate([after[name].flatten() for name in ("common", "grouped", "keys")])
    expected = 2 * np.delete(deltas, (2, 3), axis=1).mean(axis=0)
    np.testing.assert_allclose(trained, expected, rtol=1e-5)
    with pytest.raises(InputError, match="server group_keys needs the groups of method sgpt, not fedvpt"):
        parse("server", "group_keys").adapt(parse("method", "fedvpt"))


def test_a_run_of_sgpt(small):
    method = {"name": "sgpt", "batch_size": 8, "local_epochs": 1, "groups": 3}
    report, tensors = run_on_both_engines(small, method=method, server="group_keys", interrupted=False)
    assert not tensors["counts"].any()
    shared = sum(tensor.numel() for tensor in tensors.values())
    assert report.tables().rounds.bytes_up.tolist() == [2 * 8 * shared] * 2
    assert report.tables().rounds.bytes_down.tolist() == [2 * (8 * shared + 3 * 4)] * 2

"""Prompts that learn from groups of a sensitive attribute (FF-DVP), against formulas of a few lines."""

from dataclasses import replace

import pytest
import torch
from open_clip import get_tokenizer
from test_insertions import CLASSES, built, pixels, written_out
from test_insertions import backbones as backbones  # fixtures
from test_insertions import texts as texts
from test_visual_tokens import pictures as pictures
from test_visual_tokens import small as small
from torch import nn
from torch.nn.functional import linear, normalize

from fedsim import InputError, run
from fedsim.methods import Batch
from fedsim.methods._contrast import contrastive
from fedsim.methods.ffdvp import gap

X, Y, GROUP = pixels(8), torch.tensor([0, 2, 0, 3, 2, 0, 3, 3]), torch.tensor([0, 1, 1, 1, 1, 0, 0, 2])
ACTIVE = torch.tensor([True, False, True, True])
GROUPS, PAIRS = ("old", "middle-aged", "young"), GROUP * 4 + Y


def made(backbones, **fields):
    visual, backbone = backbones()
    method, module = built("ffdvp", replace(backbone, groups=GROUPS), length=2, prompt_width=6, **fields)
    return visual, backbone, method, module.eval()


def spread(shares, rows):
    """The largest difference between two groups, of the mean shares of a class in their rows."""
    means = [shares[[k for k in rows if GROUP[k] == group]].mean(dim=0) for group in GROUP[rows].unique()]
    return max((one - other).abs().max() for one in means for other in means)


@pytest.mark.parametrize("notion", ["equalized_odds", "demographic_parity"])
def test_the_loss_is_its_terms_written_out(notion, texts, backbones):
    fields = {"balance": 0.7, "head_weight": 0.3, "fairness": 2.0, "notion": notion}
    visual, backbone, method, module = made(backbones, **fields)
    state = {name: tensor.requires_grad_() for name, tensor in module.state_dict(keep_vars=True).items()}
    tokens = state["tokens"] @ state["project.weight"].T + state["project.bias"]
    assert tokens.shape == (2, 2, 16)  # at the input, and in front of the second of three blocks
    images = normalize(written_out(visual, backbone.image.normalized(X), tokens), dim=1)

    tokenizer = get_tokenizer("ViT-B-32", context_length=32)
    pairs = [f"A photo of a {group}, who is {name}." for group in GROUPS for name in CLASSES]
    groups = [f"A photo of a {group}." for group in GROUPS]
    pairs, groups = (texts[0].encode_text(tokenizer(each), normalize=True).detach() for each in (pairs, groups))

    own = (20 * images @ pairs[PAIRS].T).log_softmax
    expected = -(own(dim=1).diagonal().mean() + own(dim=0).diagonal().mean()) / 2
    expected = expected + 0.7 * (1 / 3 * (1 / 3 / (20 * images @ groups.T).softmax(dim=1)).log()).sum(dim=1).mean()

    def layer(x, name):
        return linear(x, state[f"head.{name}.weight"], state[f"head.{name}.bias"])

    among = torch.arange(12).view(3, 4)[:, ACTIVE].flatten()
    nearest = pairs[among[(images @ pairs[among].T).argmax(dim=1)]]
    hidden = layer(torch.cat([layer(images, "image"), layer(nearest, "text")], dim=1), "hidden").relu()
    shares = layer(hidden, "out")[:, ACTIVE].softmax(dim=1)
    conditions = (
        [range(8)] if notion == "demographic_parity" else [[k for k in range(8) if Y[k] == y] for y in (0, 2, 3)]
    )
    between = sum(spread(shares, list(rows)) for rows in conditions)
    right = shares[range(8), (ACTIVE.cumsum(0) - 1)[Y]]
    expected = expected + 0.3 * (2 * between - right.log().mean())

    loss = method.loss(module, Batch(X, Y, ACTIVE, group=GROUP))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    ours, theirs = (torch.autograd.grad(each, list(state.values())) for each in (loss, expected))
    assert all(torch.allclose(one, two, rtol=1e-7, atol=1e-10) for one, two in zip(ours, theirs, strict=True))
    logits = (20 * images @ pairs.T).view(8, 3, 4).amax(dim=1)
    torch.testing.assert_close(module(X), logits, rtol=1e-9, atol=1e-9)
    torch.manual_seed(0)
    assert not torch.allclose(module.train()(X), logits)  # tokens drop out, but in training only


def test_without_fairness_it_is_deep_visual_prompts(backbones):
    _, backbone, method, module = made(backbones, balance=0, head_weight=0)
    _, plain = built("fedvpt", replace(backbone, class_embeddings=module.pairs.flatten(0, 1)), length=2, depth=2)
    plain.tokens = nn.Parameter(module.project(module.tokens))
    loss = method.loss(module, Batch(X, Y, group=GROUP))
    torch.testing.assert_close(loss, contrastive(plain(X), PAIRS), rtol=1e-12, atol=0)


def test_the_gap_of_two_groups_and_classes_is_that_of_one_class():
    # Of class 1: 0.9 and 0.5 against 0.3 in the rows of class 1; 0.2 against 0.6 in those of class 0.
    ones = torch.tensor([0.9, 0.5, 0.3, 0.2, 0.6])
    shares, y, group = (
        torch.stack([1 - ones, ones], dim=1),
        torch.tensor([1, 1, 1, 0, 0]),
        torch.tensor([0, 0, 1, 0, 1]),
    )
    torch.testing.assert_close(gap(shares, y, group, 2), torch.tensor((0.7 - 0.3) + (0.6 - 0.2)))
    parity = gap(shares, y, group, 2, "demographic_parity")
    torch.testing.assert_close(parity, torch.tensor(1.6 / 3 - 0.9 / 2))
    assert gap(shares, y, torch.zeros_like(y), 2) == 0  # one group alone


def test_a_head_stays_on_its_client_and_prompts_travel(small):
    method = {"name": "ffdvp", "length": 2, "prompt_width": 4, "batch_size": 4, "local_epochs": 1}
    fields = {"partition": "iid", "clients": 2, "dataset": {"name": "folder", "domain_groups": True}, "rounds": 1}
    report = run(small("run", method=method, server="q_fedavg", **fields))  # which needs losses before training
    shared = 2 * 2 * 4 + 4 * 32 + 32  # the tower has two blocks
    head = 2 * (8 * 32 + 32) + 64 * 32 + 32 + 32 * 2 + 2
    assert report.tables().rounds.bytes_up.tolist() == [2 * 8 * (shared + 1)]
    assert report.facts["trained_parameters"] == shared + head
    assert report.facts["groups"] == ["ink", "oil", "photo"] and not report.facts["personal"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"dataset": "folder"},
            r"two or more groups \(a sensitive attribute\), and the data set has none; give --dataset",
        ),
        ({"group_names": "a,b"}, "--method.group-names needs 3 names, for the groups ink, oil, photo; got a, b"),
        ({"text": "A {class}."}, "a text needs {group} once, not 'A {class}.'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields, words, small):
    dataset = fields.pop("dataset", {"name": "folder", "domain_groups": True})
    with pytest.raises(InputError, match=words):
        run(small("refused", method={"name": "ffdvp"} | fields, dataset=dataset))

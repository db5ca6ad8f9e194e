"""Methods that learn tokens inside the image tower, against formulas of a few lines."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import run_until
from PIL import Image
from safetensors.torch import load_file
from test_insertions import CLASSES, built, draw, one_by_one, pixels, written_out
from test_insertions import backbones as backbones  # fixtures
from test_insertions import texts as texts
from test_rules import RNG, Bowl, a_chunk, replied
from torch.nn.functional import layer_norm, normalize

from fedsim import Config, InputError, run
from fedsim.clip.insertions import Insertions
from fedsim.methods import Batch, ClientContext, RuleContext
from fedsim.registry import parse
from fedsim.updates import sum_chunks

X, Y = pixels(), torch.tensor([0, 2, 3])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise of two classes in three domains, five pictures each."""
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for domain, label, k in product(("ink", "oil", "photo"), ("cat", "dog"), range(5)):
        (folder / domain / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / domain / label / f"{k}.png")
    return folder


@pytest.fixture
def small(pictures, tmp_path, small_clip):
    """Makes a Config of a quick run of a small vision transformer on the pictures, in this process."""
    made = small_clip("visual", "vit")
    quick = {"backbone": made["model"], "pretrained": made["pretrained"], "dataset": "folder", "data_dir": pictures}
    quick |= {"held_out": ("ink",), "actors": 0, "page": False, "dtype": "float64", "cache_dir": tmp_path / "cache"}
    return lambda name, **fields: Config(**(quick | {"rounds": 2, "chunk": 1} | fields), out=tmp_path / name)


def client(domain, counts=(1, 1, 1, 1)):
    return ClientContext(torch.tensor(domain), torch.tensor(counts), 1)


def same_when_resumed_and_on_both_engines(small, **fields):
    """The report and the tensors of a run, which has the same bits after an interruption."""
    ended = {}
    for name, engine in {"whole": "stacked", "again": "stacked", "reference": "reference"}.items():
        config = small(name, engine=engine, **fields)
        if name == "again":
            run_until(1, config)
        report = run(config)
        ended[name] = load_file(config.out / "adapter.safetensors")
    assert all(torch.equal(tensor, ended["again"][name]) for name, tensor in ended["whole"].items())
    torch.testing.assert_close(ended["whole"], ended["reference"], rtol=1e-6, atol=1e-9)
    return report, ended["whole"]


# ADAPT ----------------------------------------------------------------------------------------------------------


def domains_of(backbones, **fields):
    visual, backbone = backbones()
    return visual, replace(backbone, domains=3), *built("adapt", replace(backbone, domains=3), **fields)


def adapts_cosines(model, tower, visual, backbone, module, tokens, temperature):
    """(B, C) of image features with mixed texts, block by block and head by head."""
    block, seen = visual.transformer.resblocks[-1], []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = module.read(X)[0]
    handle.remove()
    expected = written_out(visual, backbone.image.normalized(X), module.visual[None])
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-11)
    x, scores = layer_norm(seen[0], (16,), block.ln_1.weight, block.ln_1.bias), 0
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    for head in range(2):
        rows = torch.arange(8 * head, 8 * head + 8)
        query = x[:, :1] @ weight[rows].T + bias[rows]
        keys = x[:, -3:] @ weight[16 + rows].T + bias[16 + rows]
        scores = scores + (query @ keys.mT)[:, 0] / 8**0.5 / 2
    weights = (scores / temperature).softmax(dim=1)
    rows = tower.tokenize([f"{name}." for name in CLASSES])
    call = tower.embed(rows)[0, :1], tower.embed(rows)[:, 1:], tower.ends(rows) - 1
    each = torch.stack([normalize(one_by_one(model, *call, prompt[None]), dim=1) for prompt in tokens])
    mixed = sum(weights[:, k, None, None] * each[k] for k in range(3))
    assert weights.std(dim=1).min() > 1e-3
    return (normalize(images, dim=1)[:, None] * normalize(mixed, dim=2)).sum(dim=2)


@pytest.mark.parametrize("objective", ["cosine", "cross_entropy"])
def test_adapts_loss_is_of_the_texts_that_attention_mixes(objective, texts, backbones):
    visual, backbone, method, module = domains_of(backbones, objective=objective, temperature=0.2, length=2)
    others = module.tokens.detach() + draw(3, 2, backbone.text.width, seed=3)
    tokens = others.clone()
    tokens[1] = module.tokens[1]
    cosines = adapts_cosines(*texts, visual, backbone, module, tokens.requires_grad_(), 0.2)
    right = (cosines if objective == "cosine" else (20 * cosines).log_softmax(dim=1))[range(3), Y]
    expected = (1 - right if objective == "cosine" else -right).mean()
    rule = RuleContext({}, {}, {"others": others})
    loss = method.loss(module, Batch(X, Y, client=client(1), rule=rule))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    ours = torch.autograd.grad(loss, [module.tokens, module.visual])
    prompts, visual_tokens = torch.autograd.grad(expected, [tokens, module.visual])
    torch.testing.assert_close(ours[0][1], prompts[1], rtol=1e-7, atol=1e-11)
    torch.testing.assert_close(ours[1], visual_tokens, rtol=1e-7, atol=1e-11)
    assert ours[0][[0, 2]].abs().max() == 0 and ours[1].abs().amax(dim=1).min() > 1e-7
    # Without what the rule sends, the prompts of other domains are those that were received.
    alone = method.loss(module, Batch(X, Y, client=client(1)))
    assert abs(alone - loss) > 1e-6
    (mixed,) = torch.autograd.grad(method.loss(module, Batch(X, Y, client=client(-1))), [module.tokens])
    assert mixed.abs().amax(dim=(1, 2)).min() > 1e-9  # a client of several domains trains all


def test_adapt_with_one_domain_is_promptfl_behind_a_visual_token(backbones):
    _, backbone = backbones()
    _, module = built("adapt", backbone, init="a drawing of")
    _, promptfl = built("promptfl", backbone, init="a drawing of")
    images = backbone.image.encode(X, insertions=Insertions(module.visual[None]))
    torch.testing.assert_close(module(X), promptfl(images))
    active = torch.tensor([True, False, True, True])
    assert module(X, active).isneginf().any(dim=0).tolist() == [False, True, False, False]


def test_each_domain_has_the_mean_of_its_clients_and_copies_that_change_slowly():
    rule = parse("server", {"name": "domain_prompts", "copies": 0.9, "weighting": "rows"})
    params = {"tokens": torch.zeros(3, 1, 1), "visual": torch.zeros(1)}
    slots, _ = rule.init(params)
    chunks = []
    for k, (domain, went, rows) in enumerate([(0, 4.0, 1), (0, 8.0, 3), (2, 10.0, 4)]):
        delta = np.array([went, went, went, went])  # the prompts of other domains too, as weight decay would
        update = replied(rule, params, params, client=Bowl(1.0, [], rows=rows))
        reply = replace(update, message={"domain": torch.tensor(domain)})
        chunks.append(a_chunk(rule, k, Bowl(1.0, [], rows=rows), delta, reply))
    after, slots = rule.step(params, slots, sum_chunks(chunks), RNG)
    assert after["visual"] == (4 + 3 * 8 + 4 * 10) / 8
    assert after["tokens"].flatten().tolist() == [(4 + 3 * 8) / 4, 8.5, 10]  # none of domain 1: the mean of the others
    sent = rule.broadcast(slots, after)["others"]
    torch.testing.assert_close(sent.flatten(), torch.tensor([0.7, 0.85, 1.0]))
    after, slots = rule.step(after, slots, sum_chunks(chunks[2:]), RNG)
    assert after["tokens"].flatten().tolist() == [7, 13.5, 20]  # domain 0 has no client in this round
    torch.testing.assert_close(
        rule.broadcast(slots, after)["others"].flatten(), 0.9 * sent.flatten() + 0.1 * after["tokens"].flatten()
    )


def test_domain_prompts_need_adapt():
    with pytest.raises(InputError, match="server domain_prompts needs the prompts of method adapt, not promptfl"):
        parse("server", "domain_prompts").adapt(parse("method", "promptfl"))


def test_a_run_of_adapt(small):
    method = {"name": "adapt", "length": 2, "batch_size": 8, "weight_decay": 0.1}
    report, tensors = same_when_resumed_and_on_both_engines(small, method=method, server="domain_prompts")
    prompts, visual = tensors["tokens"], tensors["visual"]
    assert prompts.shape == (3, 2, 32) and visual.shape == (3, 32)
    # The held-out domain is the first; no client trains its prompt.
    torch.testing.assert_close(prompts[0], prompts[1:].mean(dim=0), rtol=1e-6, atol=0)
    rounds, shared = report.tables().rounds, prompts.numel() + visual.numel()
    assert rounds.bytes_up.tolist() == [2 * (8 * shared + 8)] * 2  # of each client; and the index of its domain
    assert rounds.bytes_down.tolist() == [2 * 8 * (shared + prompts.numel())] * 2

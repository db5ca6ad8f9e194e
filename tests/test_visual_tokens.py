"""Methods that learn tokens inside the image tower, against formulas of a few lines."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_until
from PIL import Image
from safetensors.torch import load_file
from test_insertions import CLASSES, built, draw, one_by_one, pixels, written_out
from test_insertions import backbones as backbones  # fixtures
from test_insertions import texts as texts
from test_insertions import wide as wide
from test_rules import RNG, Bowl, a_chunk, replied
from torch.nn.functional import gelu, layer_norm, normalize

from fedsim import Config, InputError, run
from fedsim.clip.insertions import Insertions
from fedsim.config import read_yaml
from fedsim.methods import Batch, ClientContext, RuleContext
from fedsim.registry import parse
from fedsim.reporting.facts import to_yaml
from fedsim.reporting.metrics import parts_by_rows
from fedsim.servers.label_clusters import complementary_clusters, divergences, similar_clusters
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task
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


def run_on_both_engines(small, interrupted=True, **fields):
    """The report and the tensors of a run, interrupted or not; one client at a time, they are the same."""
    ended = {}
    for engine in "reference", "stacked":
        config = small(engine, engine=engine, **fields)
        if interrupted and engine == "stacked":
            run_until(1, config)
        report = run(config)
        ended[engine] = load_file(config.out / "adapter.safetensors")
    torch.testing.assert_close(ended["stacked"], ended["reference"], rtol=1e-6, atol=1e-9)
    return report, ended["stacked"]


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
    report, tensors = run_on_both_engines(small, method=method, server="domain_prompts")
    prompts, visual = tensors["tokens"], tensors["visual"]
    assert prompts.shape == (3, 2, 32) and visual.shape == (3, 32)
    # The held-out domain is the first; no client trains its prompt.
    torch.testing.assert_close(prompts[0], prompts[1:].mean(dim=0), rtol=1e-6, atol=0)
    rounds, shared = report.tables().rounds, prompts.numel() + visual.numel()
    assert rounds.bytes_up.tolist() == [2 * (8 * shared + 8)] * 2  # of each client; and the index of its domain
    assert rounds.bytes_down.tolist() == [2 * 8 * (shared + prompts.numel())] * 2


# CAPT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, (60, 5, 30, 4)])
@pytest.mark.parametrize("classes", [None, torch.tensor([True, False, True, True])])
def test_capts_loss_adds_log_shares_and_two_terms_of_cosines(rows, classes, texts, backbones):
    (model, tower), (visual, backbone) = texts, backbones()
    fields = {"general_weight": 0.7, "class_weight": 0.4, "temperature": 0.3, "length": 3, "general": 2}
    method, module = built("capt", backbone, **fields)
    active = torch.arange(4) if classes is None else classes.nonzero().flatten()
    weight, bias = module.projection.weight, module.projection.bias
    tokens = (module.general @ weight.T + bias)[None]
    images = normalize(written_out(visual, backbone.image.normalized(X), tokens), dim=1)
    tokenized = tower.tokenize([f"{name}." for name in CLASSES])
    embedded, ends = tower.embed(tokenized), tower.ends(tokenized) - 1
    each = [
        one_by_one(
            model,
            embedded[k, :1],
            embedded[k : k + 1, 1:],
            ends[k : k + 1],
            torch.cat([module.general, module.class_aware[k]])[None],
        )
        for k in active
    ]
    counts = torch.tensor(rows or (0, 0, 0, 0)).double()[active] + 1
    # Of the active classes alone: a constant in all shares changes no softmax.
    y, shares = torch.tensor([active.tolist().index(k) for k in Y]), (counts / counts.sum()).log()

    def unit(tokens):
        return normalize(tokens if tower.width == 256 else tokens @ model.text_projection, dim=-1)

    logits = 20 * images @ normalize(torch.cat(each), dim=1).T + shares
    general = images @ unit(module.general).T / 0.3
    by_class = images @ unit(module.class_aware[active]).mean(dim=1).T / 0.3 + shares
    picked = [table.softmax(dim=1)[range(3), y].log().mean() for table in (logits, by_class)]
    expected = -picked[0] + 0.7 * -(general.exp() / general.exp().sum()).log().mean() - 0.4 * picked[1]
    rule = RuleContext({}, {}, {} if rows is None else {"class_rows": torch.tensor(rows).double()})
    loss = method.loss(module, Batch(X, Y, classes, client(0), rule=rule))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    parameters = list(module.parameters())
    pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-6, atol=1e-11) for one, other in pairs)


def test_capt_has_the_numbers_of_its_program_and_leaves_tokens_to_the_classes(wide):
    params = initial_params(Task(parse("method", "capt"), parse("server", "label_clusters"), seed=0), wide)
    sizes = {name: tensor.numel() for name, tensor in params.items()}
    assert sizes.pop("class_aware") == len(CLASSES) * 3 * 512  # of 100 classes, 548,096 in all
    assert sum(sizes.values()) == 512 + 393_984
    with pytest.raises(InputError, match=r"--method.length 4 leaves no tokens for each class after --method.general 4"):
        parse("method", {"name": "capt", "general": 4}).build(wide)


def test_clusters_are_of_equal_and_of_complementary_shares():
    shares = np.array([[0.9, 0.1, 0], [0, 0.1, 0.9], [0.8, 0.2, 0], [0, 0.2, 0.8]])
    similar, complementary = similar_clusters(shares, 2), complementary_clusters(shares, 2)
    assert similar[0] == similar[2] != similar[1] == similar[3]
    assert complementary[0] == complementary[1] != complementary[2] == complementary[3]
    assert len(set(similar_clusters(shares, 9))) == len(set(complementary_clusters(shares, 9))) == 4
    assert len(set(similar_clusters(shares[[0, 0, 1]], 3))) == 2
    apart = divergences(np.array([[1.0, 0], [0, 1], [0.5, 0.5]]))
    expected = [[0, np.log(2), 0.75 * np.log(4 / 3)], [np.log(2), 0, 0.75 * np.log(4 / 3)]]
    np.testing.assert_allclose(apart[:2, :2], np.array(expected)[:, :2], atol=1e-12)
    half = (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25) + np.log(1 / 0.75)) / 2
    np.testing.assert_allclose(apart[2, :2], half)


def a_round_of_label_clusters(counts, steps=None, **fields):
    """The step of a rule from parameters of 0, and the clients' deltas: class-aware, general and projection."""
    rule = parse("server", {"name": "label_clusters", **fields})
    params = {"class_aware": torch.zeros(3, 1, 2), "general": torch.zeros(1, 2), "projection": torch.zeros(2)}
    deltas = draw(len(counts), 10, seed=5).float().numpy()
    chunks = []
    for k, own in enumerate(counts):
        bowl = Bowl(1.0, [], rows=int(sum(own)), steps=1)
        reply = replace(replied(rule, params, params, client=bowl), message={"counts": torch.tensor(own)})
        chunks.append(a_chunk(rule, k, bowl, deltas[k], reply))
    after, slots = rule.step(params, rule.init(params)[0], sum_chunks(chunks), RNG)
    return after, rule.broadcast(slots, after)["class_rows"], deltas


def test_label_clusters_average_within_clusters_and_then_over_the_clients_of_a_class():
    counts = [(18, 2, 0), (0, 1, 9), (8, 2, 0), (0, 2, 8)]
    after, rows, deltas = a_round_of_label_clusters(counts, similar=2, complementary=2)
    assert rows.tolist() == [26, 7, 17]
    same, mixed = [(0, 2), (1, 3), (0, 2), (1, 3)], [(0, 1), (0, 1), (2, 3), (2, 3)]
    aware = [deltas[list(own), :6].mean(axis=0).reshape(3, 2) for own in same]
    general = [deltas[list(own), 6:8].mean(axis=0) for own in mixed]
    weights = np.array([20, 10, 10, 10]) / 50
    chosen = [(0, 2), (2, 3), (1, 3)]  # more than a tenth of whose rows are of the class
    for label in range(3):
        expected = np.mean([aware[k][label] for k in chosen[label]], axis=0)
        np.testing.assert_allclose(after["class_aware"][label, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(after["general"][0], weights @ general, rtol=1e-5)
    np.testing.assert_allclose(after["projection"], weights @ deltas[:, 8:], rtol=1e-5)


def test_label_clusters_leave_a_class_alone_that_is_rare_everywhere_and_can_be_fedavg():
    after, _, deltas = a_round_of_label_clusters([(20, 1, 9), (9, 1, 20)], similar=1, complementary=1)
    assert not after["class_aware"][1].any() and after["class_aware"][[0, 2]].abs().min() > 0
    single = {"similar": 1, "complementary": 1, "weighting": "uniform", "threshold": 0.0}
    after, _, deltas = a_round_of_label_clusters([(20, 1, 9), (9, 1, 20), (1, 1, 1)], **single)
    np.testing.assert_allclose(np.concatenate([t.flatten() for t in after.values()]), deltas.mean(axis=0), rtol=1e-5)


def test_a_run_of_capt(small):
    method = {"name": "capt", "length": 2, "batch_size": 4}
    fields = {"partition": "long_tail", "partition_seed": 1, "clients": 3}
    report, tensors = run_on_both_engines(small, method=method, server="label_clusters", **fields)
    rounds, shared = report.tables().rounds, sum(tensor.numel() for tensor in tensors.values())
    assert rounds.bytes_up.tolist() == [3 * 8 * (shared + 2)] * 2  # counts of two classes
    assert rounds.bytes_down.tolist() == [3 * (8 * shared + 2 * 4)] * 2
    with pytest.raises(InputError, match="server label_clusters needs the prompts of method capt, not adapt"):
        parse("server", "label_clusters").adapt(parse("method", "adapt"))


def test_classes_are_frequent_or_rare_by_the_train_rows_of_all_clients():
    rows = {"cat": 15, "dog": 75, "owl": 5, "pig": 5}
    assert parts_by_rows(pd.Series(rows)) == {"dog": "head", "cat": "medium", "owl": "medium", "pig": "tail"}
    assert parts_by_rows(pd.Series(rows | {"dog": 76})) == dict.fromkeys(("dog", "cat"), "medium") | dict.fromkeys(
        ("owl", "pig"), "tail"
    )


# FedMVP ---------------------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "cat": ["soft fur", "a long tail"],
    "hot air balloon": [],
    "owl": ["a beak", "round eyes", "wings"],
    "pig": ["a snout"],
}
PAIRS = [(name, f", {each}" if each else "") for name, own in ATTRIBUTES.items() for each in own or [""]]


def fedmvps_tokens(visual, backbone, module, texts):
    """(B, 4, W) of a module with two heads, in plain arithmetic."""
    w = dict(module.named_parameters())

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = backbone.image.normalized(X).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    patches = x @ visual.conv1.weight.flatten(1).T + visual.positional_embedding[1:]
    context = linear(texts, "project")
    weights, biases = w["attention.in_proj_weight"].chunk(3), w["attention.in_proj_bias"].chunk(3)
    inputs = norm(patches, "norm_patches"), norm(context, "norm_texts"), context
    query, key, value = (x @ own.T + bias for x, own, bias in zip(inputs, weights, biases, strict=True))
    heads = [slice(0, 8), slice(8, 16)]
    mixed = [(query[..., own] @ key[:, own].T / 8**0.5).softmax(dim=-1) @ value[:, own] for own in heads]
    attended = linear(torch.cat(mixed, dim=-1), "attention.out_proj")
    value, gate = linear(norm(attended, "norm"), "widen").chunk(2, dim=-1)
    out = attended + linear(value * gelu(gate), "narrow")
    # 9 patches in 4 parts, as adaptive pooling cuts them: from floor(9 k / 4) to ceil(9 (k + 1) / 4).
    return torch.stack([out[:, first:last].mean(dim=1) for first, last in ((0, 3), (2, 5), (4, 7), (6, 9))], dim=1)


@pytest.mark.parametrize("classes", [None, torch.tensor([True, False, True, True])])
def test_fedmvp_generates_tokens_from_patches_and_attributes_of_active_classes(classes, texts, backbones):
    (_, tower), (visual, backbone) = texts, backbones()
    method, module = built("fedmvp", backbone, attributes=ATTRIBUTES, heads=2, consistency=1.5)
    pairs = [pair for pair in PAIRS if classes is None or pair[1]]
    tokens = tower.tokenize([f"a photo of a {name}{attribute}." for name, attribute in pairs])
    encoded = normalize(tower.encode_after(tokens[0, :0], tokens, tower.ends(tokens)), dim=1)
    visual_tokens = fedmvps_tokens(visual, backbone, module, encoded)
    images = normalize(written_out(visual, backbone.image.normalized(X), visual_tokens[None]), dim=1)
    logits = torch.full((3, 4), -torch.inf, dtype=torch.float64)
    for label, name in enumerate(CLASSES):
        if own := [k for k, (other, _) in enumerate(pairs) if other == name]:
            logits[:, label] = 20 * (images @ encoded[own].T).mean(dim=1)
    torch.testing.assert_close(module(X, classes), logits, rtol=1e-9, atol=1e-10)
    losses = []
    for x in X, X.flip(-1):
        plain = normalize(visual(backbone.image.normalized(x)), dim=1)
        right = logits.log_softmax(dim=1)[range(3), Y]
        losses.append((-right + 1.5 * (1 - (images * plain).sum(dim=1))).mean())
    found = set()
    for seed in range(6):
        torch.manual_seed(seed)
        loss = method.loss(module, Batch(X, Y, classes))
        found.add(min(range(2), key=lambda k: abs(losses[k] - loss)))
        assert min(abs(other - loss) for other in losses) < 1e-9
    assert found == {0, 1}
    parameters = list(module.parameters())
    torch.manual_seed(0)
    ours = torch.autograd.grad(method.loss(module, Batch(X, Y, classes)), parameters)
    torch.manual_seed(0)
    theirs = torch.autograd.grad(losses[torch.rand(()) < 0.5], parameters)
    assert all(torch.allclose(one, other, rtol=1e-6, atol=1e-10) for one, other in zip(ours, theirs, strict=True))


def test_fedmvp_without_attributes_has_the_class_texts_themselves(backbones):
    _, backbone = backbones()
    _, module = built("fedmvp", backbone)
    tokens = backbone.text.tokenize([f"a photo of a {name}." for name in CLASSES])
    encoded = normalize(backbone.text.encode(tokens, backbone.text.ends(tokens)), dim=1)
    torch.testing.assert_close(module.described()[0], encoded)
    images = module.images(X, encoded)
    torch.testing.assert_close(module(X), 20 * normalize(images, dim=1) @ encoded.T, rtol=1e-10, atol=1e-10)


def test_fedmvp_has_as_many_parameters_as_published(wide):
    task = Task(parse("method", "fedmvp"), parse("server", "fedavg"), seed=0)
    assert sum(tensor.numel() for tensor in initial_params(task, wide).values()) == 9_845_760


def test_attributes_come_from_a_file_and_are_part_of_the_experiment(tmp_path, backbones):
    file = tmp_path / "attributes.json"
    file.write_text(json.dumps(ATTRIBUTES))
    method = parse("method", {"name": "fedmvp", "attributes": str(file)})
    assert method == parse("method", {"name": "fedmvp", "attributes": ATTRIBUTES}) != parse("method", "fedmvp")
    config = Config(method=method)
    (tmp_path / "config.yaml").write_text(to_yaml(config.plain()))
    file.write_text("{}")  # no run reads it again
    assert Config(**read_yaml(tmp_path / "config.yaml")).method == method
    with pytest.raises(InputError, match=r"method\.attributes has no owl, pig"):
        built("fedmvp", backbones()[1], attributes={"cat": [], "hot air balloon": []})
    file.write_text('{"cat": "soft fur"}')
    for wrong in str(file), str(tmp_path / "none.json"), "", None, 3, ["cat"]:
        with pytest.raises(InputError) as refusal:
            parse("method", {"name": "fedmvp", "attributes": wrong})
        assert "\n" not in str(refusal.value)


def test_a_run_of_fedmvp(small):
    method = {"name": "fedmvp", "batch_size": 4, "attributes": {"cat": ["soft fur"], "dog": ["a snout", "paws"]}}
    report, tensors = run_on_both_engines(small, interrupted=False, method=method, rounds=1)
    shared = sum(tensor.numel() for tensor in tensors.values())
    assert report.tables().rounds.bytes_up.tolist() == [2 * 8 * shared]
    # Apart from its rows, a step projects 3 texts of 8 numbers to 32, and means them by class; they are encoded once.
    assert report.facts["flops_per_step"] == 3 * 8 * 32 * 2 * 2 + 2 * 3 * 8 * 2

"""Gradients that are estimated from values of the loss, against autograd's, and what trains by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import Backbone, InputError, available, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.clip.checkpoints import find_weights
from fedsim.clip.model import Clip
from fedsim.datasets import Features
from fedsim.encoding import from_features
from fedsim.methods import Batch, ClientContext, trained
from fedsim.methods._calls import with_tensors
from fedsim.methods.probe import Probe
from fedsim.registry import parse
from fedsim.rng import torch_rng
from fedsim.training.estimates import by_differences
from fedsim.training.flops import flops_of
from fedsim.training.optimizer import Optimizer
from fedsim.training.rows import RuleInputs, TrainRows
from fedsim.training.stack import by_autograd, gradients
from fedsim.training.task import Task
from fedsim.training.train import train_client

Y = torch.tensor([0, 1, 2, 3, 0, 1])
ESTIMATED = {"estimator": "spsa", "perturbation": 1e-4}


def rngs(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def backbone():
    return Backbone(nn.functional.normalize(draw(4, 8), dim=1), 5.0)


CLIPS = []  # one for all tests


@pytest.fixture
def towers(backbone, small_clip):
    """The backbone of a method in float64, with those towers that it reads, and six inputs."""
    if not CLIPS:
        CLIPS.append(Clip(find_weights(**small_clip("estimates", "vit"))))
        CLIPS[0].model.double()

    def make(method):
        (clip,) = CLIPS
        x = {"features": draw(6, 8), "tokens": draw(6, 16, 8), "all_tokens": draw(6, 17, 8)}
        x["pixels"] = (draw(6, 3, 32, 32).sigmoid() * 255).to(torch.uint8)
        text = clip.text_tower(method.reads.text == "blocks") if method.reads.text != "features" else None
        image = clip.image_tower() if method.reads.image == "pixels" else None
        names = {"classes": ("cat", "dog", "owl", "pig"), "text_tower": text, "image_tower": image, "domains": 2}
        names["groups"] = "old", "young"
        return replace(backbone, **names), x[method.reads.image]

    return make


def learns(name):
    method = parse("method", name)
    return method.reads.towers or bool(trained(method.build(Backbone(torch.eye(4), 1.0))))


LEARNED = [name for name in available("method") if learns(name)]


@pytest.mark.parametrize("name", LEARNED)
def test_the_slope_of_every_methods_loss_is_its_gradient_unless_it_changes_gradients(name, towers):
    # The slope in a random direction, from two values in float64, at one point; a change must show at one of several.
    method = parse("method", name)
    backbone, x = towers(method)
    torch.manual_seed(0)
    module = method.build(backbone).double()

    def same(seed):
        client = ClientContext(torch.tensor(1), torch.ones(4), round=1) if method.reads_client else None
        batch = Batch(x, Y.roll(seed), client=client, target=x + 1 if method.reads_target else None, group=Y % 2)
        params = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
        start = {n: p + 0.02 * draw(p.numel(), seed=seed).view(p.shape) for n, p in params.items()}
        direction = {n: draw(p.numel(), seed=9).view(p.shape) / p.numel() ** 0.5 for n, p in params.items()}

        def loss(params):
            torch.manual_seed(seed)  # some draw random numbers
            return with_tensors(method.loss, module, params, batch)

        live = {n: p.clone().requires_grad_() for n, p in start.items()}
        grads = torch.autograd.grad(loss(live), list(live.values()), materialize_grads=True)
        expected = sum((grad * direction[n]).sum() for n, grad in zip(live, grads, strict=True))
        step = 1e-7
        with torch.no_grad():
            ahead, behind = (loss({n: p + side * step * direction[n] for n, p in start.items()}) for side in (1, -1))
        slope = (ahead - behind) / (2 * step)
        assert expected != 0
        return torch.isclose(slope, expected, rtol=1e-4, atol=1e-7)

    assert not all(map(same, range(5))) if method.changes_gradients else same(0)


def test_the_mean_of_many_estimates_is_the_gradient_within_its_standard_error(backbone):
    count, directions = 4000, 2
    x, y = draw(6, 8).expand(count, -1, -1), Y.expand(count, -1)
    probe = parse("method", {"name": "probe", "directions": directions} | ESTIMATED)
    module = probe.build(backbone)
    params = {"weight": draw(4, 8, seed=3)}
    value, exact = by_autograd(probe, module, params, Batch(x[:1], y[:1]))
    losses, grads = gradients(probe, module, params, Batch(x, y), rngs(count))
    true, found = exact["weight"][0], grads["weight"]
    # With signs u, the i-th entry of an estimate is the sum of g_j u_j u_i: g_i, and noise of variance |g|^2 - g_i^2.
    error = ((true.square().sum() - true.square()) / directions).sqrt()
    assert ((found.mean(dim=0) - true).abs() < 4 * error / count**0.5).all()
    torch.testing.assert_close(found.std(dim=0), error, rtol=0.1, atol=0)
    torch.testing.assert_close(losses, value.expand(count), rtol=1e-5, atol=0)


def test_all_directions_together_give_the_gradient_of_a_parabola():
    # 2^3 directions, each as often as another: the slope of a parabola has no error.
    curvature = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    point = {"w": torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)}
    method = parse("method", {"name": "probe", "estimator": "spsa", "perturbation": 0.5})

    def losses(params):
        return (curvature * params["w"].square()).sum(dim=1) / 2

    found = {}
    for rng in rngs(200):
        state = rng.get_state()
        signs = tuple((2 * torch.randint(0, 2, (3,), generator=rng, dtype=torch.int8) - 1).tolist())
        rng.set_state(state)
        found[signs] = by_differences(losses, point, point, method, [rng])[1]["w"][0]
    assert len(found) == 8
    torch.testing.assert_close(torch.stack(list(found.values())).mean(dim=0), curvature * point["w"])


def test_both_values_of_a_direction_see_the_same_random_numbers(backbone):
    method = parse("method", {"name": "probe", "directions": 3} | ESTIMATED)
    seen = []

    def losses(params):
        noise = torch.rand(())
        seen.append(noise.item())
        return params["w"].sum(dim=1) + 1e3 * noise

    torch.manual_seed(0)
    params = {"w": torch.zeros(5, dtype=torch.float64)}
    _, grads = by_differences(losses, params, params, method, rngs(1))
    assert seen[0::2] == seen[1::2] and len(set(seen)) == 3
    assert grads["w"].abs().max() < 6  # the noise would be a million times as large


@pytest.mark.parametrize("name", ["probe", "promptfl", "zoopfl"])
def test_estimates_of_two_clients_are_those_of_each_alone(name, towers):
    # On features, through the text tower in one call, and one by one through the image tower.
    method = parse("method", {"name": name, "directions": 2} | ESTIMATED)
    backbone, x = towers(method)
    module = method.build(backbone).double()
    batch = Batch(x.view(2, 3, *x.shape[1:]), Y.view(2, 3))
    params = {n: torch.stack([t.detach(), t.detach() + 0.01]) for n, t in module.state_dict().items()}
    losses, grads = gradients(method, module, params, batch, rngs(2))
    for k in range(2):
        own = {n: t[k : k + 1] for n, t in params.items()}
        part = Batch(batch.x[k : k + 1], batch.y[k : k + 1])
        loss, alone = gradients(method, module, own, part, rngs(2)[k : k + 1])
        torch.testing.assert_close(losses[k], loss[0], rtol=1e-12, atol=0)
        for n, grad in alone.items():
            torch.testing.assert_close(grads[n][k], grad[0], rtol=1e-7, atol=1e-9)
    same = {n: t[0] for n, t in params.items()}  # before the first step all have the same
    assert all(grad.shape == params[n].shape for n, grad in gradients(method, module, same, batch, rngs(2))[1].items())


@component
class Watched(Probe):
    """Refuses to be differentiated."""

    estimator = "spsa"

    def loss(self, module, batch):
        assert not torch.is_grad_enabled()
        return super().loss(module, batch)


@pytest.mark.parametrize("engine", ["stacked", "reference"])
def test_no_graph_is_built(engine, config):
    assert run(config(method=Watched(), engine=engine, rounds=1)).last_round == 1


def last_params(config):
    return load_checkpoint(config.out, config.experiment())[0].params


def test_both_engines_agree_and_chunks_are_the_same_bits_again(config, tmp_path):
    method = {"name": "probe", "directions": 3, "local_epochs": 2, "batch_size": 20, "clip_norm": 1.0} | ESTIMATED
    fields = {"method": method, "clients": 5, "partition": "dirichlet", "rounds": 2}
    made = {name: config(**fields, out=tmp_path / name) for name in ("one", "again")}
    made["reference"] = config(**fields, engine="reference", out=tmp_path / "reference")
    for each in made.values():
        run(each)
    one, again, reference = (last_params(each)["weight"] for each in made.values())
    assert torch.equal(one, again)
    torch.testing.assert_close(one, reference, rtol=1e-4, atol=1e-5)


def test_a_step_is_one_number_in_a_direction_that_the_key_gives(backbone):
    # With one local step and one direction, the update of 32 parameters is a number: the server can draw the signs.
    method = parse("method", {"name": "probe", "optimizer": "sgd", "lr": 0.5} | ESTIMATED)
    module = method.build(backbone).double()
    before = module.weight.detach().clone()
    optimizer = Optimizer(method, {"weight": module.weight.detach()[None]})
    rows, inputs, rng = TrainRows(draw(6, 8), Y, [6]), RuleInputs({"weight": before}), torch_rng(3, "batches", 1, 0)
    train_client(module, optimizer, rows, method, parse("server", "fedavg"), inputs, rng)
    rng = torch_rng(3, "batches", 1, 0)
    torch.randperm(6, generator=rng)  # the order of the rows
    signs = 2 * torch.randint(0, 2, (32,), generator=rng, dtype=torch.int8).view(4, 8) - 1
    slopes = (before - module.weight) / (0.5 * signs)
    torch.testing.assert_close(slopes, slopes[0, :1].expand(4, 8), rtol=1e-9, atol=0)
    assert slopes.abs().min() > 0


def test_a_round_costs_two_forward_passes_for_each_direction(config):
    # Logits alone: 2 clients of 72 rows, 4 classes, 24 dimensions; autograd would need two products, too.
    report = run(config(method={"name": "probe", "directions": 3} | ESTIMATED, rounds=1))
    assert report.tables().rounds.flops.tolist() == [2 * 72 * 2 * (4 * 24) * 2 * 3]


def test_each_value_of_an_estimate_encodes_texts_of_its_own(towers):
    rows = {"x": draw(6, 8).numpy(), "y": Y.numpy(), "domain": np.zeros(6, np.int64), "split": np.full(6, -1, np.int8)}
    labels = rows | {"classes": ("cat", "dog", "owl", "pig"), "domains": ("ink",), "logit_scale": 5.0}
    counts = []
    for method in ({"name": "promptfl"}, {"name": "promptfl", "directions": 3} | ESTIMATED):
        method = parse("method", method)
        backbone, _ = towers(method)
        data = from_features(Features(class_embeddings=backbone.class_embeddings.numpy(), **labels))
        task = Task(method, parse("server", "fedavg"), seed=0, dtype="float64")
        counts.append(flops_of(task, backbone, data, np.arange(6)))
    (per_step, _), (estimated, per_row) = counts
    assert per_row == 6 * 2 * 4 * 8  # logits of 4 classes, 8 dimensions
    assert 6 * 0.4 * per_step < estimated < 6 * 0.5 * per_step  # without a backward pass


@pytest.mark.parametrize("fields", [{"method": {"name": "facmic"} | ESTIMATED}, {"server": "pfedme"}], ids=str)
def test_gradients_that_are_not_those_of_the_losss_values_are_not_estimated(fields, config):
    with pytest.raises(InputError, match=r"trains is not that of the values of its loss, .*spsa would estimate it"):
        run(config(**({"method": {"name": "probe"} | ESTIMATED} | fields)))


# ZooPFL


def test_zoopfl_starts_as_zero_shot_clip_and_adds_what_its_decoder_makes_of_patches_and_an_embedding(towers):
    method = parse("method", {"name": "zoopfl", "cells": 2, "width": 3, "embedding": 2})
    backbone, x = towers(method)
    module = method.build(backbone).double()
    zero_shot = 5 * nn.functional.normalize(backbone.image.encode(x), dim=1) @ backbone.class_embeddings.T
    torch.testing.assert_close(module(x), zero_shot)

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(draw(parameter.numel(), seed=1).view(parameter.shape))
    w = dict(module.named_parameters())
    small = x.double().view(6, 3, 8, 4, 8, 4).mean(dim=(3, 5)) / 127.5 - 1
    changed = x.double()
    for i in range(2):
        for j in range(2):
            cell = small[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            code = (torch.einsum("bchw,kchw->bk", cell, w["encoder.weight"]) + w["encoder.bias"]).tanh()
            both = torch.cat([code, w["embedding"].expand(6, -1)], dim=1)
            made = torch.einsum("bk,kchw->bchw", both, w["decoder.weight"]) + w["decoder.bias"].view(3, 1, 1)
            large = made.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
            changed[:, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16] += 127.5 * large
    features = nn.functional.normalize(backbone.image.encode(changed), dim=1)
    torch.testing.assert_close(module(x), 5 * features @ backbone.class_embeddings.T @ w["remap"].T)


def test_zoopfl_sends_the_auto_encoder_and_keeps_the_embedding_and_the_map(towers):
    method = parse("method", "zoopfl")
    task = Task(method, parse("server", "fedavg"), seed=0)
    params = method.build(towers(method)[0]).state_dict()
    assert sorted(task.select(params, "private")) == ["embedding", "remap"]
    # Weights of 8 numbers for 3 x 4 x 4 pixels, and of 3 x 4 x 4 pixels for 16; and biases.
    count = 8 * 48 + 8 + 16 * 48 + 3
    assert task.payload({name: tensor.float() for name, tensor in params.items()}, cohort=1) == (4 * count, 4 * count)

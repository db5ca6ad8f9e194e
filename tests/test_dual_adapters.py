"""Methods with a shared and a private adapter in each block: feddat, fedsdaf."""

import pytest
import torch
from test_insertions import CLASSES, a_vit, built, draw, pixels
from torch.nn.functional import cross_entropy, gelu, layer_norm, log_softmax, normalize, softmax

from fedsim import Backbone, InputError
from fedsim.methods import Batch, RuleContext
from fedsim.registry import parse
from fedsim.rng import torch_rng
from fedsim.training.optimizer import Optimizer
from fedsim.training.rows import RuleInputs, TrainRows
from fedsim.training.task import Task
from fedsim.training.train import train_client

Y = torch.tensor([0, 2, 3])


@pytest.fixture(scope="module")
def vit():
    """An image tower of open_clip with three blocks, in float64, and a backbone with it."""
    visual, image = a_vit(output_dim=256)
    embeddings = normalize(draw(4, 256, seed=7), dim=1)
    return visual, Backbone(embeddings, 20.0, CLASSES, image_tower=image)


def logits_of(visual, backbone, added, x):
    """Logits of open_clip's own forward pass, where `added(k, y)` is added to the output y of the block k."""
    blocks = visual.transformer.resblocks
    hooks = [
        block.register_forward_hook(lambda _, args, out, k=k: out + added(k, out)) for k, block in enumerate(blocks)
    ]
    features = visual(backbone.image.normalized(x))
    for hook in hooks:
        hook.remove()
    return 20 * normalize(features, dim=1) @ backbone.class_embeddings.T


def bottleneck(state, name, activation):
    def adapter(y):
        hidden = activation(y @ state[f"{name}.down.weight"].T + state[f"{name}.down.bias"])
        return hidden @ state[f"{name}.up.weight"].T + state[f"{name}.up.bias"]

    return adapter


def kl(p, q, temperature=1.0):
    """T^2 times the mean over rows of KL(p || q), of logits."""
    p, q = p / temperature, q / temperature
    rows = (softmax(p, dim=1) * (log_softmax(p, dim=1) - log_softmax(q, dim=1))).sum(dim=1)
    return temperature**2 * rows.mean()


def shaken(module):
    for k, parameter in enumerate(module.parameters()):
        parameter.data += 0.1 * draw(*parameter.shape, seed=k)
    return module


# FedDAT ----------------------------------------------------------------------------------------------------------


def test_one_step_of_feddat_is_its_two_steps_of_adamw(vit):
    visual, backbone = vit
    method, module = built("feddat", backbone, towers="image", lr=0.02, batch_size=2, local_epochs=2, reduction=4)
    state = {name: tensor.clone() for name, tensor in shaken(module).state_dict().items()}
    optimizer = Optimizer(method, {name: tensor.data[None] for name, tensor in module.named_parameters()})
    rule = parse("server", "fedavg")
    shared = {name: state[name] for name in state if method.scope(name) == "shared"}
    rows = TrainRows(pixels(), Y, [len(Y)])
    loss = train_client(module, optimizer, rows, method, rule, RuleInputs(shared), torch_rng(0, "batches"))

    # As in the code: adapter 1 is shared, adapter 0 private, and adapter 2 the received adapter 1.
    copy = {name: state[name].clone() for name in shared}
    groups = [[state[n].requires_grad_() for n in state if (n in shared) == which] for which in (True, False)]
    steps = [torch.optim.AdamW(group, lr=0.02, betas=(0.9, 0.98), weight_decay=0.01) for group in groups]

    def alone(k, y):
        return bottleneck(state, f"shared.adapters.image.{k}", torch.relu)(y)

    def teaching(k, y):
        other = bottleneck(copy, f"shared.adapters.image.{k}", torch.relu)(y)
        return 0.5 * bottleneck(state, f"own.image.{k}", torch.relu)(y) + 0.5 * other

    rng, losses = torch_rng(0, "batches"), []
    for _ in range(2):
        for rows in torch.randperm(3, generator=rng).split(2):
            x, y = pixels()[rows], Y[rows]
            teacher = logits_of(visual, backbone, teaching, x).detach()
            student = logits_of(visual, backbone, alone, x)
            first = (cross_entropy(student, y) + kl(teacher, student, 3)) / 2
            steps[0].zero_grad()
            first.backward()
            steps[0].step()
            teacher = logits_of(visual, backbone, teaching, x)
            second = (cross_entropy(teacher, y) + kl(student.detach(), teacher, 3)) / 2
            steps[1].zero_grad()
            second.backward()
            steps[1].step()
            losses.append((first + second).item())
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-9)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, state[name].detach(), rtol=1e-7, atol=1e-9)


def test_a_client_is_evaluated_with_the_mean_of_both_adapters(vit):
    visual, backbone = vit
    _, module = built("feddat", backbone, towers="image", reduction=4)
    state = shaken(module).state_dict()

    def added(k, y):
        parts = [bottleneck(state, name, torch.relu)(y) for name in (f"shared.adapters.image.{k}", f"own.image.{k}")]
        return sum(parts) / 2

    expected = logits_of(visual, backbone, added, pixels())
    torch.testing.assert_close(module(pixels()), expected, rtol=1e-9, atol=1e-10)


def test_both_adapters_of_feddat_are_clipped_as_if_alone(vit):
    method, module = built("feddat", vit[1], towers="image", clip_norm=1.0)
    grads = {name: 3 * torch.ones(1, *tensor.shape) for name, tensor in module.named_parameters()}
    clipped = method.clipped(grads)
    for own in (True, False):
        norms = [v.norm() for name, v in clipped.items() if name.startswith("own.") == own]
        assert torch.stack(norms).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_under_ditto_both_models_read_the_received_shared_adapter(vit):
    inner = parse("method", {"name": "feddat", "towers": "image"})
    twins = parse("server", "ditto").adapt(inner)
    pair = shaken(twins.build(vit[1]).double())
    received = {name: tensor + 0.1 for name, tensor in pair.shared.named_parameters() if inner.scope(name) == "shared"}
    named = {f"shared.{name}": tensor for name, tensor in received.items()}
    loss = twins.loss(pair, Batch(pixels(), Y, rule=RuleContext(named, {}, {})))
    batch = Batch(pixels(), Y, rule=RuleContext(received, {}, {}))
    assert torch.equal(loss, inner.loss(pair.shared, batch) + inner.loss(pair.own, batch))
    assert not torch.equal(loss, twins.loss(pair, Batch(pixels(), Y)))


# FedSDAF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, torch.tensor([True, False, True, True])])
def test_fedsdaf_minimizes_the_loss_of_both_paths_and_their_divergences(classes, vit):
    visual, backbone = vit
    method, module = built("fedsdaf", backbone, heads=4, distillation=0.7)
    state = shaken(module).state_dict()

    def invariant(k, y):
        return bottleneck(state, f"shared.adapters.{k}", gelu)(y)

    def integrated(k, y):
        both = torch.cat([bottleneck(state, f"own.{k}", gelu)(y), y], dim=1)
        both = layer_norm(both, (16,), state[f"attention.{k}.norm.weight"], state[f"attention.{k}.norm.bias"])
        own = {name: state[f"attention.{k}.attend.{name}"] for name in ("in_proj_weight", "in_proj_bias")}
        parts = (both @ own["in_proj_weight"].T + own["in_proj_bias"]).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in parts)
        mixed = ((query @ key.mT / 2).softmax(dim=3) @ value).transpose(1, 2).flatten(2)
        out = mixed @ state[f"attention.{k}.attend.out_proj.weight"].T + state[f"attention.{k}.attend.out_proj.bias"]
        return 0.5 * out[:, : y.shape[1]] + 0.5 * invariant(k, y)

    z_di, z_dw = (logits_of(visual, backbone, added, pixels()) for added in (invariant, integrated))
    torch.testing.assert_close(module(pixels()), z_dw, rtol=1e-9, atol=1e-10)
    if classes is not None:
        z_di, z_dw = z_di[:, classes], z_dw[:, classes]
    y = Y if classes is None else torch.tensor([0, 1, 2])
    expected = cross_entropy(z_di, y) + cross_entropy(z_dw, y) + 0.7 * (kl(z_di, z_dw) + kl(z_dw, z_di))
    torch.testing.assert_close(method.loss(module, Batch(pixels(), Y, classes)), expected, rtol=1e-9, atol=0)


def test_heads_and_adapters_that_do_not_fit_are_refused(vit):
    with pytest.raises(InputError, match=r"--method\.heads must divide 16, the image tower's width; 3 does not"):
        built("fedsdaf", vit[1], heads=3)
    with pytest.raises(InputError, match=r"--method\.reduction must be at most 16, the image tower's width, not 17"):
        built("fedsdaf", vit[1], reduction=17)
    with pytest.raises(InputError, match=r"reduction 17 is more than the width of a tower \(image tower: 16\)"):
        built("feddat", vit[1], towers="image", reduction=17)


# Both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shared", "private"),
    [
        ("feddat", 3 * (2 * 16 * 4 + 4 + 16), 3 * (2 * 16 * 4 + 4 + 16)),
        # Two layer norms' vectors, and four matrices with their biases.
        ("fedsdaf", 3 * (2 * 16 * 4 + 4 + 16), 3 * (2 * 16 * 4 + 4 + 16 + 2 * 16 + 4 * 16 * 16 + 4 * 16)),
    ],
)
def test_one_adapter_of_each_block_travels(name, shared, private, vit):
    fields = {"towers": "image"} if name == "feddat" else {}
    method, module = built(name, vit[1], reduction=4, **fields)
    task, params = Task(method, parse("server", "fedavg"), seed=0), module.float().state_dict()
    assert sum(tensor.numel() for tensor in task.select(params, "shared").values()) == shared
    assert sum(tensor.numel() for tensor in task.select(params, "private").values()) == private
    assert task.payload(params, cohort=2) == (4 * shared, 4 * shared)

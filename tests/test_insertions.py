"""What methods insert into the frozen towers, against open_clip itself and against blocks written out in float64."""

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn
from torch.nn.functional import gelu, layer_norm, normalize

from fedsim import Backbone, InputError
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.insertions import Insertions
from fedsim.clip.model import Clip
from fedsim.clip.towers import ImageTower
from fedsim.methods import Batch
from fedsim.registry import parse
from fedsim.training.task import Task, initial_params

CLASSES = "cat", "hot air balloon", "owl", "pig"
SMALL = {"image_size": 24, "patch_size": 8, "width": 16, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "output_dim": 6}
KINDS = {
    "plain": {},
    "QuickGELU": {"act_layer": QuickGELU},
    "no norm in front": {"no_ln_pre": True},
    "mean of the patches": {"pool_type": "avg", "final_ln_after_pool": True},
    "attention pooling": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "layer scale": {"ls_init_value": 0.1},
    "norms of queries and keys": {"qk_norm": True},
}
STATISTICS = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(count=3, size=24):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def a_vit(dtype=torch.float64, **options):
    torch.manual_seed(4)
    visual = VisionTransformer(**SMALL | options).to(dtype).eval().requires_grad_(False)
    return visual, ImageTower(visual, *STATISTICS)


def none(tower, depth=2):
    return Insertions(torch.empty(depth, 0, tower.width, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_with_no_tokens_the_blocks_give_open_clips_own_features(kind):
    visual, tower = a_vit(**KINDS[kind])
    assert (tower.depth, tower.width) == (3, 16)
    expected = visual(tower.normalized(pixels()))
    torch.testing.assert_close(tower.encode(pixels(), insertions=none(tower)), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(tower.encode(pixels()), expected)


def written_out(visual, x, tokens):
    """(B, 3, H, W) and (d, n, W) -> (B, D): a vision transformer in plain arithmetic, for GELU and two heads."""
    w = dict(visual.named_parameters())

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    size = visual.patch_size[0]
    patches = x.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    patches = patches @ w["conv1.weight"].flatten(1).T
    start = w["class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([start, patches], dim=1) + w["positional_embedding"]
    x = norm(torch.cat([x, tokens[0].expand(len(x), -1, -1)], dim=1), "ln_pre")
    for k in range(visual.transformer.layers):
        block = f"transformer.resblocks.{k}"
        if 0 < k < len(tokens):
            x = torch.cat([x[:, : -tokens.shape[1]], tokens[k].expand(len(x), -1, -1)], dim=1)
        packed = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        query, key, value = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in packed.chunk(3, dim=2))
        shares = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((shares @ value).transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x[:, 0], "ln_post") @ w["proj"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_are_those_of_blocks_that_are_written_out(depth):
    visual, tower = a_vit()
    tokens = draw(depth, 5, 16).requires_grad_()
    features = tower.encode(pixels(), insertions=Insertions(tokens))
    expected = written_out(visual, tower.normalized(pixels()), tokens)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out.square().sum(), tokens)[0] for out in (features, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (ours.abs().amax(dim=(1, 2)) > 1e-3).all()  # each block reads its own tokens
    assert not torch.allclose(features, tower.encode(pixels()), atol=1e-3)


def test_tokens_and_replaced_weights_go_together():
    visual, tower = a_vit()
    name, tokens = "transformer.resblocks.1.mlp.c_fc.weight", Insertions(draw(2, 5, 16))
    weights = {name: draw(*tower.weights[name].shape, seed=2)}
    together = tower.encode(pixels(), weights, tokens)
    visual.load_state_dict(visual.state_dict() | weights)
    torch.testing.assert_close(together, tower.encode(pixels(), insertions=tokens), rtol=1e-12, atol=1e-12)


def test_in_half_precision_tokens_are_float32_in_and_out():
    visual, tower = a_vit(torch.float32)
    half = ImageTower(visual, *STATISTICS, precision="bf16")
    tokens = draw(2, 5, 16).float().requires_grad_()
    full, out = (each.encode(pixels(), insertions=Insertions(tokens)) for each in (tower, half))
    assert out.dtype == torch.float32 and 0 < (out - full).norm() / full.norm() < 2e-2
    assert torch.autograd.grad(out.sum(), tokens)[0].dtype == torch.float32


# Methods --------------------------------------------------------------------------------------------------------


def a_backbone(**options):
    visual, tower = a_vit(**options)
    return visual, Backbone(normalize(draw(4, 6, seed=7), dim=1), 20.0, CLASSES, image_tower=tower)


def built(name, backbone, **fields):
    torch.manual_seed(0)
    method = parse("method", {"name": name, **fields})
    return method, method.build(backbone).double()


def test_fedvpt_without_tokens_is_zero_shot_clip():
    visual, backbone = a_backbone()
    _, module = built("fedvpt", backbone, depth=2)
    features = normalize(visual(backbone.image.normalized(pixels())), dim=1)
    zero_shot = 20 * features @ backbone.class_embeddings.T
    assert not torch.allclose(module(pixels()), zero_shot, atol=1e-6)
    module.tokens = nn.Parameter(module.tokens[:, :0])
    torch.testing.assert_close(module(pixels()), zero_shot, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("depth", "blocks"), [(1, 1), (2, 2), (12, 3)])
def test_the_tokens_of_fedvpt_travel_and_nothing_else(depth, blocks):
    _, backbone = a_backbone()
    task = Task(parse("method", {"name": "fedvpt", "length": 5, "depth": depth}), parse("server", "fedavg"), seed=0)
    params = initial_params(task, backbone)
    assert {name: tensor.shape for name, tensor in params.items()} == {"tokens": (blocks, 5, 16)}
    assert task.payload(params, cohort=2) == (4 * blocks * 5 * 16, 4 * blocks * 5 * 16)
    assert task.scope("tokens") == "shared"


def test_a_few_steps_of_fedvpt_lower_the_loss():
    _, backbone = a_backbone()
    method, module = built("fedvpt", backbone, depth=2)
    batch, losses = Batch(pixels(8), torch.arange(8) % 4), []
    for _ in range(5):
        losses.append(method.loss(module, batch))
        (grad,) = torch.autograd.grad(losses[-1], [module.tokens])
        module.tokens.data -= 0.1 * grad
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["fedvpt"])
def test_a_tower_without_such_blocks_is_one_sentence(name):
    backbone = Backbone(torch.eye(4), 1.0, CLASSES, image_tower=Clip(find_weights(*EMBEDDED)).image_tower())
    with pytest.raises(InputError) as refusal:
        parse("method", name).build(backbone)
    assert str(refusal.value) == (
        "this method needs the blocks of open_clip's VisionTransformer, and tiny's image tower is timm's EfficientNet; "
        "use a ViT, such as ViT-B-32"
    )

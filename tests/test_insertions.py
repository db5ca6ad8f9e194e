"""What methods insert into the frozen towers, against open_clip itself and against blocks written out in float64."""

import pytest
import torch
from open_clip import get_tokenizer
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import nn
from torch.nn.functional import gelu, layer_norm, normalize

from fedsim import Backbone, InputError
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.insertions import Insertions
from fedsim.clip.model import Clip
from fedsim.clip.towers import ImageTower, TextTower
from fedsim.methods import Batch, trained
from fedsim.registry import available, parse
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task

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
SITES = {"visual_tokens", "image_adapters"}
INSERTED = [name for name in available("method") if SITES & set(parse("method", name).sites)]
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


@pytest.fixture(scope="module")
def texts():
    """A model of open_clip with a causal text tower of four blocks, in float64, and the tower."""
    clip = Clip(find_weights(*EMBEDDED))
    return clip.model.double(), TextTower(clip.model, clip.tokenizer)


def one_by_one(model, start, rests, ends, tokens):
    """Text features with deep tokens, each text by itself and through all blocks of open_clip."""
    features = []
    for rest, end in zip(rests, ends, strict=True):
        x = torch.cat([start, tokens[0], rest[: end + 1]])[None]
        x = x + model.positional_embedding[: x.shape[1]]
        causal = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
        for k, block in enumerate(model.transformer.resblocks):
            if 0 < k < len(tokens):
                x = torch.cat([x[:, :1], tokens[k][None], x[:, 1 + tokens.shape[1] :]], dim=1)
            x = block(x, attn_mask=causal)
        features.append(model.ln_final(x[0, -1]) @ model.text_projection)
    return torch.stack(features)


@pytest.mark.parametrize(("count", "depth"), [(3, 1), (3, 2), (70, 4)])  # 70 texts share two sequences
def test_tokens_of_packed_texts_are_those_of_each_text_by_itself(count, depth, texts):
    model, tower = texts
    names = [f"{'very ' * (k % 4)}small drawing {k}." for k in range(count)]
    tokens, rows = draw(depth, 3, tower.width).requires_grad_(), tower.tokenize(names)
    embedded, ends = tower.embed(rows), tower.ends(rows)
    call = embedded[0, :1], embedded[:, 1:], ends - 1
    features = tower.encode_after(*call, insertions=Insertions(tokens))
    expected = one_by_one(model, *call, tokens)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out.square().sum(), tokens)[0] for out in (features, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert (ours.abs().amax(dim=(1, 2)) > 1e-6).all()


def test_tokens_come_after_the_first_token_of_one_text_and_of_embeddings_too(texts):
    tower = texts[1]
    rows = tower.tokenize(["an owl", "a small drawing"])
    ends, insertions = tower.ends(rows), Insertions(draw(2, 3, tower.width))
    together = tower.encode(rows, ends, insertions=insertions)
    for same in (rows[:1], tower.embed(rows[:1]), tower.embed(rows)):
        features = tower.encode(same, ends[: len(same)], insertions=insertions)
        torch.testing.assert_close(features, together[: len(same)], rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match="tokens are inserted after the first token of the start, which is empty"):
        tower.encode_after(rows[0, :0], rows, ends, insertions=insertions)


# Methods --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbones(texts):
    """Makes an image tower of open_clip and a backbone with it and with the text tower."""

    def make():
        visual, image = a_vit(output_dim=256)
        embeddings = normalize(draw(4, 256, seed=7), dim=1)
        of_data = CLASSES, ("a photo of a {}.",)
        return visual, Backbone(embeddings, 20.0, *of_data, texts[1], image, groups=("old", "young"))

    return make


def built(name, backbone, **fields):
    torch.manual_seed(0)
    method = parse("method", {"name": name, **fields})
    return method, method.build(backbone).double()


def test_fedvpt_without_tokens_is_zero_shot_clip(backbones):
    visual, backbone = backbones()
    _, module = built("fedvpt", backbone, depth=2)
    features = normalize(visual(backbone.image.normalized(pixels())), dim=1)
    zero_shot = 20 * features @ backbone.class_embeddings.T
    assert not torch.allclose(module(pixels()), zero_shot, atol=1e-6)
    module.tokens = nn.Parameter(module.tokens[:, :0])
    torch.testing.assert_close(module(pixels()), zero_shot, rtol=1e-12, atol=1e-12)


def test_maple_starts_as_the_written_prompt(texts, backbones):
    tower = texts[1]
    _, module = built("maple", backbones()[1], depth=1)
    written = tower.tokenize([f"a photo of a {name}." for name in CLASSES])
    expected = tower.encode_after(written[0, :0], written, tower.ends(written))
    torch.testing.assert_close(module.texts(module.tokens), normalize(expected, dim=1), rtol=1e-10, atol=1e-12)


def test_maple_at_depth_1_has_the_texts_of_promptfl_and_without_visual_tokens_its_logits(backbones):
    _, backbone = backbones()
    _, maple = built("maple", backbone, depth=1, init="one small drawing of", words="")
    _, promptfl = built("promptfl", backbone, init="one small drawing of")
    assert torch.equal(maple.tokens[0], promptfl.tokens)
    assert torch.equal(maple.texts(maple.tokens), promptfl.texts(promptfl.tokens))
    features = backbone.image.encode(pixels())
    assert torch.equal(maple.logits(features, maple.texts(maple.tokens)), promptfl(features))


def test_a_zero_projection_trains_the_text_side_as_promptfl_but_still_inserts_visual_tokens(backbones):
    _, backbone = backbones()
    fields, y = {"init": "one small drawing of"}, torch.tensor([0, 2, 3])
    method, maple = built("maple", backbone, depth=1, words="", **fields)
    _, promptfl = built("promptfl", backbone, **fields)
    maple.projections.load_state_dict({name: 0 * tensor for name, tensor in maple.projections.state_dict().items()})
    features = backbone.image.encode(pixels(), insertions=Insertions(torch.zeros(1, 4, 16, dtype=torch.float64)))
    # Tokens of zeros take part in attention, so the image features are not those of the frozen tower.
    assert not torch.allclose(features, backbone.image.encode(pixels()), atol=1e-3)
    (ours,) = torch.autograd.grad(method.loss(maple, Batch(pixels(), y)), [maple.tokens])
    (theirs,) = torch.autograd.grad(method.loss(promptfl, Batch(features, y)), [promptfl.tokens])
    torch.testing.assert_close(ours[0], theirs, rtol=1e-10, atol=1e-14)


def test_the_visual_tokens_of_maple_are_projected_from_those_of_the_text_block_by_block(backbones):
    visual, backbone = backbones()
    _, module = built("maple", backbone, depth=2)
    state = module.state_dict()
    weights = [(state[f"projections.{k}.weight"], state[f"projections.{k}.bias"]) for k in range(2)]
    tokens = torch.stack([state["tokens"][k] @ weights[k][0].T + weights[k][1] for k in range(2)])
    features = written_out(visual, backbone.image.normalized(pixels()), tokens)
    expected = 20 * normalize(features, dim=1) @ module.texts(module.tokens).T
    torch.testing.assert_close(module(pixels()), expected, rtol=1e-9, atol=1e-10)


def test_projections_after_the_first_start_alike(backbones):
    state = built("maple", backbones()[1], depth=3)[1].state_dict()
    weights = [state[f"projections.{k}.weight"] for k in range(3)]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("classes", [None, torch.tensor([True, False, True, True])])
def test_promptsrc_stays_near_frozen_images_texts_and_predictions(classes, texts, backbones):
    (model, tower), (visual, backbone) = texts, backbones()
    method, module = built("promptsrc", backbone, depth=2, text_pull=2.5, image_pull=1.5, logit_pull=0.5)
    y, active = torch.tensor([0, 2, 3]), torch.arange(4) if classes is None else classes.nonzero().flatten()
    x = backbone.image.normalized(pixels())
    images, frozen = (normalize(out, dim=1) for out in (written_out(visual, x, module.visual), visual(x)))
    rows = tower.tokenize([f"{CLASSES[k]}." for k in active])
    embedded, written = tower.embed(rows), backbone.class_embeddings[active]
    learned = one_by_one(model, embedded[0, :1], embedded[:, 1:], tower.ends(rows) - 1, module.textual)
    learned = normalize(learned, dim=1)
    p, q = (20 * images @ learned.T).softmax(dim=1), (20 * frozen @ written.T).softmax(dim=1)
    right = p[torch.arange(3), [active.tolist().index(k) for k in y]]
    expected = -right.log().mean() + 2.5 * (learned - written).abs().mean() + 1.5 * (images - frozen).abs().mean()
    expected = expected + 0.5 * (q * (q / p).log()).sum() / q.numel()
    ours = method.loss(module, Batch(pixels(), y, classes))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    tokens = [module.textual, module.visual]
    grads = zip(torch.autograd.grad(ours, tokens), torch.autograd.grad(expected, tokens), strict=True)
    for one, other in grads:
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
        assert (one.abs().amax(dim=(1, 2)) > 1e-6).all()  # each block has its own


def test_promptsrc_without_pulls_is_the_cross_entropy_of_independent_prompts(backbones):
    _, backbone = backbones()
    method, module = built("promptsrc", backbone, depth=2, text_pull=0, image_pull=0, logit_pull=0)
    _, promptfl = built("promptfl", backbone, init="a photo of a")
    y = torch.tensor([0, 2, 3])
    assert method.loss(module, Batch(pixels(), y)) == nn.functional.cross_entropy(module(pixels()), y)
    module.textual = nn.Parameter(module.textual[:1])
    features = backbone.image.encode(pixels(), insertions=Insertions(module.visual))
    torch.testing.assert_close(module(pixels()), promptfl(features), rtol=1e-12, atol=1e-12)


def hooked(model, visual, backbone, module, first):
    """Logits of pFedMMA by open_clip's own forward passes, with adapters added by hooks and gradients unscaled."""
    state = {name: tensor.requires_grad_() for name, tensor in module.state_dict().items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def hook(block, side, k):
        def added(_, args, out):
            hidden = linear(block.ln_1(args[0]), f"adapters.{side}.{k}.down").relu()
            return out + 0.01 * linear(linear(hidden, f"shared.{k}").relu(), f"adapters.{side}.{k}.up")

        return block.register_forward_hook(added)

    towers = {"image": visual.transformer.resblocks, "text": model.transformer.resblocks}
    hooks = [
        hook(block, side, k) for side, blocks in towers.items() for k, block in enumerate(list(blocks)[first[side] :])
    ]
    image = normalize(visual(backbone.image.normalized(pixels())), dim=1)
    tokens = get_tokenizer("ViT-B-32", context_length=32)([f"a photo of a {name}." for name in CLASSES])
    logits = 20 * image @ model.encode_text(tokens, normalize=True).T
    for handle in hooks:
        handle.remove()
    return logits, state


@pytest.mark.parametrize(("blocks", "first"), [(2, {"image": 1, "text": 2}), (12, {"image": 0, "text": 1})])
def test_pfedmma_adds_what_hooks_add_to_open_clips_blocks_and_its_gradients_are_not_scaled(
    blocks, first, texts, backbones
):
    visual, backbone = backbones()
    _, module = built("pfedmma", backbone, blocks=blocks, width=4, scale=0.01)
    expected, state = hooked(texts[0], visual, backbone, module, first)
    logits, weight = module(pixels()), draw(3, 4, seed=8)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    parameters = dict(module.named_parameters())
    ours = torch.autograd.grad((logits * weight).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((expected * weight).sum(), [state[name] for name in parameters])
    for mine, natural in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, natural / 0.01, rtol=1e-7, atol=1e-9)


def test_adapters_that_add_nothing_are_zero_shot_clip(texts, backbones):
    visual, backbone = backbones()
    _, module = built("pfedmma", backbone)
    image = normalize(visual(backbone.image.normalized(pixels())), dim=1)
    tokens = get_tokenizer("ViT-B-32", context_length=32)([f"a photo of a {name}." for name in CLASSES])
    zero_shot = 20 * image @ texts[0].encode_text(tokens, normalize=True).T
    assert not torch.allclose(module(pixels()), zero_shot, atol=1e-6)
    for name, parameter in module.named_parameters():
        if ".up." in name:
            nn.init.zeros_(parameter)
    torch.testing.assert_close(module(pixels()), zero_shot, rtol=1e-10, atol=1e-10)


def test_insertions_of_nothing_change_no_bit(texts, backbones):
    _, backbone = backbones()
    tokens = texts[1].tokenize([f"a photo of a {name}." for name in CLASSES])
    ends = texts[1].ends(tokens)
    assert torch.equal(backbone.image.encode(pixels(), insertions=Insertions()), backbone.image.encode(pixels()))
    assert torch.equal(texts[1].encode(tokens, ends, insertions=Insertions()), texts[1].encode(tokens, ends))


def test_the_projections_of_pfedmma_travel_and_its_adapters_stay(backbones):
    method, module = built("pfedmma", backbones()[1])
    scopes = {name.partition(".")[0]: method.scope(name) for name in module.state_dict()}
    assert scopes == {"adapters": "private", "shared": "shared"}


@pytest.fixture(scope="module")
def wide():
    """Towers of the widths of ViT-B/16, with 9 blocks of little else."""
    torch.manual_seed(0)
    text = TextTransformer(layers=9, mlp_ratio=0.01).requires_grad_(False)
    visual = VisionTransformer(32, 32, width=768, layers=9, heads=1, mlp_ratio=0.01).requires_grad_(False)
    towers = TextTower(text, get_tokenizer("ViT-B-16")), ImageTower(visual, *STATISTICS)
    return Backbone(torch.eye(512)[:4], 100.0, CLASSES, ("a photo of a {}.",), *towers)


@pytest.mark.parametrize(
    ("name", "shared", "private"),
    [
        ("fedvpt", 16 * 768, 0),
        ("maple", 9 * (2 * 512 + 512 * 768 + 768), 0),  # 3,555,072
        ("promptsrc", 9 * 4 * (512 + 768), 0),  # 46,080
        ("pfedmma", 8_448, 674_560 - 8_448),
    ],
)
def test_as_many_numbers_travel_and_stay_as_published(name, shared, private, wide):
    task = Task(parse("method", name), parse("server", "fedavg"), seed=0)
    params = initial_params(task, wide)
    assert sum(tensor.numel() for tensor in task.select(params, "shared").values()) == shared
    assert sum(tensor.numel() for tensor in task.select(params, "private").values()) == private
    assert task.payload(params, cohort=2) == (4 * shared, 4 * shared)


@pytest.mark.parametrize(("depth", "blocks"), [(1, 1), (2, 2), (12, 3)])
@pytest.mark.parametrize("name", ["fedvpt", "maple"])
def test_a_depth_beyond_the_tower_is_all_of_it(name, depth, blocks, backbones):
    assert len(built(name, backbones()[1], depth=depth)[1].tokens) == blocks


@pytest.mark.parametrize("name", INSERTED)
def test_a_few_steps_lower_the_loss(name, backbones):
    method, module = built(name, backbones()[1])
    batch, losses = Batch(pixels(8), torch.arange(8) % 4, group=torch.arange(8) // 4), []
    for _ in range(5):
        losses.append(method.loss(module, batch))
        params = [module.get_parameter(name) for name in trained(module)]
        for parameter, grad in zip(params, torch.autograd.grad(losses[-1], params), strict=True):
            parameter.data -= 0.03 * grad
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", INSERTED)
def test_half_precision_is_near_and_gradients_are_float32(name):
    clip = Clip(find_weights(*EMBEDDED))
    visual, _ = a_vit(torch.float32, output_dim=256)
    losses = {}
    for precision in ("fp32", "bf16"):
        towers = (
            TextTower(clip.model, clip.tokenizer, precision=precision),
            ImageTower(visual, *STATISTICS, "", precision),
        )
        embeddings, groups = normalize(draw(4, 256, seed=7).float(), dim=1), ("old", "young")
        backbone = Backbone(embeddings, 20.0, CLASSES, ("a {}",), *towers, groups=groups)
        torch.manual_seed(0)
        method = parse("method", name)
        module = method.build(backbone)
        losses[precision] = method.loss(module, Batch(pixels(), torch.tensor([0, 2, 3]), group=torch.tensor([0, 1, 1])))
        grads = torch.autograd.grad(losses[precision], list(module.parameters()))
        assert {grad.dtype for grad in grads} == {torch.float32}
    assert 0 < abs(losses["bf16"] / losses["fp32"] - 1) < 3e-2


@pytest.mark.parametrize("name", INSERTED)
def test_a_tower_without_such_blocks_is_one_sentence(name):
    clip = Clip(find_weights(*EMBEDDED))
    towers = clip.text_tower(blocks=False), clip.image_tower()
    backbone = Backbone(torch.eye(256)[:4], 1.0, CLASSES, ("a photo of a {}.",), *towers)
    with pytest.raises(InputError) as refusal:
        parse("method", name).build(backbone)
    assert str(refusal.value) == (
        "this method needs the blocks of open_clip's VisionTransformer, and tiny's image tower is timm's EfficientNet; "
        "use a ViT, such as ViT-B-32"
    )

"""Methods that learn tokens before the class names, against open_clip itself and formulas of a few lines."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.model import Clip
from fedsim.clip.towers import TextTower
from fedsim.errors import InputError
from fedsim.methods import Backbone, Batch, trained
from fedsim.methods._transport import plan
from fedsim.registry import available, parse
from fedsim.training.stack import gradients

CLASSES = "cat", "hot air balloon", "owl", "flying saucer", "pig"
WRITTEN = "a picture of a {}."
# Methods through tokens of texts; those that also train through the image tower are in test_insertions.py.
READS = {name: parse("method", name).reads for name in available("method")}
ALL = [name for name, reads in READS.items() if reads.text == "embeddings" and reads.image != "pixels"]
LONG = [name for name in ALL if name != "fedtpg"]  # these can start as a text
PRIVATE = {"promptfolio": {"own"}, "fedpgp": {"u", "v"}, "fedotp": {"own"}, "fedpha": {"own"}}
PRIVATE |= {"dp_fpl": {"left", "right", "residual"}}
FROZEN = {"fedapt": {"keys"}, "trip": {"keys"}}


def a_backbone(dtype):
    clip = Clip(find_weights(*EMBEDDED))
    clip.model.to(dtype)
    tower = TextTower(clip.model, clip.tokenizer)
    class_embeddings = torch.from_numpy(clip.encode_texts([f"a photo of a {name}" for name in CLASSES])).to(dtype)
    fields = {"templates": ("a photo of a {}",), "text_tower": tower, "domains": 2}
    return clip, Backbone(class_embeddings, clip.logit_scale, CLASSES, **fields)


@pytest.fixture(scope="module")
def double():
    return a_backbone(torch.float64)


@pytest.fixture(scope="module")
def backbone(double):
    return double[1]


def made(name, backbone, seed=0, **fields):
    torch.manual_seed(seed)
    method = parse("method", {"name": name, **fields})
    return method, method.build(backbone).to(backbone.class_embeddings.dtype)


def by_open_clip(clip, template, names=CLASSES):
    """(C, D) unit rows, from open_clip's own path."""
    tokens = clip.tokenizer([template.format(name) for name in names])
    return clip.model.encode_text(tokens, normalize=True)


def tokens_of(backbone, text):
    return backbone.text.embed(backbone.text.tokenize([text]))[0, 1:-1].clone()


def a_batch(backbone, name="promptfl", rows=6, classes=CLASSES):
    draw = torch.Generator().manual_seed(3)
    shape = (rows, 9, backbone.width) if "tokens" in READS[name].image else (rows, backbone.width)
    x = torch.randn(shape, generator=draw, dtype=torch.float64).to(backbone.class_embeddings.dtype)
    return x, torch.randint(len(classes), (rows,), generator=draw)


def crossed(logits, y):
    """Cross-entropy, in NumPy."""
    logits = logits.detach().numpy()
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]))


def cosines(x, texts, scale):
    return scale * (x / x.norm(dim=1, keepdim=True)) @ texts.T


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_prompt_that_starts_as_words_is_open_clips_own_text(dtype, rtol):
    clip, backbone = a_backbone(dtype)
    _, module = made("promptfl", backbone, init="a picture of a")
    assert module.tokens.shape == (4, backbone.text.width)
    with torch.no_grad():
        ours, theirs = module.texts(module.tokens), by_open_clip(clip, WRITTEN)
    assert ours.shape == (len(CLASSES), backbone.width)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 10)
    assert not torch.allclose(ours, by_open_clip(clip, "a drawing of a {}."), atol=1e-3)


@pytest.mark.parametrize("count", [1, 64, 65, 131])
def test_texts_that_share_a_start_are_each_open_clips_own(count):
    """Of all lengths, in up to three sequences whose last slot is not full; and hardly a token is computed in vain."""
    clip, backbone = a_backbone(torch.float64)
    texts = [f"a picture of a {'very ' * (7 * k % 6)}{chr(97 + k // 12)}{k}" for k in range(count)]
    computed, tower = [], backbone.text
    tower._module.transformer.register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:2].numel()))
    with torch.no_grad():
        tokens = tower.tokenize(texts)
        ours = torch.nn.functional.normalize(tower.encode(tokens, tower.ends(tokens)), dim=-1)
        theirs = by_open_clip(clip, "{}", texts)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    start = 0 if count == 1 else 5
    needed = int((tower.ends(tokens) + 1 - start).sum()) + start * -(-count // 64)
    assert needed <= computed[0] < 1.1 * needed


def test_what_stands_behind_the_end_of_a_text_changes_nothing(backbone):
    _, module = made("promptfl", backbone)
    cut = module.texts(module.tokens)
    more = backbone.text.context - 16 - module.names.shape[1]
    assert more > 0
    module.names = torch.cat([module.names, torch.randn(len(CLASSES), more, backbone.text.width).double()], dim=1)
    torch.testing.assert_close(module.texts(module.tokens), cut, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_only_what_is_learnt_has_gradients_and_is_sent_or_kept(name, double):
    clip, backbone = double
    method, module = made(name, backbone)
    x, y = a_batch(backbone, name)
    method.loss(module, Batch(x, y)).backward()
    frozen = {name_ for name_ in module.state_dict() if method.scope(name_) == "frozen"}
    assert frozen == FROZEN.get(name, set())
    assert set(module.state_dict()) - frozen == set(trained(module))
    for parameter in module.parameters():
        assert parameter.grad.abs().max() > 0
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in clip.model.parameters())
    private = {name_ for name_ in module.state_dict() if method.scope(name_) == "private"}
    assert private == PRIVATE.get(name, set())
    assert {method.scope(name_) for name_ in set(module.state_dict()) - private - frozen} == {"shared"}


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_two_clients_are_those_of_each_alone(name, backbone):
    method, module = made(name, backbone)
    method = replace(method, estimator="autograd")
    x, y = a_batch(backbone, name, rows=8)
    x, y = x.view(2, 4, *x.shape[1:]), y.view(2, 4) % 3
    masks = torch.tensor([[True, True, True, False, False], [True, True, True, True, True]])
    params = {n: torch.stack([t.detach(), t.detach() + 0.01]) for n, t in module.state_dict().items()}
    losses, grads = gradients(method, module, params, Batch(x, y, masks))
    for k in range(2):
        module.load_state_dict({n: t[k] for n, t in params.items()})
        module.zero_grad()
        loss = method.loss(module, Batch(x[k], y[k], masks[k]))
        loss.backward()
        torch.testing.assert_close(losses[k], loss.detach(), rtol=1e-12, atol=0)
        for n, parameter in module.named_parameters():
            torch.testing.assert_close(grads[n][k], parameter.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_inactive_classes_are_masked_and_cost_no_text(name, backbone, monkeypatch):
    method, module = made(name, backbone)
    x, _ = a_batch(backbone, name)
    everyone = module(x)
    assert everyone.shape == (6, len(CLASSES)) and everyone.isfinite().all()
    classes = torch.tensor([True, False, True, False, True])
    encoded, encode = [], backbone.text.encode_after
    counting = lambda start, rests, ends: encoded.append(len(rests)) or encode(start, rests, ends)  # noqa: E731
    monkeypatch.setattr(backbone.text, "encode_after", counting)
    logits = module(x, classes)
    assert set(encoded) == {3}
    assert (logits[:, ~classes] == -torch.inf).all()
    if not method.joint_classes:
        torch.testing.assert_close(logits[:, classes], everyone[:, classes], rtol=1e-10, atol=1e-10)
    assert method.loss(module, Batch(x, torch.tensor([0, 2, 4, 0, 2, 4]), classes)).isfinite()


@pytest.mark.parametrize("name", ALL)
def test_no_images_and_no_active_classes_give_no_scores(name, backbone):
    _, module = made(name, backbone)
    x, _ = a_batch(backbone, name)
    assert module(x[:0]).shape == (0, len(CLASSES))
    assert (module(x, torch.zeros(len(CLASSES), dtype=torch.bool)) == -torch.inf).all()


def test_promptfl_is_the_cross_entropy_of_scaled_cosines(double):
    clip, backbone = double
    method, module = made("promptfl", backbone, init="a picture of a")
    x, y = a_batch(backbone)
    expected = crossed(cosines(x, by_open_clip(clip, WRITTEN), clip.logit_scale), y)
    assert method.loss(module, Batch(x, y)).item() == pytest.approx(expected, rel=1e-10)


def test_kgcoop_adds_eight_times_the_distance_to_the_written_prompt(double):
    clip, backbone = double
    method, module = made("kgcoop", backbone, init="one small drawing with")
    x, y = a_batch(backbone)
    texts = by_open_clip(clip, "one small drawing with {}.")
    away = 1 - np.mean([float(t @ p) for t, p in zip(texts, backbone.class_embeddings, strict=True)])
    assert away > 1e-3
    expected = crossed(cosines(x, texts, clip.logit_scale), y) + 8 * away
    assert method.loss(module, Batch(x, y)).item() == pytest.approx(expected, rel=1e-7)  # class embeddings were float32
    classes = torch.tensor([True, True, False, False, False])
    away = 1 - np.mean([float(t @ p) for t, p in zip(texts[:2], backbone.class_embeddings[:2], strict=True)])
    expected = crossed(cosines(x, texts[:2], clip.logit_scale), y % 2) + 8 * away
    assert method.loss(module, Batch(x, y % 2, classes)).item() == pytest.approx(expected, rel=1e-7)
    plain, _ = made("promptfl", backbone)
    without, _ = made("kgcoop", backbone, pull=0)
    assert without.loss(module, Batch(x, y % 2)) == plain.loss(module, Batch(x, y % 2))


def test_promptfolio_mixes_unit_texts_and_does_not_stretch_the_mixture(double):
    clip, backbone = double
    method, module = made("promptfolio", backbone, theta=0.3)
    with torch.no_grad():
        module.together.copy_(tokens_of(backbone, "a picture of a big old house and"))
        module.own.copy_(tokens_of(backbone, "one small drawing by a child of some"))
    x, y = a_batch(backbone)
    together = by_open_clip(clip, "a picture of a big old house and {}.")
    own = by_open_clip(clip, "one small drawing by a child of some {}.")
    mixed = 0.7 * together + 0.3 * own
    assert mixed.norm(dim=1).max() < 0.999
    expected = crossed(cosines(x, mixed, clip.logit_scale), y)
    assert method.loss(module, Batch(x, y)).item() == pytest.approx(expected, rel=1e-10)


def test_promptfolio_without_an_own_share_is_promptfl(backbone):
    x, y = a_batch(backbone)
    (plain, one), (folio, two) = made("promptfl", backbone, length=8), made("promptfolio", backbone, theta=0)
    with torch.no_grad():
        two.together.copy_(one.tokens)
    loss, mixed = plain.loss(one, Batch(x, y)), folio.loss(two, Batch(x, y))
    assert loss == mixed
    loss.backward()
    mixed.backward()
    torch.testing.assert_close(two.together.grad, one.tokens.grad, rtol=1e-12, atol=0)
    assert (two.own.grad == 0).all()


def test_fedpgp_draws_the_common_text_to_the_placeholder_and_from_the_clients_own(double):
    clip, backbone = double
    method, module = made("fedpgp", backbone, length=4, contrast=0.7, temperature=0.4)
    common, own = tokens_of(backbone, "a picture of a"), tokens_of(backbone, "one small drawing with")
    with torch.no_grad():
        module.sigma.copy_(common)
        module.u.copy_(torch.eye(4))
        module.v.copy_(own - common)
    x, y = a_batch(backbone)
    texts = [by_open_clip(clip, text) for text in ("X X X X {}.", WRITTEN, "one small drawing with {}.")]
    contrast = []
    for untrained, common, own in zip(*texts, strict=True):
        near, far = math.exp(untrained @ common / 0.4), math.exp(common @ own / 0.4)
        contrast.append(-math.log(near / (near + far)))
    expected = crossed(cosines(x, texts[2], clip.logit_scale), y) + 0.7 * np.mean(contrast)
    assert method.loss(module, Batch(x, y)).item() == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(module(x), cosines(x, texts[2], clip.logit_scale), rtol=1e-9, atol=1e-9)


def written(module, texts, heads):
    """FedTPG's network in float64, a head and a token at a time."""
    p = {name: tensor.detach() for name, tensor in module.named_parameters()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    query, texts = norm(p["query"], "norm_query"), norm(texts, "norm_texts")
    bias = dict(zip("qkv", p["attention.in_proj_bias"].chunk(3), strict=True))
    q, k, v = (x @ p[f"attention.{n}_proj_weight"].T + bias[n] for n, x in (("q", query), ("k", texts), ("v", texts)))
    found = []
    for token in q:
        parts = []
        for head in range(heads):
            mine = slice(head * len(token) // heads, (head + 1) * len(token) // heads)
            weight = torch.exp(k[:, mine] @ token[mine] / math.sqrt(len(token) / heads))
            parts.append((weight[:, None] * v[:, mine]).sum(0) / weight.sum())
        found.append(torch.cat(parts))
    found = torch.stack(found) @ p["attention.out_proj.weight"].T + p["attention.out_proj.bias"]
    value, gate = (norm(found, "norm") @ p["widen.weight"].T + p["widen.bias"]).chunk(2, dim=1)
    gated = value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    return found + gated @ p["narrow.weight"].T + p["narrow.bias"]


def test_fedtpg_writes_its_tokens_by_attention_to_the_class_texts(backbone):
    _, module = made("fedtpg", backbone)
    with torch.no_grad():
        for parameter in module.parameters():  # biases and scales that start as 0 and 1 are to count as well
            parameter += 0.05 * torch.randn_like(parameter)
        torch.testing.assert_close(
            module.tokens(), written(module, backbone.class_embeddings, 4), rtol=1e-9, atol=1e-11
        )
        x, _ = a_batch(backbone)
        expected = cosines(x, module.texts(module.tokens()), backbone.logit_scale)
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_fedtpg_does_not_see_inactive_classes(backbone):
    _, module = made("fedtpg", backbone)
    x, _ = a_batch(backbone)
    everyone = module(x)
    classes = torch.tensor([True, True, False, False, True])
    own = module(x, classes)
    assert not torch.allclose(own[:, 0], everyone[:, 0], rtol=1e-6)
    expected = written(module, backbone.class_embeddings[[0, 1, 4]], 4)
    torch.testing.assert_close(module.tokens(classes).detach(), expected, rtol=1e-9, atol=1e-11)
    module.class_embeddings = module.class_embeddings.clone()
    module.class_embeddings[2:4] = normalize(torch.randn(2, backbone.width).double())
    assert torch.equal(module(x, classes), own)
    module.class_embeddings[1] = module.class_embeddings[2]
    assert not torch.allclose(module(x, classes)[:, 0], own[:, 0], rtol=1e-6)


def test_fedtpg_goes_by_its_papers_settings():
    method = parse("method", "fedtpg")
    assert (method.label_space, method.persist_optimizer, method.batch_size, method.lr) == ("client", True, 200, 3e-3)
    assert parse("method", "promptfl").label_space == "all"


def dykstra(near, entropy, mass, rounds):
    """The same transport by alternating projections with Dykstra's correction, one image and class at a time."""
    patches, texts = near.shape
    held = np.exp((near - 1) / entropy)
    owed = np.ones_like(held)
    for _ in range(rounds):
        wanted = held * owed
        rows = wanted.sum(axis=1, keepdims=True)
        held = wanted * np.minimum(1, 1 / (patches * rows))
        owed = wanted / held
        held = held * (mass / texts / held.sum(axis=0, keepdims=True))
    return held


def test_the_transport_is_the_one_that_alternating_projections_find():
    draw = torch.Generator().manual_seed(2)
    near = 0.3 + 0.2 * torch.randn(3, 4, 7, 2, generator=draw, dtype=torch.float64)
    ours = plan(near, 0.1, 0.8, 0.0, 3000)
    for one, moved in zip(near.view(-1, 7, 2).numpy(), ours.view(-1, 7, 2).numpy(), strict=True):
        np.testing.assert_allclose(moved, dykstra(one, 0.1, 0.8, 3000), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(ours.sum(dim=-2), torch.full((3, 4, 2), 0.4).double())
    given = ours.sum(dim=-1)
    assert given.max() <= (1 + 1e-6) / 7
    assert (given < 0.9 / 7).any() and (given > 0.999 / 7).any()  # the bound holds somewhere, and not everywhere


def test_a_plan_hangs_neither_on_the_batch_nor_on_a_small_entropy():
    draw = torch.Generator().manual_seed(2)
    near = torch.rand(6, 4, 7, 2, generator=draw) - 0.5
    whole = plan(near, 0.1, 0.8, 1e-3, 100)
    assert torch.equal(whole[2:3], plan(near[2:3], 0.1, 0.8, 1e-3, 100))
    sharp = plan(near, 0.01, 0.8, 1e-3, 100)
    assert sharp.isfinite().all() and sharp.dtype == torch.float32
    torch.testing.assert_close(sharp.sum(dim=-2), torch.full((6, 4, 2), 0.4))


def test_fedotp_scores_a_class_by_what_is_transported(double, monkeypatch):
    clip, backbone = double
    method, module = made("fedotp", backbone, length=4, tolerance=0, iterations=2000)
    with torch.no_grad():
        module.together.copy_(tokens_of(backbone, "a picture of a"))
        module.own.copy_(tokens_of(backbone, "one small drawing with"))
    x, y = a_batch(backbone, "fedotp")
    texts = torch.stack([by_open_clip(clip, WRITTEN), by_open_clip(clip, "one small drawing with {}.")], dim=1)
    expected = np.zeros((len(x), len(CLASSES)))
    for i, patches in enumerate(x / x.norm(dim=-1, keepdim=True)):
        for c, pair in enumerate(texts):
            near = (patches @ pair.T).numpy()
            expected[i, c] = clip.logit_scale * (near * dykstra(near, 0.1, 0.8, 2000)).sum()
    np.testing.assert_allclose(module(x).detach(), expected, rtol=1e-6, atol=1e-8)
    assert method.loss(module, Batch(x, y)).item() == pytest.approx(crossed(torch.tensor(expected), y), rel=1e-7)
    monkeypatch.setattr("fedsim.methods._transport.MAX_SIMILARITIES", 1)  # an image at a time
    np.testing.assert_allclose(module(x).detach(), expected, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def wide():
    """As wide as CLIP's ViT-B: open_clip's own text tower, of one block, with random weights."""
    from open_clip import get_tokenizer
    from open_clip.transformer import TextTransformer

    tower = TextTower(TextTransformer(layers=1).requires_grad_(False), get_tokenizer("ViT-B-32"))
    return Backbone(normalize(torch.randn(len(CLASSES), 512)), 100.0, CLASSES, text_tower=tower)


@pytest.mark.parametrize(
    ("name", "shared", "private"),
    [
        ("promptfl", 8_192, 0),  # 16 x 512
        ("kgcoop", 2_048, 0),  # 4 x 512
        ("cocoop", 35_360, 0),  # and 512 x 32 + 32 + 32 x 512 + 512
        ("fedtpg", 4_206_080, 0),
        ("promptfolio", 4_096, 4_096),
        ("proda", 32_768, 0),  # 4 x 16 x 512
        ("fedpgp", 8_192, 2_112),  # (16 + 512) x 4
        ("dp_fpl", 8_192, 12_416),  # (16 + 512) x 8, and what they lack of 16 x 512
        ("fedotp", 2_048, 2_048),
        ("plot", 32_768, 0),
    ],
)
def test_as_many_numbers_travel_and_stay_as_published(name, shared, private, wide):
    method, module = made(name, wide)
    counts = {"shared": 0, "private": 0}
    for tensor_name, tensor in module.state_dict().items():
        counts[method.scope(tensor_name)] += tensor.numel()
    assert counts == {"shared": shared, "private": private}
    assert module(a_batch(wide, name)[0]).shape == (6, len(CLASSES))


def test_tokens_start_small_and_each_by_itself(backbone):
    _, module = made("promptfolio", backbone, length=16)
    for tokens in (module.together, module.own):
        assert tokens.shape == (16, backbone.text.width)
        assert tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(module.together, module.own)


@pytest.mark.parametrize("name", ALL)
def test_too_long_a_prompt_is_refused_in_one_sentence(name, backbone):
    # 32 tokens, of which start, end, "hot air balloon" and its full stop take 6.
    random = {"init": ""} if name in LONG else {}
    made(name, backbone, length=26, **random)
    with pytest.raises(InputError) as refused:
        made(name, backbone, length=27, **random)
    said = str(refused.value)
    assert said.startswith("--method.length 27 leaves no room for 'hot air balloon.'")
    assert "takes 32 tokens" in said and "26 fit" in said and "\n" not in said


@pytest.mark.parametrize("name", LONG)
def test_too_long_a_text_to_start_from_is_refused_in_the_same_words(name, backbone):
    one = {"prompts": 1} if hasattr(parse("method", name), "prompts") else {}
    with pytest.raises(InputError, match=r"--method\.init 'a a .* leaves no room for 'hot air balloon\.'"):
        made(name, backbone, init="a " * 26 + "b", **one)


def test_what_does_not_fit_the_backbone_is_said(backbone):
    with pytest.raises(InputError, match=r"--method\.heads must divide 128, the text tower's width; 3 does not"):
        made("fedtpg", backbone, heads=3)
    with pytest.raises(InputError, match="names of the classes; there are none"):
        made("promptfl", Backbone(backbone.class_embeddings, 1.0, text_tower=backbone.text))
    with pytest.raises(TypeError, match="text_tokens"):
        made("promptfl", Backbone(backbone.class_embeddings, 1.0, CLASSES))
    with pytest.raises(InputError, match=r"method\.length must be"):
        parse("method", {"name": "promptfl", "length": 0})


@pytest.mark.parametrize("name", ALL)
def test_a_few_steps_lower_the_loss(name, backbone):
    method, module = made(name, backbone)
    draw = torch.Generator().manual_seed(5)
    y = torch.arange(20) % len(CLASSES)
    shape = (20, 9, backbone.width) if "tokens" in READS[name].image else (20, backbone.width)
    x = (
        backbone.class_embeddings[y].view(20, *[1] * (len(shape) - 2), -1)
        + 0.3 * torch.randn(shape, generator=draw).double()
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=method.momentum)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(method.loss(module, Batch(x, y)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]

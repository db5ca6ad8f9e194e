"""CLIP's towers in half precision, when images are encoded and when methods train through them."""

import numpy as np
import open_clip
import pytest
import torch
from test_towers import pictures, small  # noqa: F401 - fixtures
from torch.nn.functional import normalize

from fedsim import InputError, run
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.model import Clip
from fedsim.clip.precision import HALVES, check_device
from fedsim.encoding import feature_file, text_file
from fedsim.methods import Backbone, Batch
from fedsim.params import flatten
from fedsim.registry import parse
from fedsim.reporting.parquet import read_tables
from fedsim.sweep.syntax import check_searchable
from fedsim.training.task import Task, with_towers

NAMES = "cat", "dog", "owl", "pig"
TEXTS = tuple(f"a picture of a {name}" for name in NAMES)
TENSORS = "adapter.safetensors"
LORA = {"name": "lora", "towers": "both", "lr": 1e-2}


@pytest.fixture(scope="module")
def drawings():
    glyphs = parse("dataset", "glyphs").load(None)
    return [glyphs.open(row) for row in range(0, len(glyphs), len(glyphs) // 8)]


def apart(half, full):
    """The distance of two arrays, relative to the length of the second."""
    return np.linalg.norm(half.astype(np.float64) - full) / np.linalg.norm(full.astype(np.float64))


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("precision", HALVES)
def test_features_and_class_texts_are_those_of_open_clip_under_autocast(precision, tower, small_clip, drawings):
    weights = find_weights(**small_clip("precision", tower))
    half, full = Clip(weights.at(precision)), Clip(weights)
    model, _, preprocess = open_clip.create_model_and_transforms(weights.model, pretrained=str(weights.file))
    model.eval()
    pixels = torch.stack([preprocess(image) for image in drawings]).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", HALVES[precision]):
        x = model.encode_image(pixels)
        texts = model.encode_text(open_clip.get_tokenizer(weights.model)(list(TEXTS)))
    assert x.dtype == texts.dtype == HALVES[precision]
    encoded = half.encode_images(drawings)
    assert np.array_equal(encoded, x.half().numpy())
    assert np.array_equal(half.encode_pixels(half.pixels(drawings)), encoded)
    assert np.array_equal(half.encode_texts(TEXTS), normalize(texts.float(), dim=-1).numpy())
    rounding = torch.finfo(HALVES[precision]).eps  # 0.008 in bf16, 0.001 in fp16
    assert 0 < apart(encoded, full.encode_images(drawings)) < 2 * rounding
    assert 0 < apart(half.encode_texts(TEXTS), full.encode_texts(TEXTS)) < 2 * rounding
    np.testing.assert_allclose(np.linalg.norm(half.encode_texts(TEXTS), axis=1), 1, rtol=1e-6)


def test_patch_tokens_are_near_those_of_float32(small_clip, drawings):
    weights = find_weights(**small_clip("precision", "vit"))
    half, full = (Clip(each).encode_tokens(Clip(each).pixels(drawings)) for each in (weights.at("bf16"), weights))
    assert half.dtype == np.float16 and 0 < apart(half, full) < 3e-2


def test_float32_runs_outside_of_autocast(small_clip, drawings):
    weights, seen = find_weights(**small_clip("precision", "vit")), []
    for each in (weights.at("fp32"), weights.at("bf16")):
        clip = Clip(each)
        for part in (clip.model.visual, clip.model.transformer):
            part.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        clip.encode_images(drawings[:1]), clip.encode_pixels(clip.pixels(drawings[:1]))
        clip.encode_tokens(clip.pixels(drawings[:1])), clip.encode_texts(TEXTS)
        tower = clip.text_tower(blocks=False)
        tokens = tower.tokenize(TEXTS)
        assert tower.encode(tokens, tower.ends(tokens)).dtype == torch.float32
    assert seen == [False] * 5 + [True] * 5


def test_every_precision_has_files_of_its_own_in_the_cache(small_clip, tmp_path):
    weights, images = find_weights(**small_clip("precision", "vit")), parse("dataset", "glyphs").load(None)
    each = [weights.at(precision) for precision in ("fp32", *HALVES)]
    assert each[0] == weights  # the files of float32 have the names that they had
    assert len({feature_file(images, at, tmp_path) for at in each}) == 3
    assert len({text_file(TEXTS, at, ("{}",), tmp_path) for at in each}) == 3


@pytest.mark.parametrize("method", ["promptfl", "lora", {"name": "finetune", "towers": "text"}], ids=str)
def test_gradients_through_bf16_towers_are_float32_and_near_those_of_float32(method, drawings):
    method, weights = parse("method", method), find_weights(*EMBEDDED)
    clip = Clip(weights)
    x = torch.from_numpy(clip.encode_images(drawings)).float()
    batch = Batch(x, torch.arange(len(drawings)) % len(NAMES))
    backbone = Backbone(torch.from_numpy(clip.encode_texts(NAMES)), clip.logit_scale, NAMES)
    losses, grads = {}, {}
    for precision in ("fp32", "bf16"):
        towers = with_towers(backbone, method.reads, Clip(weights.at(precision)))
        module = Task(method, parse("server", "fedavg"), 0).build(towers)
        losses[precision] = method.loss(module, batch)
        losses[precision].backward()
        grads[precision] = {name: tensor.grad for name, tensor in module.named_parameters()}
    assert losses["bf16"].dtype == torch.float32
    assert 0 < abs(losses["bf16"].item() / losses["fp32"].item() - 1) < 2e-2
    assert {grad.dtype for grad in grads["bf16"].values()} == {torch.float32}
    assert 0 < apart(flatten(grads["bf16"]), flatten(grads["fp32"])) < 3e-2


def test_a_run_in_bf16_gives_the_same_bits_again_and_says_what_it_was(small, small_clip, tmp_path):  # noqa: F811
    clip = dict(zip(("backbone", "pretrained"), small_clip("precision", "vit").values(), strict=True))
    ways = {"full": "fp32", "half": "bf16", "again": "bf16"}
    reports = {
        way: run(
            small(
                **clip,
                precision=at,
                method=LORA,
                rounds=1,
                page=True,
                out=tmp_path / way,
                cache_dir=tmp_path / f"{way}s",
            )
        )
        for way, at in ways.items()
    }
    files = {way: [(tmp_path / way / name).read_bytes() for name in ("scores.parquet", TENSORS)] for way in ways}
    assert files["half"] == files["again"] and files["half"][1] != files["full"][1]
    assert all(tensor.dtype == torch.float32 for tensor in reports["half"].adapter.values())
    assert reports["half"].facts["flops_per_step"] == reports["full"].facts["flops_per_step"]
    assert read_tables(tmp_path / "half").experiment["precision"] == "bf16"
    assert "precision: bf16" in (tmp_path / "half" / "report.html").read_text()
    with pytest.raises(InputError, match=r"holds another experiment .*precision 'bf16' there, 'fp32' here"):
        run(small(**clip, method=LORA, rounds=1, out=tmp_path / "half"))


REFUSED = {
    "fp16 through a tower": (
        {"precision": "fp16", "method": "promptfl"},
        "method promptfl trains through CLIP's towers, where gradients can be too small for fp16; give --precision "
        "bf16 or fp32",
    ),
    "half of a reference run": (
        {"precision": "bf16", "dtype": "float64"},
        "--dtype float64 needs --precision fp32, got bf16",
    ),
    "another name": ({"precision": "int8"}, "precision must be 'fp32', 'bf16' or 'fp16', got 'int8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_precision_cannot_do_is_one_sentence(case, small, tmp_path):  # noqa: F811
    fields, expected = REFUSED[case]
    with pytest.raises(InputError) as refusal:
        run(small(**fields))
    assert str(refusal.value) == expected and not (tmp_path / "run").exists()


def test_features_that_are_encoded_already_have_no_precision(config):
    with pytest.raises(InputError, match="encoded already; remove --backbone, --pretrained, --precision and --prompt"):
        run(config(precision="bf16"))


def test_a_precision_cannot_be_searched():
    with pytest.raises(InputError, match="precision cannot be searched: all trials of a sweep use the same data"):
        check_searchable("precision")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU may have bfloat16")
def test_a_gpu_without_bfloat16_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(InputError, match=r"^--precision bf16 needs a GPU .*, and Tesla T4 does not; give --precision"):
        check_device("bf16", "cuda")
    for precision, device in [("fp32", "cuda"), ("fp16", "cuda"), ("bf16", "cpu"), ("fp16", "cpu")]:
        check_device(precision, device)

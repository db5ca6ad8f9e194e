"""The weights of CLIP: which file is which, and what is no file of weights; nothing is unpickled and no code is run."""

import hashlib
import json
import os
import pickle
import warnings
from functools import partial
from pathlib import Path
from shutil import copyfile

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fedsim.cache
from fedsim import InputError
from fedsim.clip import key
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.key import sha256_of
from fedsim.clip.model import Clip
from fedsim.clip.unset import Unset

TOWER = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
RED = [Image.linear_gradient("L").convert("RGB")]


@pytest.fixture
def architecture(tmp_path):
    """Makes the name of a small architecture that open_clip knows in this process alone."""

    def make(name="small", **more):
        file = tmp_path / f"{tmp_path.name}-{name}.json"
        file.write_text(json.dumps(TOWER | more))
        open_clip.add_model_config(file)
        return file.stem

    return make


@pytest.fixture
def publish(monkeypatch):
    """Enters a file among the published weights that open_clip knows, as it enters OpenAI's."""

    def enter(model, file, tag="openai", **about):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        about = {"url": f"https://models.example/clip/{digest}/{file.name}", "hf_hub": "", **about}
        entry = open_clip.pretrained._pcfg(**about)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, model, {tag: entry})

    return enter


def tensors(model, **more):
    torch.manual_seed(0)
    return open_clip.create_model(model).state_dict() | more


def saved(file: Path, content) -> str:
    torch.save(content, file)
    return str(file)


def torchscript(file: Path, state) -> str:
    """An archive as OpenAI's: modules whose tensors have open_clip's names, and three constants."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(last, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(root).save(str(file))
    return str(file)


def features(model, state, **options):
    torch.manual_seed(0)
    clip, _, preprocess = open_clip.create_model_and_transforms(model, **options)
    clip.load_state_dict(state)
    with torch.no_grad():
        return clip.eval().encode_image(preprocess(RED[0])[None]).half().numpy()


def refusal(model, pretrained) -> str:
    with pytest.raises(InputError) as caught:
        find_weights(model, str(pretrained))
    sentence = str(caught.value)
    assert "\n" not in sentence and "weights_only" not in sentence and not sentence.endswith(":")
    return sentence


def test_openais_own_archive_is_recognised_and_gets_its_activation(architecture, publish, tmp_path):
    model = architecture()
    state = tensors(model)
    file = Path(torchscript(tmp_path / "ViT.pt", state | {"input_resolution": torch.tensor(32)}))
    publish(model, file, quick_gelu=True)
    weights = find_weights(model, str(file))
    assert weights.quick_gelu and not weights.note
    assert np.array_equal(Clip(weights).encode_images(RED), features(model, state, force_quick_gelu=True))
    assert not np.allclose(features(model, state, force_quick_gelu=True), features(model, state))


def test_an_archive_is_read_once_while_it_is_checked(architecture, publish, tmp_path, monkeypatch):
    model, calls, load = architecture(), [], torch.jit.load
    file = Path(torchscript(tmp_path / "ViT.pt", tensors(model)))
    publish(model, file)
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: calls.append(args) or load(*args, **options))
    find_weights(model, str(file))
    assert len(calls) == 1


def test_the_archive_of_another_architecture_is_refused_by_name(architecture, publish, tmp_path):
    other, model = architecture("other"), architecture()
    file = Path(torchscript(tmp_path / "ViT.pt", tensors(other)))
    publish(other, file, quick_gelu=True)
    assert refusal(model, file) == f"ViT.pt holds the weights of {other}; --backbone is {model}"


def test_an_archive_that_is_not_openais_is_refused_without_being_run(architecture, publish, tmp_path):
    model = architecture()
    file = Path(torchscript(tmp_path / "ViT.pt", tensors(model)))
    expected = "ViT.pt is a TorchScript archive and, by its SHA-256, not one of OpenAI's; reading it could run code"
    assert refusal(model, file).startswith(expected)
    start = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    publish(model, file, url=f"https://models.example/releases/vit-{start}.pt")  # too little of it to trust a program
    assert refusal(model, file).startswith(expected)


@pytest.mark.parametrize("folder", ["models--timm--vit_tiny.openai/snapshots/1", "vit_tiny.openai", "."])
def test_a_file_is_read_as_the_published_weights_that_it_is(folder, architecture, publish, tmp_path):
    """By the folder of its repository on the hub; by the start of its digest, as in open_clip's own releases."""
    model = architecture()
    state = tensors(model)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    file = tmp_path / folder / "weights.pt"
    saved(file, state)
    start = hashlib.sha256(file.read_bytes()).hexdigest()[:8] if folder == "." else "00000000"
    address = f"https://models.example/releases/vit_tiny-openai-{start}.pt"
    publish(model, file, url=address, hf_hub="timm/vit_tiny.openai/", quick_gelu=True, mean=(0.5, 0.5, 0.5))
    weights = find_weights(model, str(file))
    expected = features(model, state, force_quick_gelu=True, image_mean=(0.5, 0.5, 0.5))
    assert np.array_equal(Clip(weights).encode_images(RED), expected) and not weights.note
    # Where it is known by its place, the same bytes elsewhere are another file, read with other preprocessing.
    elsewhere = find_weights(model, str(copyfile(file, tmp_path / "mine.pt")))
    assert (weights.key == elsewhere.key) == (folder == ".")


@pytest.mark.parametrize("name", ["mine.pt", "mine.bin", "mine.safetensors", "training.pt"])
def test_the_forms_of_a_checkpoint_give_the_same_features(name, architecture, tmp_path):
    model = architecture()
    state, file = tensors(model), tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, file)
    else:  # open_clip's training saves its state_dict next to other values, of a model that was wrapped
        wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
        saved(file, {"epoch": 3, "state_dict": wrapped} if name == "training.pt" else state)
    assert np.array_equal(Clip(find_weights(model, str(file))).encode_images(RED), features(model, state))


def test_what_is_assumed_of_an_unknown_file_is_said(tmp_path):
    model = "ViT-S-32-alt"  # of which no QuickGELU is known
    assert find_weights(model, saved(tmp_path / "mine.pt", tensors(model))).note == ""
    with torch.device("meta"):
        shapes = open_clip.create_model("ViT-B-32", device="meta").state_dict()
    half = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in shapes.items()}
    assert find_weights("ViT-B-32", saved(tmp_path / "mine.pt", half)).note == (
        "mine.pt is read with the activation GELU, as ViT-B-32 is defined; weights by OpenAI and others trained with "
        "QuickGELU need --backbone ViT-B-32-quickgelu"
    )


def test_an_unknown_file_gets_the_preprocessing_that_all_published_weights_of_its_architecture_have(
    architecture, publish, tmp_path
):
    model = architecture()
    state = tensors(model)
    publish(model, Path(saved(tmp_path / "published.pt", {})), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    weights = find_weights(model, saved(tmp_path / "mine.pt", state))
    expected = features(model, state, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    assert np.array_equal(Clip(weights).encode_images(RED), expected)


def test_a_state_dict_saved_from_openais_archive_names_the_backbone_with_its_activation(architecture, tmp_path):
    model = architecture()
    more = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    assert refusal(model, saved(tmp_path / "mine.pt", tensors(model, **more))) == (
        "mine.pt was saved from OpenAI's archive: leave input_resolution, context_length, vocab_size out, and give "
        f"--backbone {model}-quickgelu for its activation"
    )


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_what_is_no_checkpoint_is_said_in_our_own_words_and_never_unpickled(architecture, tmp_path):
    model = architecture()
    contents = {
        "text.pt": b"hello, this is text",
        "empty.pt": b"",
        "old.pkl": pickle.dumps({"a": Trap(tmp_path / "trap")}),
        "cut.pt": Path(saved(tmp_path / "whole.pt", tensors(model))).read_bytes()[:-100],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    saved(tmp_path / "trap.pt", {"state_dict": Trap(tmp_path / "trap")})
    saved(tmp_path / "list.pt", [torch.zeros(1)])
    assert refusal(model, tmp_path / "text.pt").startswith(
        "text.pt is not a checkpoint: it begins with b'hello, th'; exp"
    )
    assert refusal(model, tmp_path / "empty.pt") == "empty.pt is empty; --pretrained needs a checkpoint file"
    for name in ("old.pkl", "trap.pt"):
        assert refusal(model, tmp_path / name).startswith(f"{name} holds Python objects besides tensors, which are ne")
    assert not (tmp_path / "trap").exists()
    assert refusal(model, tmp_path / "list.pt") == "list.pt is damaged, or holds no state_dict of tensors"
    assert refusal(model, tmp_path / "cut.pt").startswith("cut.pt is not a checkpoint: it begins with b'PK")


def test_tensors_that_do_not_fit_are_named_with_their_shapes(architecture, tmp_path):
    model = architecture()
    state = tensors(model)
    other = {**state, "text_projection": torch.zeros(32, 9)}
    save_file(other, tmp_path / "other.safetensors")
    assert refusal(model, tmp_path / "other.safetensors") == (
        f"other.safetensors holds no weights of {model}: the shape differs in 1 of {len(state)} tensors, such as "
        "text_projection: (32, 8) is needed, (32, 9) given"
    )
    few = {name: tensor for name, tensor in state.items() if name != "logit_scale"}
    assert refusal(model, saved(tmp_path / "few.pt", few)).endswith(
        f"it lacks 1 of {len(state)} tensors, such as logit_scale"
    )
    more = saved(tmp_path / "more.pt", {**state, "more": torch.zeros(1)})
    assert refusal(model, more).endswith(f"it has 1 more than the {len(state)} tensors, such as more")


def test_a_suffix_that_says_another_format_is_refused(architecture, tmp_path):
    model = architecture()
    save_file(tensors(model), tmp_path / "mine.bin")
    expected = "mine.bin is in the format of safetensors; rename it, so that its suffix says so"
    assert refusal(model, tmp_path / "mine.bin") == expected
    saved(tmp_path / "mine.safetensors", tensors(model))
    assert refusal(model, tmp_path / "mine.safetensors").startswith("mine.safetensors is in the format of PyTorch")


def test_a_file_that_is_not_there_and_a_tag_that_does_not_exist_are_told_apart(tmp_path):
    assert refusal("ViT-B-32", tmp_path / "mine.pt") == f"no file {tmp_path / 'mine.pt'} for --pretrained"
    assert refusal("ViT-B-32", "mine.pt") == "no file mine.pt for --pretrained"
    assert refusal("ViT-B-32", tmp_path) == (
        f"--pretrained needs a checkpoint file; {tmp_path} is a folder, which --backbone local-dir:PATH reads if it "
        "holds an open_clip model or a CLIPModel of transformers"
    )
    sentence = refusal("ViT-B-32", "laion2b")
    assert sentence.startswith("no file and no tag 'laion2b' for ViT-B-32; its tags: ") and "laion2b_e16" in sentence
    assert refusal("ViT-B-32", "").startswith("--backbone ViT-B-32 needs --pretrained: a checkpoint file, or a tag: op")


def test_an_architecture_that_needs_another_package_is_refused_before_its_weights_are_read(tmp_path):
    try:
        import transformers  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("transformers is installed")
    assert "pip install transformers" in refusal("roberta-ViT-B-32", saved(tmp_path / "mine.pt", {}))


def test_the_embedded_weights_are_found_without_a_note():
    assert find_weights(*EMBEDDED).note == ""


def test_modules_skip_the_initialization_of_weights_that_are_about_to_be_loaded():
    before = torch.get_rng_state()
    with Unset():
        for build in (partial(nn.Linear, 8, 8), partial(nn.Conv2d, 3, 8, 2), partial(nn.MultiheadAttention, 8, 2)):
            build()
        weight = torch.full((8, 8), 3.0)
        draws = "normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_"
        for draw in (getattr(nn.init, name) for name in draws):
            assert draw(weight) is weight and (weight == 3).all()
        assert (nn.LayerNorm(8).weight == 1).all()
        assert torch.equal(torch.get_rng_state(), before)
        assert not (weight.clone().normal_() == 3).any()  # or the next line would never end
        assert nn.init.trunc_normal_(weight).abs().max() <= 2
    assert not (nn.init.normal_(weight) == 3).any()


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_all_weights_of_a_model_are_those_of_its_file(tower, small_clip):
    spec = small_clip("whole", tower)
    saved = torch.load(spec["pretrained"])
    loaded = Clip(find_weights(spec["model"], spec["pretrained"])).model.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_the_key_follows_the_bytes_of_a_file_which_is_read_once(architecture, tmp_path, monkeypatch):
    name, file = architecture(), tmp_path / "w.safetensors"
    keys, reads = [], []
    monkeypatch.setattr(fedsim.cache, "RECENT_NS", 0)  # nothing is read again because it is new
    monkeypatch.setattr(key, "sha256", lambda: reads.append(file) or hashlib.sha256())
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        save_file(open_clip.create_model(name).state_dict(), tmp_path / "new")
        (tmp_path / "new").replace(file)
        keys += [find_weights(name, str(file)).key, find_weights(name, str(file)).key]
    assert keys[0] == keys[1] == keys[4] == keys[5] != keys[2] == keys[3]
    assert len(reads) == 3


def test_a_file_that_was_just_written_is_read_again(tmp_path):
    file = tmp_path / "w.pt"
    for data in (b"one", b"two"):
        file.write_bytes(data)
        os.utime(file, ns=(1, 1))
        assert sha256_of(file) == hashlib.sha256(data).hexdigest()

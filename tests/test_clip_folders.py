"""Folders that hold a CLIP and its architecture, of open_clip or of transformers; also in the cache of the hub."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fedsim import InputError, run
from fedsim.clip.checkpoints import find_weights, width_of
from fedsim.clip.model import Clip

ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
IMAGES = [Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (50, 30), "red")]
TEXTS = ["a picture of a cat", "a dog"]

# The config.json of the same architecture, with what differs from transformers' defaults, as transformers writes it.
SIDE = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_MODEL = {
    "model_type": "clip",
    "projection_dim": 8,
    "vision_config": {**SIDE, "image_size": 32, "patch_size": 8},
    "text_config": {**SIDE, "max_position_embeddings": 24},
}


def small():
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**ARCHITECTURE, quick_gelu=True)
    for parameter in model.parameters():  # biases and gains too, which open_clip starts with 0 and 1
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def by_open_clip(model):
    transform = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    pixels = torch.stack([transform(image) for image in IMAGES])
    tokens = open_clip.SimpleTokenizer(context_length=24)(TEXTS)
    return model.encode_image(pixels).numpy(), model.encode_text(tokens, normalize=True).numpy()


def open_clip_folder(folder: Path, name: str = "open_clip_model.safetensors") -> Path:
    folder.mkdir(parents=True)
    config = {"model_cfg": ARCHITECTURE | {"quick_gelu": True}, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = small().state_dict()
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder


def clip_model(state) -> dict[str, torch.Tensor]:
    """open_clip's tensors by the names of transformers' CLIPModel, and as it splits and turns them."""
    result = {}
    for side, ours in (("vision_model", "visual."), ("text_model", "")):
        for layer in range(2):
            there, here = f"{side}.encoder.layers.{layer}.", f"{ours}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                parts = state[f"{here}attn.in_proj_{kind}"].chunk(3)
                result |= {f"{there}self_attn.{k}_proj.{kind}": p for k, p in zip("qkv", parts, strict=True)}
                result[f"{there}self_attn.out_proj.{kind}"] = state[f"{here}attn.out_proj.{kind}"]
                for theirs, own in (
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    result[f"{there}{theirs}.{kind}"] = state[f"{here}{own}.{kind}"]
    for theirs, own in (
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("text_model.final_layer_norm", "ln_final"),
    ):
        result |= {f"{theirs}.{kind}": state[f"{own}.{kind}"] for kind in ("weight", "bias")}
    result["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
    result["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
    result["vision_model.embeddings.position_embedding.weight"] = state["visual.positional_embedding"]
    result["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    result["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
    result["text_model.embeddings.position_embedding.weight"] = state["positional_embedding"]
    result["visual_projection.weight"] = state["visual.proj"].T
    result["text_projection.weight"] = state["text_projection"].T
    result["logit_scale"] = state["logit_scale"]
    return {name: tensor.contiguous() for name, tensor in result.items()}


def transformers_folder(folder: Path, name: str = "model.safetensors", **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CLIP_MODEL | config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, "resample": 3}))
    state = clip_model(small().state_dict())
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder


def refusal(backbone: str, pretrained: str = "") -> str:
    with pytest.raises(InputError) as caught:
        find_weights(backbone, pretrained)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FOLDERS = {
    "open_clip": lambda folder: open_clip_folder(folder),
    "open_clip, pickled": lambda folder: open_clip_folder(folder, "open_clip_pytorch_model.bin"),
    "transformers": lambda folder: transformers_folder(folder),
    "transformers, pickled": lambda folder: transformers_folder(folder, "pytorch_model.bin"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_gives_the_architecture_the_weights_and_the_preprocessing(kind, tmp_path, monkeypatch):
    FOLDERS[kind](tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    weights = find_weights("local-dir:mine", "")
    monkeypatch.chdir("/")  # workers run elsewhere
    clip = Clip(weights)
    image, text = by_open_clip(small())
    assert width_of(weights) == 8 and not weights.note
    assert np.allclose(clip.encode_images(IMAGES), image, rtol=2e-3, atol=1e-4)  # half precision
    assert np.allclose(clip.encode_texts(TEXTS), text, rtol=0, atol=1e-6)
    assert np.array_equal(clip.frozen().open().encode_images(IMAGES), clip.encode_images(IMAGES))


def test_the_key_is_of_the_folders_content_and_not_of_its_place(tmp_path):
    first, second = transformers_folder(tmp_path / "a"), transformers_folder(tmp_path / "b")
    other = transformers_folder(tmp_path / "c", vision_config=CLIP_MODEL["vision_config"] | {"layer_norm_eps": 1e-3})
    darker = transformers_folder(tmp_path / "d")
    (darker / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": STD}))
    keys = [find_weights(f"local-dir:{folder}", "").key for folder in (first, second, other, darker)]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_the_key_of_a_folder_with_its_own_tokenizer_follows_that_tokenizer(tmp_path):
    folder = open_clip_folder(tmp_path / "a")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "any"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    keys = []
    for text in ("{}", '{"added": 1}'):
        (folder / "tokenizer.json").write_text(text)
        keys.append(find_weights(f"local-dir:{folder}", "").key)
    assert keys[0] != keys[1]


def test_a_folder_that_asks_to_run_its_code_is_refused(tmp_path):
    folder = open_clip_folder(tmp_path / "a")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "sets trust_remote_code, which would run code of the folder" in refusal(f"local-dir:{folder}")


def test_preprocessing_that_is_switched_off_is_refused(tmp_path):
    folder = transformers_folder(tmp_path / "a")
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "resample": 3}))
    assert "do_normalize must not be false" in refusal(f"local-dir:{folder}")


def test_features_of_a_clip_model_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {**SIDE, "image_size": 32, "patch_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-4}
    text = {**SIDE, "max_position_embeddings": 24, "hidden_act": "gelu", "eos_token_id": 49407}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    model = transformers.CLIPModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    clip = Clip(find_weights(f"local-dir:{tmp_path}", ""))
    pixels = torch.stack([clip.preprocess(image) for image in IMAGES])
    tokens = clip.tokenizer(TEXTS)
    outputs = model(input_ids=tokens, pixel_values=pixels)
    found = torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=-1)
    torch.testing.assert_close(found, outputs.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(clip.encode_texts(TEXTS)), outputs.text_embeds, rtol=0, atol=1e-5)
    assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_a_run_trains_through_the_towers_of_a_folder(tmp_path, config):
    folder = transformers_folder(tmp_path / "mine")
    for domain in ("ink", "oil"):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / "pictures" / domain / name).mkdir(parents=True)
            for shade in range(6):
                color = Image.new("RGB", (8, 8), (shade, 40 * k, 0))
                color.save(tmp_path / "pictures" / domain / name / f"{shade}.png")
    data = {"dataset": "folder", "data_dir": tmp_path / "pictures", "held_out": ("oil",), "rounds": 1}
    method = {"name": "lora", "towers": "both", "rank": 2, "batch_size": 4}
    report = run(config(**data, backbone=f"local-dir:{folder}", method=method))
    assert report.last_round == 1 and report.facts["width"] == 8


def test_what_a_folder_lacks_is_said(tmp_path):
    assert refusal("local-dir:") == "--backbone local-dir: needs a folder or a repository"
    assert refusal(f"local-dir:{tmp_path / 'no'}").endswith(f"{tmp_path / 'no'} is not a folder")
    assert refusal(f"local-dir:{tmp_path}") == (
        f"{tmp_path} has neither open_clip_config.json nor config.json; there are: no files"
    )
    folder = open_clip_folder(tmp_path / "mine")
    assert refusal(f"local-dir:{folder}", "openai") == (
        f"--backbone local-dir:{folder} names the weights too; remove --pretrained openai"
    )
    (folder / "open_clip_model.safetensors").rename(folder / "other.safetensors")
    assert refusal(f"local-dir:{folder}") == (
        f"{folder} has open_clip_config.json, but neither open_clip_model.safetensors nor open_clip_pytorch_model.bin; "
        "there are: open_clip_config.json, other.safetensors"
    )
    (folder / "open_clip_config.json").write_text("{")
    assert refusal(f"local-dir:{folder}").startswith(f"{folder / 'open_clip_config.json'} needs to be JSON in UTF-8: ")
    (folder / "open_clip_config.json").write_text("{}")
    assert refusal(f"local-dir:{folder}").endswith(
        "open_clip_config.json has no model_cfg, which says the architecture"
    )


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model_type": "siglip"}, "is of a model of the type 'siglip'; expected is a CLIPModel: clip"),
        (
            {"text_config": CLIP_MODEL["text_config"] | {"vocab_size": 21128}},
            "needs the vocabulary of CLIP (vocab_size 49408) and 3 channels, not 21128 and 3",
        ),
        (
            {"vision_config": CLIP_MODEL["vision_config"] | {"hidden_act": "relu"}},
            "hidden_act needs to be quick_gelu or gelu, not 'relu'",
        ),
        (
            {"projection_dim": 9},
            "the shape differs in 2 of 62 tensors, such as text_projection: (32, 9) is needed, (32, 8) given",
        ),
        (
            {"text_config": CLIP_MODEL["text_config"] | {"num_hidden_layers": 3}},
            "it lacks 12 of 74 tensors, such as transformer.resblocks.2.ln_1.weight",
        ),
    ],
)
def test_a_folder_of_another_model_or_of_another_architecture_is_refused(changed, expected, tmp_path):
    assert expected in refusal(f"local-dir:{transformers_folder(tmp_path / 'mine', **changed)}")


def test_weights_of_transformers_without_their_architecture_name_the_folder(tmp_path):
    folder = transformers_folder(tmp_path / "mine")
    assert refusal("ViT-B-32", str(folder / "model.safetensors")) == (
        "model.safetensors is of a CLIPModel of transformers; give its folder, with config.json: --backbone "
        f"local-dir:{folder}"
    )
    state = load_file(folder / "model.safetensors")
    del state["vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    save_file(state, folder / "model.safetensors")
    assert "parts of its attention are missing" in refusal(f"local-dir:{folder}")


class Trap:
    def __reduce__(self):
        return open, ("trap", "w")


def test_the_weights_of_a_folder_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = transformers_folder(tmp_path / "mine", "pytorch_model.bin")
    torch.save({"visual_projection.weight": Trap()}, folder / "pytorch_model.bin")
    assert refusal(f"local-dir:{folder}").startswith(
        "pytorch_model.bin holds Python objects besides tensors, which are"
    )
    assert not Path("trap").exists()


# The hub -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, numpy as np
from fedsim import InputError
from fedsim.clip.checkpoints import find_weights
from fedsim.clip.model import Clip
try:
    weights = find_weights("hf-hub:lab/clip", "")
except InputError as error:
    sys.exit(str(error))
np.save(sys.argv[1], Clip(weights).encode_texts(["a picture of a cat", "a dog"]))
"""


def from_hub(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, tmp_path / "x.npy"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("make", [open_clip_folder, transformers_folder])
def test_a_repository_of_the_hub_is_read_from_its_cache_without_a_network(make, tmp_path):
    repository = tmp_path / "hub" / "models--lab--clip"
    make(repository / "snapshots" / "1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    assert from_hub(tmp_path).returncode == 0
    assert np.allclose(np.load(tmp_path / "x.npy"), by_open_clip(small())[1], rtol=0, atol=1e-6)


def test_a_repository_that_cannot_be_reached_is_one_sentence(tmp_path):
    said = from_hub(tmp_path).stderr.strip()
    assert said.startswith("hf-hub:lab/clip is not on this machine and cannot be read from the hub (")
    assert said.endswith("here, or use the embedded model: --backbone tiny") and "\n" not in said


@pytest.fixture
def hub(tmp_path):
    """A hub of one repository, lab/clip: yields the folder it serves, its address, and the files it has given."""
    given, folder = [], tmp_path / "served"

    class Hub(SimpleHTTPRequestHandler):
        def do_HEAD(self):
            name = self.path.rpartition("/")[2]
            file = folder / name
            known = self.path == f"/lab/clip/resolve/main/{name}" and file.is_file()
            self.send_response(200 if known else 404)
            content = file.read_bytes() if known else b""
            about = {"X-Repo-Commit": "1" * 40, "ETag": f'"{sha256(content).hexdigest()}"'}
            for header, value in (about if known else {"X-Error-Code": "EntryNotFound"}).items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if known and self.command == "GET":
                self.wfile.write(content)
                given.append(name)

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}", given
        server.shutdown()


def test_a_repository_with_another_tokenizer_is_read_with_its_files_and_none_of_its_code(hub, tmp_path):
    folder, address, given = hub
    open_clip_folder(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "lab/clip"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenization_lab.py", "README.md"):
        (folder / name).write_text(json.dumps({"file": name}))
    program = "from fedsim.clip.checkpoints import find_weights; print(find_weights('hf-hub:lab/clip', '').key)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == find_weights(f"local-dir:{folder}", "").key, done.stderr
    assert sorted(given) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_hub_that_does_not_answer_is_asked_again_later_in_the_same_process(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refusal("hf-hub:lab/clip")
    assert constants.HF_HUB_OFFLINE is False

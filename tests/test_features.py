"""Images through the real open_clip, into one file, once."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fedsim import run
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.model import Clip
from fedsim.cluster.placement import Sizing
from fedsim.datasets import Images
from fedsim.encoding import BLOCK, Encoder, _ahead, encode, feature_file
from fedsim.errors import InputError
from fedsim.registry import parse


def quiet(event):
    pass


def file_of(data):
    return data.representations.files["features"]


@pytest.fixture(scope="module")
def weights():
    return find_weights(*EMBEDDED)


@pytest.fixture(scope="module")
def images():
    """Every eighth embedded image: about 5 blocks."""
    glyphs = parse("dataset", "glyphs").load(None)
    return glyphs.take(np.arange(0, len(glyphs), 8))


@pytest.fixture(scope="module")
def features(images, weights, tmp_path_factory):
    return encode(images, weights, ("a picture of a {}",), tmp_path_factory.mktemp("one"), Sizing(actors=0), quiet)


def test_features_are_what_open_clip_itself_says(images, weights, features):
    model, _, preprocess = open_clip.create_model_and_transforms("tiny", pretrained=str(weights.file))
    model.eval()
    pixels = torch.stack([preprocess(images.open(k)) for k in range(8)])
    tokens = open_clip.get_tokenizer("tiny")([f"a picture of a {name}" for name in images.classes])
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(features.representations.features[:8]).float(),
            model.encode_image(pixels),
            rtol=2e-3,
            atol=2e-3,
        )
        torch.testing.assert_close(
            torch.from_numpy(features.class_embeddings.vectors),
            model.encode_text(tokens, normalize=True),
            rtol=1e-4,
            atol=1e-5,
        )
    assert features.class_embeddings.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_inline_representations_need_no_file_and_share_the_memory_that_they_came_in(images, weights, tmp_path):
    few = images.take(np.arange(4))
    there = encode(few, weights, ("a picture of a {}",), tmp_path, Sizing(actors=0), quiet, ["pixels"], augment=1)
    rows, views = np.array([3, 1]), np.array([0, 1])
    read = there.representations.read
    expected = read("features", rows), read("pixels", rows), read("pixels", rows, views)
    buffers = []
    sent = pickle.dumps(there.inline(), protocol=5, buffer_callback=buffers.append)
    # The rows are not in it but in buffers, which can be shared.
    assert len(sent) < there.representations.files["pixels"].stat().st_size
    for file in there.representations.files.values():
        file.unlink()
    came = pickle.loads(sent, buffers=[memoryview(buffer).toreadonly() for buffer in buffers])
    read = came.representations.read
    found = read("features", rows), read("pixels", rows), read("pixels", rows, views)
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert not came.representations.features.flags.writeable
    assert not came.representations.files  # where it has come to, there are none


def test_a_killed_encoding_goes_on_where_it_stopped(images, weights, features, tmp_path):
    code = f"""
import numpy as np
from pathlib import Path
from fedsim.clip.checkpoints import *
from fedsim.encoding import *
from fedsim.cluster.placement import Sizing
from fedsim.registry import parse
glyphs = parse("dataset", "glyphs").load(None)
images = glyphs.take(np.arange(0, len(glyphs), 8))
encode(images, find_weights(*EMBEDDED), ("a picture of a {{}}",), Path({str(tmp_path)!r}), Sizing(actors=0), print)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while len(list(tmp_path.glob("[0-9a-f]*.0*.npy"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(tmp_path.glob("[0-9a-f]*.0*.npy")))
    assert done >= 2 and not (tmp_path / file_of(features).name).exists()
    seen = []
    again = encode(images, weights, ("a picture of a {}",), tmp_path, Sizing(actors=0), lambda e: seen.append(e.done))
    assert seen[0] == min((done + 1) * BLOCK, len(images)) and seen[-1] == len(images)
    assert file_of(again).read_bytes() == file_of(features).read_bytes()
    assert len(list(tmp_path.glob("*.npy"))) == 2  # features and texts


def test_encoded_images_are_not_encoded_again_and_another_prompt_only_asks_the_text_tower(images, weights, features):
    seen = []
    cache = file_of(features).parent
    again = encode(images, weights, ("a picture of a {}",), cache, Sizing(actors=0), seen.append)
    assert file_of(again) == file_of(features)
    other = encode(images, weights, ("{}",), cache, Sizing(actors=0), seen.append)
    assert seen == [] and file_of(other) == file_of(features)
    assert not np.allclose(other.class_embeddings.vectors, features.class_embeddings.vectors)


def test_the_key_is_of_the_bytes_of_images_and_weights_and_not_of_places_and_times(tmp_path, weights):
    def key(files, weights=weights):
        n = np.zeros(len(files), np.int64)
        fields = {"y": n, "domain": n, "classes": ("a",), "domains": ("b",), "split": n.astype(np.int8)}
        images = Images(files=files, names=[str(file) for file in files], **fields)
        return feature_file(images, weights, tmp_path).stem

    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, color in zip(files, ("red", "blue"), strict=True):
        Image.new("RGB", (8, 8), color).save(file)
    first = key(files)
    os.utime(files[0], (1, 1))
    assert key(files) == key([file.rename(file.with_suffix(".moved")) for file in files]) == first
    files = [file.with_suffix(".moved") for file in files]
    assert key(files[::-1]) != first
    state = open_clip.factory.load_state_dict(str(weights.file))
    state["logit_scale"] = state["logit_scale"] + 1
    torch.save(state, tmp_path / "other.pt")
    assert key(files, find_weights("tiny", str(tmp_path / "other.pt"))) != first


def test_a_checkpoint_of_ones_own_is_loaded_through_open_clip(tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    clip = Clip(find_weights("ViT-S-32-alt", str(tmp_path / "mine.pt")))
    x = clip.encode_images([Image.new("RGB", (50, 30), "red")])
    assert x.shape == (1, 256) and x.dtype == np.float16 and np.isfinite(x).all()
    assert np.allclose(np.linalg.norm(clip.encode_texts(["a", "b"]), axis=1), 1, atol=1e-5)


def test_real_pictures_run_from_folders_to_report(shared_data, tmp_path, config):
    report = run(config(dataset="pacs", data_dir=shared_data / "pacs_mini", held_out="sketch", rounds=1))
    assert report.facts["images"] == 336
    held_out = report.tables().trained.scores[lambda t: (t.domain == "sketch") & (t["round"] == 1)]
    assert held_out.total.tolist() == [84]


def test_real_features_are_as_good_as_when_they_were_made(shared_data, config):
    report = run(config(dataset="features", data_dir=shared_data / "pacs_conse", held_out="photo", rounds=0))
    assert report.summary("zero_shot")["generalization"] == pytest.approx(0.669, abs=5e-4)


def test_openai_weights_get_the_activation_they_were_trained_with(tmp_path):
    """The tag `openai` of ViT-B-32, from a hub cache as huggingface_hub lays it out, here with random weights."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").half()
    repository = tmp_path / "hub" / "models--timm--vit_base_patch32_clip_224.openai"
    (repository / "snapshots" / "1").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    save_file(model.state_dict(), repository / "snapshots" / "1" / "open_clip_model.safetensors")
    code = """
import sys, numpy as np
from PIL import Image
from safetensors.torch import save_file
from fedsim.clip.model import Clip
from fedsim.clip.checkpoints import find_weights
weights = find_weights("ViT-B-32", "openai")
np.save(sys.argv[1], Clip(weights).encode_images([Image.linear_gradient("L").convert("RGB")]))
"""
    environment = os.environ | {"HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.npy"], check=True, env=environment)
    _, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu")
    with torch.no_grad():
        expected = model.float().encode_image(preprocess(Image.linear_gradient("L").convert("RGB"))[None])
    assert np.allclose(np.load(tmp_path / "x.npy"), expected.numpy(), atol=2e-3)


def test_threads_that_decode_ahead_change_no_bit_and_raise_the_error_of_the_first_bad_image(images, weights):
    plain, threaded = (Encoder(images, weights, None, "cpu") for _ in range(2))
    assert plain.threads == 0  # each CPU has an actor of its own
    threaded.threads = 3
    last = (len(images) - 1) // BLOCK
    for block in (0, last):
        assert np.array_equal(threaded.encode(block), plain.encode(block))
        for name in ("pixels", "features"):
            for view in (0, 1):
                assert np.array_equal(*(each.encode_view(name, (view, block)) for each in (threaded, plain)))
    files = [*images.files[:5], b"bad", *images.files[5:9], b"worse"]
    bad = replace(images.take(np.arange(11)), files=files, names=[f"image {k}" for k in range(11)])
    broken = Encoder(bad, weights, None, "cpu")
    broken.threads = 3
    with pytest.raises(InputError, match="image 5 cannot be read"):
        broken.encode(0)


def test_no_more_images_are_decoded_than_there_are_threads():
    decoded, alive, most = [], set(), []

    def decode(row):
        alive.add(row)
        most.append(len(alive))
        decoded.append(row)
        return row

    for row in _ahead(decode, range(50), threads=4):
        alive.remove(row)
    assert sorted(decoded) == list(range(50)) and max(most) <= 5

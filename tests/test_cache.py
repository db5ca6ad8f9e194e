"""What the cache does with damaged, stale and missing files, and with folders and disks that cannot hold it."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fedsim.cache
from fedsim import run
from fedsim.__main__ import main
from fedsim.cache import locked, read_array, write_array
from fedsim.clip.checkpoints import find_weights
from fedsim.cluster.placement import Sizing
from fedsim.datasets import Images
from fedsim.encoding import BLOCK, encode, feature_file, from_features, store
from fedsim.errors import InputError, Stopped
from fedsim.events import Note
from fedsim.registry import parse

N = BLOCK + 6  # two blocks


def silent(event):
    pass


def pictures_in(folder, count=N):
    """Small pictures of random pixels."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(3)
    files = [folder / f"{k:03d}.png" for k in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    return images_of(files)


def images_of(files):
    n = np.arange(len(files)) % 2
    fields = {"y": n, "domain": 0 * n, "classes": ("cat", "dog"), "domains": ("b",), "split": n.astype(np.int8)}
    return Images(files=files, names=[file.name for file in files], **fields)


@pytest.fixture
def images(tmp_path):
    return pictures_in(tmp_path / "pictures")


@pytest.fixture
def weights(small_clip):
    return find_weights(**small_clip("cached", "vit"))


class Trap:
    """Whoever unpickles it creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled(content, trap):
    stream = io.BytesIO()
    np.save(stream, np.array([Trap(trap)], object), allow_pickle=True)
    return stream.getvalue()


def zipped(content, trap):
    stream = io.BytesIO()
    np.savez(stream, prototypes=np.array([Trap(trap)], object))
    return stream.getvalue()


def flipped(at):
    def flip(content, trap):
        content = bytearray(content)
        content[int(at * (len(content) - 1))] ^= 1
        return bytes(content)

    flip.__name__ = f"flipped-at-{at}"
    return flip


def cut(content, trap):
    return content[: len(content) // 2]


def cut_by_one(content, trap):
    return content[:-1]


def zeros(content, trap):
    return bytes(len(content))


def empty(content, trap):
    return b""


def garbage(content, trap):
    return np.random.default_rng(0).bytes(len(content))


def grown(content, trap):
    return content + b"\0"


DAMAGES = [*map(flipped, (0, 0.02, 0.3, 0.5, 0.9, 1)), cut, cut_by_one, zeros, empty, garbage, grown, pickled, zipped]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damaged_file_is_named_and_computed_again_to_the_same_bits(damage, images, weights, tmp_path):
    cache = tmp_path / "cache"
    time.sleep(max(0, images.files[-1].stat().st_ctime + 2.1 - time.time()))  # digests of older files are remembered

    def computed(progress):
        found = [
            encode(images, weights, ("a {}",), cache, Sizing(actors=0), progress, [name], augment)
            for name, augment in (("tokens", 0), ("pixels", 1))
        ]
        rows = np.arange(N)
        first, second, text = found[0].representations, found[1].representations, found[0].class_embeddings
        tokens, pixels = first.read("tokens", rows), second.read("pixels", rows, rows % 2)
        return [first.features, text.vectors, tokens, pixels], text.logit_scale

    arrays, scale = computed(silent)
    arrays = [array.copy() for array in arrays]
    files = {file: file.read_bytes() for file in cache.glob("*.npy")}
    assert sorted(file.name.split(".", 1)[1] for file in files) == [
        "index.npy", "npy", "pixels-1.npy", "text.npy", "tokens-0.npy"
    ]  # fmt: skip
    for file, content in files.items():
        file.write_bytes(damage(content, tmp_path / "trap"))
    events = []
    index = next(file for file in files if "index" in file.name)
    assert feature_file(images, weights, cache, events.append) in files
    assert events == [index]
    events.clear()
    again, scale_again = computed(
        lambda event: events.append(event.stage) if isinstance(event, Note) and "damaged" in event.text else None
    )
    assert sorted(events) == sorted(str(file) for file in files if file != index)
    assert all(np.array_equal(*pair) for pair in zip(arrays, again, strict=True)) and scale == scale_again
    assert {file: file.read_bytes() for file in cache.glob("*.npy")} == files
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("damage", [flipped(0.5), cut, zeros, pickled], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["features", "pixels"])
def test_a_damaged_block_of_an_interrupted_encoding_is_computed_again(damage, name, images, weights, tmp_path):
    def at(cache, progress):
        return encode(images, weights, ("a {}",), cache, Sizing(actors=0), progress, [name], int(name == "pixels"))

    def interrupt(event):
        if (
            event.stage == {"features": "encoding images", "pixels": "encoding pixels"}[name]
            and event.done == event.total
        ):
            raise KeyboardInterrupt

    right, cache = at(tmp_path / "right", silent), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        at(cache, interrupt)
    first = min(cache.glob("*0-000000.npy" if name == "pixels" else "*.000000.npy"))
    first.write_bytes(damage(first.read_bytes(), tmp_path / "trap"))
    events = []
    again = at(cache, events.append)
    assert [event.stage for event in events if isinstance(event, Note) and "damaged" in event.text] == [str(first)]
    for file in right.representations.files.values():
        assert (cache / file.name).read_bytes() == file.read_bytes()
    assert again.representations.key == right.representations.key and not list(cache.glob("*00.npy"))
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_of_custom_features_is_named_and_written_again(damage, config, tmp_path, capsys):
    config = config(cache_dir=tmp_path / "cache", rounds=1)
    right = run(config)
    (file,) = config.cache_dir.glob("*.npy")
    content = file.read_bytes()
    file.write_bytes(damage(content, tmp_path / "trap"))
    shutil.rmtree(config.folder())
    assert run(config).tables().scores.equals(right.tables().scores)
    assert file.read_bytes() == content
    assert capsys.readouterr().err == f"fedsim: {file} is damaged; it is written again\n"
    assert not (tmp_path / "trap").exists()


def test_a_whole_file_in_the_place_of_another_is_damaged(tmp_path):
    for name in "ab":
        write_array(tmp_path / f"{name}.npy", 2, [np.array([[name == "a"], [True]])])
    shutil.copy(tmp_path / "a.npy", tmp_path / "b.npy")
    events = []
    assert read_array(tmp_path / "a.npy", events.append).tolist() == [[True], [True]]
    assert read_array(tmp_path / "b.npy", events.append) is None
    assert events == [tmp_path / "b.npy"]


def test_arrays_of_the_same_bytes_and_another_shape_have_files_of_their_own(config, tmp_path):
    dataset = parse("dataset", "features")
    features = dataset.load(config().data_dir)
    wide = store(from_features(features), tmp_path, silent)
    tall = store(from_features(replace(features, x=features.x.reshape(-1, 12))), tmp_path, silent)
    assert tall.representations.features.shape == (720, 12) and wide.representations.features.shape == (360, 24)


def test_other_pictures_of_the_same_size_and_time_are_encoded_again(weights, tmp_path):
    for folder, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / folder).mkdir()
        for k in range(3):
            Image.new("RGB", (8, 8), color).save(tmp_path / folder / f"{k}.bmp")
            os.utime(tmp_path / folder / f"{k}.bmp", (1e9, 1e9))
    (tmp_path / "data").mkdir()
    found = []
    for folder in ("red", "blue", "red"):
        subprocess.run(["cp", "-p", *sorted((tmp_path / folder).glob("*")), tmp_path / "data"], check=True)
        images = images_of(sorted((tmp_path / "data").glob("*")))
        assert [(file.stat().st_size, file.stat().st_mtime) for file in images.files] == [(246, 1e9)] * 3
        found.append(encode(images, weights, ("a {}",), tmp_path / "cache", Sizing(actors=0), silent))
    first, second, third = (data.representations for data in found)
    assert not np.array_equal(first.features, second.features)
    assert third.files == first.files  # and back: known already


def test_files_that_have_not_changed_are_not_read_again_and_others_are(images, tmp_path, monkeypatch):
    time.sleep(max(0, images.files[-1].stat().st_ctime + 2.1 - time.time()))
    read, digests = [], fedsim.cache._digests
    monkeypatch.setattr(fedsim.cache, "_digests", lambda files: read.append([f.name for f in files]) or digests(files))
    first = images.fingerprint(tmp_path)
    assert images.fingerprint(tmp_path) == first == images.fingerprint()
    assert [len(names) for names in read] == [N, N]  # by the first and the last call
    read.clear()
    os.utime(images.files[3])
    shutil.copy(images.files[1], images.files[2])
    assert images.fingerprint(tmp_path) != first
    assert read == [["002.png", "003.png"]]


def test_a_file_written_just_now_is_not_taken_for_unchanged(tmp_path):
    file = tmp_path / "a.png"
    images = images_of([file])
    seen = set()
    for byte in range(50):  # far more often than the clock of a file system ticks
        file.write_bytes(bytes([byte]))
        os.utime(file, (1e9, 1e9))
        seen.add(images.fingerprint(tmp_path))
    assert len(seen) == 50


def test_pictures_replaced_while_they_are_encoded_leave_nothing_in_the_cache(images, weights, tmp_path):
    def replace_one(event):
        Image.new("RGB", (8, 8)).save(images.files[5])

    with pytest.raises(Stopped, match="images were changed while they were encoded; run the same command again"):
        encode(images, weights, ("a {}",), tmp_path / "cache", Sizing(actors=0), replace_one)
    assert [file.name.split(".", 1)[1] for file in (tmp_path / "cache").glob("*.npy") if "index" not in file.name] == [
        "text.npy"
    ]


def test_a_picture_removed_while_it_is_needed_is_named(images, weights, tmp_path):
    images.files[66].unlink()
    with pytest.raises(InputError, match=r"^066\.png cannot be read: No such file or directory$"):
        encode(images, weights, ("a {}",), tmp_path / "cache", Sizing(actors=0), silent)


def test_features_whose_file_is_removed_during_a_run_are_said_so_in_one_sentence(images, weights, tmp_path):
    features = encode(images, weights, ("a {}",), tmp_path, Sizing(actors=0), silent, ["pixels"])
    there = pickle.loads(pickle.dumps(features))
    for file in features.representations.files.values():
        file.unlink()
    for name in ("features", "pixels"):
        with pytest.raises(Stopped, match=r"\.npy was removed or changed during the run \(No such file or directory\)"):
            there.representations.read(name, np.array([0]))


def test_what_a_killed_process_was_writing_is_removed_once_its_array_is_there(images, weights, tmp_path):
    file = feature_file(images, weights, tmp_path)
    mine, others = (tmp_path / f"part-{node}-1-{file.stem}.000001.npy" for node in (os.uname().nodename, "elsewhere"))
    mine.write_bytes(b"half"), others.write_bytes(b"half")
    encode(images, weights, ("a {}",), tmp_path, Sizing(actors=0), silent)
    assert not mine.exists() and others.exists()


@pytest.fixture(params=["a file", "below a file", "/proc", "read-only"])
def unwritable(request, tmp_path):
    """A folder that cannot be a cache, and why."""
    (tmp_path / "file").write_text("")
    if request.param == "a file":
        return tmp_path / "file", "it is a file"
    if request.param == "below a file":
        return tmp_path / "file" / "cache", "Not a directory"
    if request.param == "/proc":
        return Path("/proc/cache"), "No such file or directory"
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    (tmp_path / "shut").mkdir(mode=0o555)
    return tmp_path / "shut", "Permission denied"


@pytest.mark.parametrize("dataset", ["glyphs", "features"])
def test_a_cache_that_cannot_be_written_is_refused_before_anything_starts(
    dataset, unwritable, features_dir, tmp_path, capsys
):
    cache, reason = unwritable
    data = [] if dataset == "glyphs" else ["--data-dir", str(features_dir)]
    argv = ["run", "--dataset", dataset, *data, "--cache-dir", str(cache)]
    assert main([*argv, "--actors", "0", "--rounds", "1", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"fedsim: --cache-dir {cache} cannot be written: {reason}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o755])
def test_whoever_may_write_to_the_cache_may_lock_its_files(mode, tmp_path):
    tmp_path.chmod(mode)
    with locked(tmp_path / "a.npy"):
        assert (tmp_path / "a.lock").stat().st_mode & 0o777 == mode & 0o666


def test_rows_made_on_demand_need_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["run", "--dataset", "synthetic", "--partition", "natural", "--clients", "3", "--cache-dir"]
    assert main([*argv, str(tmp_path / "file"), "--actors", "0", "--rounds", "1", "--out", str(tmp_path / "run")]) == 0


def on_a_small_disk(folder, size, code):
    """Runs a script with a disk of some bytes mounted on a folder."""
    shell = f'mount -t tmpfs -o size={size} small {folder} && exec {sys.executable} -c "$0"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*command, f"mount -t tmpfs small {folder}"], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    return subprocess.run([*command, shell, code], capture_output=True, text=True, timeout=300)


def test_a_full_disk_is_named_and_keeps_the_blocks_that_are_encoded(images, small_clip, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    code = f"""
import subprocess, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import open_clip
from test_cache import *
open_clip.add_model_config(Path({str(tmp_path / "full-vit.json")!r}))
images = pictures_in(Path({str(tmp_path / "pictures")!r}), 6 * BLOCK)
weights = find_weights(**{small_clip("full", "vit")!r})
disk = Path({str(disk)!r})
def attempt(progress=silent):
    return encode(images, weights, ("a {{}}",), disk, Sizing(actors=0), progress, ["pixels"])
try:
    attempt()
except Stopped as error:
    print(error)
print(sorted(file.name.split(".", 1)[1] for file in disk.glob("*.npy")), list(disk.glob("part-*")))
subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
seen = []
attempt(seen.append)
print([event.done for event in seen])
"""
    done = on_a_small_disk(disk, "900k", code)  # of 1.2 MB
    assert done.returncode == 0, done.stderr
    said, names, resumed = done.stdout.splitlines()
    assert said.startswith(f"no space left in {disk}; make room there and run the same command again")
    assert "pixels-0.pixels-0-000003.npy" in names and "000005" not in names and names.endswith("] []")
    assert resumed in ("[320, 384]", "[384]")


def test_a_full_disk_leaves_nothing_of_custom_features(features_dir, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = [
        "run",
        "--dataset=features",
        f"--data-dir={features_dir}",
        "--actors=0",
        "--rounds=1",
        f"--cache-dir={disk}",
    ]
    code = f"""
from pathlib import Path
from fedsim.__main__ import main
print(main({[*argv, f"--out={tmp_path / 'run'}"]!r}), list(Path({str(disk)!r}).glob("*.npy")))
"""
    done = on_a_small_disk(disk, "16k", code)  # of 34 kB
    assert done.stdout.endswith("1 []\n")
    assert done.stderr.startswith(f"fedsim: no space left in {disk}; make room there")


@pytest.mark.parametrize("scale", [1e9, float("nan")])
@pytest.mark.parametrize("name", ["features", "tokens"])
def test_features_that_half_precision_cannot_hold_are_refused_with_their_backbone(
    scale, name, images, small_clip, tmp_path
):
    named = small_clip("loud", "vit")
    state = torch.load(named["pretrained"], weights_only=True)
    state["visual.proj"] *= scale
    torch.save(state, named["pretrained"])
    with pytest.raises(
        InputError,
        match=r"^backbone loud-vit \(loud-vit\.pt\) gives features that half precision cannot hold \(NaN, or above "
        r"65,504\) for 64 of 64 images, the first of them 000\.png; try other weights$",
    ):
        encode(images, find_weights(**named), ("a {}",), tmp_path / "cache", Sizing(actors=0), silent, [name])


def test_texts_that_are_not_numbers_are_refused_with_their_backbone(images, small_clip, tmp_path):
    named = small_clip("mute", "vit")
    state = torch.load(named["pretrained"], weights_only=True)
    state["text_projection"] *= float("nan")
    torch.save(state, named["pretrained"])
    with pytest.raises(
        InputError, match=r"^backbone mute-vit \(mute-vit\.pt\) gives text features that are NaN or infinite"
    ):
        encode(images, find_weights(**named), ("a {}",), tmp_path / "cache", Sizing(actors=0), silent)


def test_large_photos_are_decoded_one_at_a_time(tmp_path):
    """A decoded photo of 12 million pixels takes 48 MB: four more of them would be seen."""
    Image.linear_gradient("L").resize((4000, 3000)).convert("RGB").save(tmp_path / "photo.jpg")
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_cache import *
from fedsim.clip.checkpoints import EMBEDDED
from fedsim.encoding import Encoder
for count in (1, 5):
    encoder = Encoder(images_of([Path({str(tmp_path / "photo.jpg")!r})] * count), find_weights(*EMBEDDED), None, "cpu")
    encoder.encode(0)
    for view in (0, 1):
        encoder.encode_view("pixels", (view, 0))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 150, f"{few} MB for 1 photo, {many} MB for 5"

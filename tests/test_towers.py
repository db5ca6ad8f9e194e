"""Training through CLIP's towers: what is kept, what is derived, and the engine's promises for such methods."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_until

from fedsim import Config, InputError, Method, available, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.model import Clip
from fedsim.clip.sites import Reads, reads_of
from fedsim.registry import parse

KINDS = "animal", "vehicle"
IN_IMAGES = {"pixels", "visual_tokens", "image_adapters", "image_blocks"}
SETTINGS = {
    "finetune": {"towers": "text"},  # the image tower has a test of its own
    "feddlp": {"modules": "attention"},
    "ffdvp": {"length": 2, "prompt_width": 8},
    "fedms": {"first_stage": 1, "rounds_per_block": 0},  # both stages
}
TOWERED = [name for name in available("method") if parse("method", name).reads.towers]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """48 embedded drawings as files: 2 domains x 2 classes x 12."""
    folder = tmp_path_factory.mktemp("pictures")
    glyphs = parse("dataset", "glyphs").load(None)
    for domain in ("noto", "twemoji"):
        for kind in glyphs.classes[:2]:
            mine = (glyphs.domain == glyphs.domains.index(domain)) & (glyphs.y == glyphs.classes.index(kind))
            place = folder / domain / kind
            place.mkdir(parents=True)
            for row in np.flatnonzero(mine)[:12]:
                glyphs.open(row).save(place / f"{row}.png")
    return folder


@pytest.fixture
def small(pictures, tmp_path):
    """Makes a Config of a quick run on the pictures, in this process."""

    def make(**fields):
        quick = {
            "dataset": "folder",
            "data_dir": pictures,
            "rounds": 2,
            "actors": 0,
            "page": False,
            "out": tmp_path / "run",
        }
        return Config(**(quick | fields))

    return make


def test_what_is_read_follows_from_where_parameters_attach():
    assert reads_of([]) == Reads("features", "features")
    assert reads_of(["image_feature", "head"]) == Reads("features", "features")
    assert reads_of(["text_tokens"]) == Reads("features", "embeddings")
    assert reads_of(["text_tokens", "patch_tokens"]) == Reads("tokens", "embeddings")
    assert reads_of(["image_feature", "patch_tokens"]) == Reads("all_tokens", "features")
    assert reads_of(["text_blocks", "text_tokens", "image_blocks"]) == Reads("pixels", "blocks")
    assert reads_of(["image_adapters", "text_adapters"]) == Reads("pixels", "embeddings")
    assert not reads_of(["image_feature"]).towers and reads_of(["text_tokens"]).towers


def test_every_method_says_where_it_attaches_and_reads_no_more():
    reads = {name: parse("method", name).reads for name in available("method")}
    through_the_image = {name for name in reads if IN_IMAGES & set(parse("method", name).sites)}
    assert {name for name, read in reads.items() if read.image == "pixels"} == through_the_image
    assert reads["fedclip"] == reads["probe"] == Reads("features", "features")
    assert reads["promptfl"] == Reads("features", "embeddings") and reads["lora"] == Reads("features", "blocks")
    assert parse("method", {"name": "lora", "towers": "both"}).reads == Reads("pixels", "blocks")


@component
class Undeclared(Method):
    """Trains through the text tower and does not say so."""

    def build(self, backbone):
        return backbone.text


def test_a_tower_that_is_not_declared_is_not_there(config):
    with pytest.raises(TypeError, match="declares it: `text_tokens` among its sites"):
        run(config(method=Undeclared()))


@pytest.mark.parametrize("name", [name for name in TOWERED if "tokens" not in parse("method", name).reads.image])
def test_a_method_through_the_towers_gives_the_same_bits_one_by_one_and_after_a_kill(name, small, small_clip, tmp_path):
    # The readable path must agree to rounding, and a resumed run to the bit.
    fields: dict = {"method": {"name": name, "batch_size": 8, "local_epochs": 1, **SETTINGS.get(name, {})}}
    if parse("method", name).reads_group:
        fields |= {"dataset": {"name": "folder", "domain_groups": True}}
    fields |= zip(("backbone", "pretrained"), small_clip("towers", "vit").values(), strict=True)
    whole = run(small(**fields, out=tmp_path / "whole"))

    ours = small(**fields, out=tmp_path / "killed")
    run_until(1, ours)
    again = run(ours)
    assert all(torch.equal(whole.adapter[tensor], again.adapter[tensor]) for tensor in whole.adapter)
    assert whole.tables().scores.equals(again.tables().scores)
    single = run(small(**fields, engine="reference", out=tmp_path / "single"))
    last = [
        load_checkpoint(tmp_path / run_, config.experiment())[0].params
        for run_, config in {"whole": small(**fields), "single": small(**fields, engine="reference")}.items()
    ]
    for tensor in last[0]:
        torch.testing.assert_close(last[0][tensor], last[1][tensor], rtol=1e-3, atol=1e-4)
    assert single.facts["trained_parameters"] == whole.facts["trained_parameters"] > 0


def test_a_frozen_clip_lies_where_it_was_put():
    clip = Clip(find_weights(*EMBEDDED))
    frozen = clip.frozen()
    other = Clip(frozen.weights, "cpu", frozen.state)
    texts = ["a picture of a cat", "a picture of a bus"]
    assert np.array_equal(clip.encode_texts(texts), other.encode_texts(texts))
    matrix = dict(other.model.named_parameters())["token_embedding.weight"]
    assert matrix.data_ptr() == frozen.state["token_embedding.weight"].__array_interface__["data"][0]


def where_it_lies(frozen):
    """How many of the parameters lie in memory that is shared, and how many there are."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if "/dev/shm" in line or "plasma" in line]
    places = [tensor.data_ptr() for tensor in Clip(frozen.weights, "cpu", frozen.state).model.parameters()]
    shared = [any(int(a, 16) <= place < int(b, 16) for a, b in ends) for place in places]
    return sum(shared), len(places)


@pytest.mark.ray
def test_workers_use_the_one_frozen_clip_of_their_machine(cluster):
    cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker can import a test
    ref = cluster.put(Clip(find_weights(*EMBEDDED)).frozen())
    shared, everything = cluster.get(cluster.remote(where_it_lies).remote(ref))
    assert shared == everything > 200


def test_what_a_killed_run_left_of_features_is_not_taken_for_pixels(small, tmp_path):
    def interrupt(event):
        if event.stage == "encoding features":
            raise KeyboardInterrupt

    kept = []
    for killed_before in (False, True):
        cache = tmp_path / f"cache-{killed_before}"
        if killed_before:
            with pytest.raises(KeyboardInterrupt):
                run(small(method="probe", augment=1, cache_dir=cache, out=tmp_path / "killed"), interrupt)
            assert list(cache.glob("*.features-0-*.npy"))
        method = {"name": "finetune", "towers": "image"}
        run(small(method=method, rounds=0, cache_dir=cache, out=tmp_path / str(killed_before)))
        kept += [file.read_bytes() for file in cache.glob("*.pixels-0.npy")]
    assert len(kept) == 2 and kept[0] == kept[1]


def test_kept_pixels_give_the_features_of_the_images_to_the_bit(pictures):
    images = parse("dataset", "folder").load(pictures)
    clip = Clip(find_weights(*EMBEDDED))
    opened = [images.open(row) for row in range(4)]
    assert np.array_equal(clip.encode_images(opened), clip.encode_pixels(clip.pixels(opened)))
    views = clip.pixels(opened, [5, 6, 7, 8])
    assert np.array_equal(views, clip.pixels(opened, [5, 6, 7, 8]))
    assert not np.array_equal(views, clip.pixels(opened, [5, 6, 7, 9]))
    assert views.dtype == np.uint8 and views.shape == (4, 3, 160, 160)


def test_augmented_views_train_and_never_judge(small, tmp_path):
    probe = {"method": {"name": "probe", "lr": 1e-2}}
    plain = run(small(**probe, out=tmp_path / "plain"))
    augmented = run(small(**probe, augment=2, out=tmp_path / "augmented"))
    assert plain.facts["augment"] == 0 and augmented.facts["augment"] == 2
    assert (
        augmented.counts[0].scores.tolist() == plain.counts[0].scores.tolist()
    )  # before training: the same rows, as they are
    assert not torch.equal(plain.adapter["weight"], augmented.adapter["weight"])
    pixels = run(small(method={"name": "finetune", "towers": "image"}, augment=1, rounds=1, out=tmp_path / "pixels"))
    assert pixels.facts["reads"] == "image pixels, text features"


def test_bytes_are_those_of_the_tensors_that_travel(small):
    report = run(small(method={"name": "promptfl", "length": 4}, rounds=1))
    row = report.tables().rounds.iloc[0]
    assert row.bytes_up == row.bytes_down == 2 * 4 * 128 * 4  # clients x tokens x width x bytes
    assert report.facts["trained_parameters"] == 4 * 128


@pytest.mark.parametrize("method", ["finetune", "promptfl", "fedotp"])
def test_features_of_ones_own_cannot_go_through_a_tower(method, config):
    with pytest.raises(
        InputError, match=rf"method {method} needs CLIP's towers \(.*\) and therefore images; features provides"
    ):
        run(config(method=method))


def test_a_tower_without_patch_tokens_is_named(small):
    with pytest.raises(
        InputError, match=r"needs patch tokens, and tiny's image tower \(EfficientNet\) has none; use a ViT"
    ):
        run(small(method="fedotp"))


@pytest.mark.parametrize(
    "tower, method",
    [
        ("vit", "plot"),
        ("vit", "finetune"),
        ("vit", "fedotp"),
        ("vit", "trip"),
        ("vit", {"name": "lora", "towers": "both"}),
        ("resnet", "finetune"),
        ("resnet", {"name": "lora", "towers": "image"}),
        ("resnet", "promptfl"),
    ],
)
def test_the_towers_of_vits_and_of_resnets_are_trained_through(tower, method, small, small_clip, tmp_path):
    clip = dict(zip(("backbone", "pretrained"), small_clip("towers", tower).values(), strict=True))
    ours = small(**clip, method=method, rounds=1)
    report = run(ours)
    state, _ = load_checkpoint(ours.folder(), ours.experiment())
    assert report.last_round == 1
    assert all(tensor.isfinite().all() for tensor in state.params.values())
    trained = run(small(**clip, method=method, rounds=0, out=tmp_path / "none")).adapter
    assert any(not torch.equal(trained[name], state.params[name]) for name in trained)


def test_what_is_too_large_for_an_actors_share_of_a_gpu_is_said_in_one_sentence():
    # torch raises the same error on a GPU; no device is needed to see what becomes of it.
    from fedsim.cluster.worker import WorkerSlot

    slot = WorkerSlot(0.25)
    with pytest.raises(InputError, match=r"does not fit into the 0\.25 of a GPU that an actor has; take a larger"):
        slot.call(1, lambda: (_Greedy,), "take")


class _Greedy:
    def __init__(self, device):
        pass

    def take(self):
        raise torch.OutOfMemoryError

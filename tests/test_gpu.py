"""On a CUDA GPU: the same bits run to run and for any number of actors, and the CPU's numbers in float64."""

import numpy as np
import pytest
import torch

from fedsim import Config, InputError, available, run
from fedsim.params import flatten
from fedsim.prepare import prepare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")

FILES = "scores.parquet", "adapter.safetensors"
LORA = {"name": "lora", "rank": 2}
OPTIONS = {"fedper": {"prefix": "attention.2"}, "fedbuff": {"concurrency": 4, "buffer": 2}}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Makes a Config on the embedded drawings, on half a GPU in this process; all share one cache."""
    cache = tmp_path_factory.mktemp("cache")

    def make(folder, **fields):
        quick = {"actors": 0, "gpus_per_actor": 0.5, "rounds": 2, "held_out": ("ink",), "shots": 2, "seed": 1}
        quick["dataset"] = {"name": "glyphs", "domain_groups": True}
        return Config(**(quick | {"cache_dir": cache, "out": folder} | fields))

    return make


@pytest.fixture
def vit(small_clip):
    """A small vision transformer of random weights, for methods that read patch tokens too."""
    made = small_clip("gpu", "vit")
    return {"backbone": made["model"], "pretrained": made["pretrained"]}


def files(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def twice(make, folder, **fields):
    """The files of two runs of one experiment."""
    for name in ("one", "two"):
        run(make(folder / name, **fields))
    return files(folder / "one"), files(folder / "two")


@pytest.mark.parametrize("name", available("method"))
def test_every_method_gives_the_same_bits_again(name, small, vit, tmp_path):
    one, two = twice(small, tmp_path, method=name, chunk=3, **vit)  # the three clients are a stack
    assert one == two


@pytest.mark.parametrize("method", ["fedotp", {"name": "lora", "towers": "both"}, "finetune"], ids=str)
def test_towers_in_bf16_give_the_same_bits_again(method, small, vit, tmp_path):
    one, two = twice(small, tmp_path, method=method, precision="bf16", **vit)
    assert one == two


@pytest.mark.parametrize("name", available("server"))
def test_every_server_rule_gives_the_same_bits_again(name, small, vit, tmp_path):
    fields = {"partition": "iid", "clients": 12, "fleet": "lognormal"} | vit
    fields |= first_that_fits(name, small, tmp_path, **vit)
    one, two = twice(small, tmp_path, **fields)
    assert one == two


def first_that_fits(name, make, folder, **fields):
    """A method that the rule can train: rules for low-rank pairs, for sgd and for modules with a head refuse others."""
    server = {"name": name} | OPTIONS.get(name, {})
    for method in (
        "probe",
        {"name": "probe", "optimizer": "sgd"},
        LORA,
        "fedclip",
        "promptfl",
        "fedmp",
        "adapt",
        "capt",
        "sgpt",
        "plan",
    ):
        try:
            common = {"clients": 12, "partition": "iid", "fleet": "lognormal"} | fields
            prepare(make(folder / "none", server=server, method=method, **common))
        except InputError:
            continue
        return {"server": server, "method": method}
    raise AssertionError(f"{name} trains none of these methods")


@pytest.mark.parametrize("name", [name for name in available("method") if name != "zero_shot"])
def test_every_method_trains_as_on_the_cpu(name, small, vit, tmp_path):
    """Two rounds in float64 on the same features: only the order of sums differs."""
    fields = {"method": name, "dtype": "float64", "chunk": 3} | vit
    gpu = run(small(tmp_path / "gpu", **fields))
    cpu = run(small(tmp_path / "cpu", **fields, gpus_per_actor=None))
    ours, theirs = flatten(gpu.adapter), flatten(cpu.adapter)
    # Class embeddings are float32, of the device that computed them first; both runs read the same ones.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert abs(gpu.summary()["personalization"] - cpu.summary()["personalization"]) < 0.02


@pytest.mark.ray
@pytest.mark.parametrize("name", ["fedclip", "promptfl", "lora"])
def test_actors_that_share_a_gpu_give_the_bits_of_one_process(name, small, tmp_path):
    pytest.importorskip("ray")
    fields = {"method": name, "partition": "iid", "clients": 8}
    run(small(tmp_path / "here", **fields))
    run(small(tmp_path / "actors", **fields, actors=2))
    assert files(tmp_path / "here") == files(tmp_path / "actors")


def test_an_actor_that_takes_more_than_its_share_is_one_sentence(small, tmp_path):
    fields = {"method": "finetune", "gpus_per_actor": 0.001}
    with pytest.raises(InputError, match=r"does not fit into the 0\.001 of a GPU"):
        run(small(tmp_path / "run", **fields))

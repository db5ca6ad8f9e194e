"""Small real data that several tests train on."""

import gc
import json
import os
import secrets
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

DOMAINS = "ink", "oil", "photo"
CLASSES = "cat", "dog", "owl", "pig"
WIDTH = 24


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real PACS pictures and features, where the machine has them."""
    path = Path(os.environ.get("FEDSIM_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no real PACS data here: set FEDSIM_SHARED_DATA to a folder with pacs_mini and pacs_conse")
    return path


@pytest.fixture(scope="session")
def features_dir(tmp_path_factory) -> Path:
    """Features of 3 domains x 4 classes, 30 rows each: class embeddings, a shift per domain, and noise."""
    rng = np.random.default_rng(7)
    class_embeddings = rng.standard_normal((len(CLASSES), WIDTH))
    shifts = rng.standard_normal((len(DOMAINS), WIDTH))
    rows = [
        {
            "feature": class_embeddings[c] + shifts[d] + 1.5 * rng.standard_normal(WIDTH),
            "label": CLASSES[c],
            "domain": name,
        }
        for d, name in enumerate(DOMAINS)
        for c in range(len(CLASSES))
        for _ in range(30)
    ]
    folder = tmp_path_factory.mktemp("features")
    pd.DataFrame(rows).to_parquet(folder / "features.parquet")
    pd.DataFrame({"class": CLASSES, "prototype": list(class_embeddings)}).to_parquet(folder / "classes.parquet")
    return folder


# Ray reads this once, when it is imported: every cluster of the tests is then open to the tests alone.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Nor is uv to install the project once more for the actors of clusters that the tests themselves start.
os.environ |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# Nor are metrics collected that no test reads: they take a sixth of the CPU time of an idle cluster. The clusters of
# tests/test_cluster.py are as their files say.
os.environ |= {"RAY_enable_metrics_collection": "0", "RAY_event_stats": "0"}


# The files whose tests of Ray share a process: those that kill processes and wait, and those of sweeps. All other tests
# of Ray share a third one.
RAY = {
    "ray-processes": ("test_cluster", "test_faults", "test_session", "test_watch"),
    "ray-sweeps": ("test_readme", "test_sweep"),
}
LONGEST = "ray-sweeps", "test_benchmarks", "ray-processes", "ray"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items) -> None:
    """Files run in parallel, each in one process; tests of Ray in three, since much of their time is spent waiting.

    The longest groups come first, then those with most tests, so that all processes end at about the same time.
    """
    for item in items:
        group = item.path.stem
        if item.get_closest_marker("ray"):
            group = next((name for name, files in RAY.items() if group in files), "ray")
        item.add_marker(pytest.mark.xdist_group(group))
    sizes = Counter(map(group_of, items))
    order = [*LONGEST, *(group for group, _ in sizes.most_common() if group not in LONGEST)]
    items.sort(key=lambda item: order.index(group_of(item)))


def group_of(item) -> str:
    return item.get_closest_marker("xdist_group").args[0]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collects tests without looking for garbage among hundreds of thousands of objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """torch's second thread spins while it waits for the first, on a CPU that another test could use."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """A cache that only these tests use; one for all processes that run them.

    `.ci/run` gives one in which its first command has just encoded the embedded images.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["FEDSIM_CACHE_DIR"] = os.environ.get("FEDSIM_TEST_CACHE_DIR", str(shared / "cache"))


MACHINE = pytest.StashKey()


@pytest.fixture(scope="module")
def machine(pytestconfig):
    """A cluster of one machine, for all tests of a group that need none of their own.

    It has 2 CPUs and no GPU, as far as Ray knows: the same everywhere. Modules of a group share it, since a start takes
    as much CPU time as minutes of waiting.
    """
    from ray.cluster_utils import Cluster
    from ray_start import QUIET, started

    if MACHINE not in pytestconfig.stash:
        quiet = {"num_cpus": 2} | QUIET
        pytestconfig.stash[MACHINE] = started(Cluster, initialize_head=True, head_node_args=quiet)
    return pytestconfig.stash[MACHINE]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Ends that cluster after its group, once its module has left it: a cluster uses CPU time even while it is idle."""
    try:
        return (yield)
    finally:
        last = nextitem is None or (group_of(nextitem) != group_of(item) and nextitem.path != item.path)
        if last and MACHINE in item.config.stash:
            cluster = item.config.stash[MACHINE]
            del item.config.stash[MACHINE]
            cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(machine):
    """Ray, joined to that cluster for the tests of a module, so that their runs need not each start one."""
    import ray

    from fedsim.cluster.private_cluster import QUIET

    ray.init(address=machine.address, **QUIET)
    yield ray
    ray.shutdown()


@pytest.fixture
def config(features_dir, tmp_path):
    """Makes a Config of a quick run on the small features, in this process and without a page."""
    from fedsim import Config

    def make(**fields):
        quick = {"dataset": "features", "data_dir": features_dir, "held_out": ("ink",), "rounds": 3, "actors": 0}
        quick |= {"page": False}
        return Config(**(quick | {"out": tmp_path / "run"} | fields))

    return make


TOWERS = {
    "vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
}


@pytest.fixture
def small_clip(tmp_path):
    """Makes the file of a small CLIP of random weights, whose architecture open_clip knows in this process alone."""
    import open_clip
    import torch

    def make(name, tower):
        text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        about = {"embed_dim": 8, "vision_cfg": {"image_size": 32, **TOWERS[tower]}, "text_cfg": text}
        file, weights = tmp_path / f"{name}-{tower}.json", tmp_path / f"{name}-{tower}.pt"
        file.write_text(json.dumps(about))
        open_clip.add_model_config(file)
        torch.manual_seed(0)
        torch.save(open_clip.create_model(file.stem).state_dict(), weights)
        return {"model": file.stem, "pretrained": str(weights)}

    return make


def run_until(round, config):
    """A run that ends as by Ctrl-C, once this round has been reported."""
    from fedsim import run

    def interrupt(event):
        if event.stage == "training" and event.done == round:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, interrupt)

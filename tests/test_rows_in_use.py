"""Of a large data set of which clients have few rows, only these rows are encoded."""

import numpy as np
import pytest

from fedsim import Config, InputError, run
from fedsim.clip.checkpoints import find_weights
from fedsim.cluster.placement import Sizing
from fedsim.data import rows_to_encode
from fedsim.datasets.glyphs import Glyphs
from fedsim.encoding import BLOCK, encode, feature_file
from fedsim.prepare import encode_experiment, prepare, sizing_of
from fedsim.simulate import simulate

DOMAINS, EACH = ("clipart", "ink"), 8


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """8 drawings of each class in each of two domains."""
    images, folder = Glyphs().load(None), tmp_path_factory.mktemp("drawings")
    for domain, name in enumerate(DOMAINS):
        for label, word in enumerate(images.classes):
            (folder / name / word).mkdir(parents=True)
            for row in np.flatnonzero((images.domain == domain) & (images.y == label))[:EACH]:
                images.open(row).save(folder / name / word / f"{row}.png")
    return folder


@pytest.fixture
def weights(small_clip):
    """A small vision transformer of random weights, which has patch tokens, too."""
    return find_weights(*small_clip("few", "vit").values())


@pytest.fixture
def few(drawings, weights, tmp_path):
    """Makes a Config of a quick run in which the clients have about a third of the drawings."""

    def make(**fields):
        quick = {"backbone": weights.model, "pretrained": weights.pretrained}
        quick |= {
            "dataset": "folder",
            "data_dir": drawings,
            "rounds": 2,
            "actors": 0,
            "page": False,
            "shots": 1,
            "train_share": 0.8,
        }
        return Config(**(quick | {"cache_dir": tmp_path / "cache", "out": tmp_path / "run"} | fields))

    return make


def encoded_images(events):
    return max((event.total for event in events if event.stage == "encoding images"), default=0)


def in_use(config):
    experiment = prepare(config)
    return experiment, rows_to_encode(experiment.data.source, experiment.clients)


def same_counts(first, second):
    assert first.counts.keys() == second.counts.keys()
    for one, other in zip(first.counts.values(), second.counts.values(), strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one.flat(), other.flat(), strict=True))


def test_only_the_rows_that_clients_have_are_encoded_and_the_scores_are_those_of_all_rows(few, tmp_path):
    events = []
    experiment, rows = in_use(few())
    report = run(few(), events.append)
    owned = [part for client in experiment.clients for part in (client.train, client.val, client.test)]
    assert rows.tolist() == sorted(set(np.concatenate(owned).tolist()))
    assert encoded_images(events) == len(rows) <= len(experiment.data.source) / 2
    everything = prepare(few(out=tmp_path / "all"))
    everything = encode_experiment(everything, sizing_of(everything.config), events.append, all_rows=True)
    assert encoded_images(events) == len(experiment.data.source)
    same_counts(report, simulate(everything, lambda event: None))


def test_encoded_rows_are_found_again_by_another_method_and_by_a_resumed_run(few, tmp_path):
    run(few())
    events = []
    run(few(method="probe", seed=1, out=tmp_path / "probe"), events.append)
    assert len(run(few(rounds=3), events.append).rounds) == 3
    assert not encoded_images(events)


def test_other_shots_are_other_rows(few, tmp_path):
    run(few())
    events, (_, rows) = [], in_use(few(shots=2, out=tmp_path / "two"))
    run(few(shots=2, out=tmp_path / "two"), events.append)
    assert encoded_images(events) == len(rows)


def test_all_rows_are_encoded_where_clients_have_most_of_them(few, weights):
    config = few(shots=None, train_share=0.6)
    experiment, rows = in_use(config)
    assert rows is None
    run(config)
    assert feature_file(experiment.data.source, weights, config.cache_dir).exists()


def test_clients_that_are_drawn_on_demand_may_have_any_row(few):
    partition = {"name": "bootstrap", "rows": 10}
    assert in_use(few(partition=partition, clients=3, shots=None, train_share=0.6))[1] is None


def test_representations_of_some_rows_are_those_of_all_rows_to_the_bit(weights, tmp_path):
    images = Glyphs().load(None).take(np.arange(3 * BLOCK))
    rows = np.sort(np.random.default_rng(0).permutation(len(images))[: BLOCK + 5])
    names, arguments = ["features", "tokens", "pixels"], (Sizing(actors=0), lambda event: None)
    whole, some = (
        encode(images, weights, ("a {}",), tmp_path / str(part is None), *arguments, names, 1, part).representations
        for part in (None, rows)
    )
    for name in names:
        for view in (0, 1):
            views = np.full(len(rows), view)
            assert np.array_equal(some.read(name, rows, views), whole.read(name, rows, views)), (name, view)
    assert some.features.shape == (len(rows), 8) and len(some.positions) == len(images)
    missing = np.setdiff1d(np.arange(len(images)), rows)[:1]
    with pytest.raises(RuntimeError, match=f"row {missing[0]} was not encoded"):
        some.read("features", missing)


def test_only_images_in_use_need_to_be_readable(few, drawings, tmp_path):
    experiment, rows = in_use(few())
    files, others = experiment.data.source.files, np.setdiff1d(np.arange(len(experiment.data.source)), rows)
    unused, used = files[others[0]], files[rows[0]]
    contents = {file: file.read_bytes() for file in (unused, used)}
    try:
        unused.write_bytes(b"not an image")
        run(few())
        used.write_bytes(b"not an image")
        with pytest.raises(InputError, match=rf"{used.name} cannot be read \(no known image format\); --skip-unread"):
            prepare(few(out=tmp_path / "other"))
        used.write_bytes(contents[used])
        with pytest.raises(InputError, match=f"{unused.name} cannot be read"):
            prepare(few(out=tmp_path / "other", shots=None, train_share=0.6))
    finally:
        for file, content in contents.items():
            file.write_bytes(content)


def test_of_rows_with_scrambled_labels_the_images_that_they_show_are_encoded(few):
    config = few(partition={"name": "domain_dirichlet", "min_rows": 2, "scramble_labels": True}, clients=4)
    experiment, rows = in_use(config)
    clients = experiment.clients
    owned = np.concatenate([part for client in clients for part in (client.train, client.val, client.test)])
    assert rows.tolist() == np.unique(clients.images[owned]).tolist() != np.unique(owned).tolist()
    some = encode_experiment(experiment, sizing_of(config), lambda event: None)
    # Encoded twice, as the base of a sweep is: the images are exchanged once.
    some = encode_experiment(some, sizing_of(config), lambda event: None)
    everything = encode_experiment(experiment, sizing_of(config), lambda event: None, all_rows=True).encoded.source
    shown = some.source.representations.read("features", owned)
    assert np.array_equal(shown, everything.representations.read("features", clients.images[owned]))
    assert np.array_equal(some.source.y[owned], everything.y[owned])

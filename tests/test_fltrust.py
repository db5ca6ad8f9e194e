"""FLTrust against a few lines of numpy, and the server's own training."""

import numpy as np
import pytest
import torch
from conftest import run_until
from test_attacks import FIELDS, SGD, gradient
from test_robust import RNG, a_round, draw

from fedsim import InputError, component, run
from fedsim.params import flatten
from fedsim.prepare import prepare
from fedsim.registry import parse
from fedsim.servers.fltrust import FLTrust
from fedsim.training.root import root_rows


def step_of(each, root, **fields):
    total = a_round(each, **fields)
    object.__setattr__(total, "root", np.asarray(root, np.float64))
    params = {"w": torch.zeros(len(root), dtype=torch.float64)}
    return flatten(parse("server", "fltrust").step(params, {}, total, RNG)[0])


def test_a_step_is_the_mean_of_deltas_of_the_server_s_length_by_their_cosine_with_its_own():
    each, root = draw(), draw(1, seed=3)[0].astype(np.float64)
    lengths = np.linalg.norm(each.astype(np.float64), axis=1)
    trust = np.maximum(each @ root / (lengths * np.linalg.norm(root)), 0)
    assert 0 < (trust > 0).sum() < 11
    expected = sum(t * np.linalg.norm(root) / n * d for t, n, d in zip(trust, lengths, each, strict=True)) / trust.sum()
    np.testing.assert_allclose(step_of(each, root), expected, rtol=1e-6)


def test_lengths_do_not_count_and_opposite_deltas_never_do():
    each, root = np.abs(draw(5)), np.abs(draw(1, seed=3)[0])
    plain = step_of(each, root)
    np.testing.assert_allclose(step_of(each * np.array([1, 10, 1e3, 0.1, 1])[:, None], root), plain, rtol=1e-5)
    np.testing.assert_allclose(step_of(np.concatenate([each, -1e6 * each]), root), plain, rtol=1e-12)
    np.testing.assert_allclose(step_of(np.tile(root, (4, 1)), root), root, rtol=1e-6)
    assert (step_of(-each, root) == 0).all() and (step_of(each, 0 * root) == 0).all()
    assert (step_of(each, root, steps=[0] * 5) == 0).all() and (step_of(0 * each, root) == 0).all()


@component
class Watched(FLTrust):
    """Shows what the server has trained."""

    def step(self, params, slots, total, rng):
        seen.append(total.require_root())
        return super().step(params, slots, total, rng)


seen: list = []


def test_the_server_trains_on_copies_of_train_rows_as_a_client_would(config):
    seen.clear()
    ours = config(**FIELDS, server=Watched(root_rows=50))
    run(ours)
    experiment = prepare(ours)
    rows, source = root_rows(ours.server, experiment.clients, ours.seed), experiment.data.source
    trained = np.concatenate([experiment.clients[client].train for client in range(6)])
    assert len(set(rows)) == 50 and set(rows) <= set(trained) and sorted(rows) == rows.tolist()
    x = torch.tensor(source.representations.features[rows], dtype=torch.float64)
    expected = -0.1 * gradient(ours, x, torch.tensor(source.y[rows]))
    np.testing.assert_allclose(seen[0], expected, rtol=0, atol=1e-6)  # features are float32


def test_in_a_run_chunks_the_readable_path_and_an_interruption_give_the_same(config, tmp_path):
    fields = FIELDS | {"rounds": 3, "server": "fltrust", "codec": "int8", "attack": {"name": "noise", "share": 0.5}}
    whole = run(config(**fields))
    run_until(2, config(**fields, out=tmp_path / "resumed"))
    resumed = run(config(**fields, out=tmp_path / "resumed"))
    assert (flatten(whole.adapter) == flatten(resumed.adapter)).all()
    for index, other in enumerate([{"chunk": 1}, {"engine": "reference"}]):
        another = run(config(**fields, **other, out=tmp_path / f"{index}"))
        np.testing.assert_allclose(flatten(another.adapter), flatten(whole.adapter), rtol=0, atol=1e-8)


def test_a_majority_that_flips_signs_ruins_the_mean_and_not_fltrust(config, tmp_path):
    fields = FIELDS | {"rounds": 10, "attack": {"name": "sign_flip", "share": 0.5, "scale": 10.0}}
    mean, trusted = (run(config(**fields, server=name, out=tmp_path / name)) for name in ("fedavg", "fltrust"))
    assert mean.summary(round=10)["pooled"] < 0.3 < 0.6 < trusted.summary(round=10)["pooled"]


def test_private_tensors_and_moments_of_the_server_are_not_stored(config):
    ours = config(**(FIELDS | {"rounds": 2, "method": SGD | {"persist_optimizer": True}}), server="fltrust")
    run(ours)
    files = [file.name for file in (ours.folder() / "private").iterdir()]
    assert len(files) == 6 and not any("--1-" in name for name in files)


def test_more_rows_than_there_are_are_refused(config):
    with pytest.raises(InputError, match=r"server.root_rows of 5000 from 144 train rows; it can be at most 144"):
        prepare(config(**FIELDS, server={"name": "fltrust", "root_rows": 5000}))
    with pytest.raises(InputError, match="server fltrust has copies of clients' train rows, which needs a partition"):
        prepare(config(**(FIELDS | {"partition": "bootstrap"}), server="fltrust"))


def test_fewer_rows_than_a_step_needs_are_refused(config):
    with pytest.raises(InputError, match=r"root_rows must be 2 or more with method fedclip, got 1: the server could"):
        prepare(config(**(FIELDS | {"method": "fedclip"}), server={"name": "fltrust", "root_rows": 1}))

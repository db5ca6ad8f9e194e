"""The components that docs/extending.md shows train as they stand."""

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedsim import Attack, Codec, Config, InputError, Method, Privacy, Server, run
from fedsim.methods._local_training import LocalTraining
from fedsim.training.client_store import PrivateStore

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text("utf-8")
SHOWN = re.findall(r"`fedsim/(\w+)s/(\w+)\.py`:\n\n```python\n(.*?)```", TEXT, re.DOTALL)


def test_all_hooks_are_listed():
    listed = set(re.findall(r"`(\w+)`", TEXT.partition("## All hooks")[2]))
    for cls in (LocalTraining, Method, Server, Codec, Attack, Privacy):
        hooks = {name for name in vars(cls) if name[0] != "_"} - {field.name for field in fields(cls)}
        assert hooks - listed - {"reject_booleans_for_numbers"} == set()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of noise in two domains, named as the data set of the document expects."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for domain, size in ("fine", 16), ("coarse", 4):
        for label, colour in ("red", 0), ("blue", 2):
            for number in range(12):
                pixels = rng.integers(0, 90, (size, size, 3), np.uint8)
                pixels[..., colour] += 120
                image = Image.fromarray(pixels).resize((48, 48))
                image.save(folder / f"{domain}-{label}-{number:02}.jpg")
    return folder


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Imports a component of the document, saved as a module of its own."""
    monkeypatch.syspath_prepend(tmp_path)

    def component(kind, name, code):
        (tmp_path / f"shown_{name}.py").write_text(code)
        module = import_module(f"shown_{name}")
        own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        (cls,) = (value for key, value in own.items() if key[0].isupper())
        return cls()

    return component


def test_every_block_of_code_is_a_component_with_its_place():
    assert len(SHOWN) == TEXT.count("```python")
    assert {kind for kind, *_ in SHOWN} >= {"method", "partition", "dataset", "fleet"}


@pytest.fixture
def trained(shown, pictures, tmp_path):
    """Runs one round with a component of the document, or with another change."""
    code_of = {name: (kind, code) for kind, name, code in SHOWN}

    def run_with(name, out="run", **fields):
        few = {"data_dir": pictures, "held_out": ("fine",), "rounds": 1, "actors": 0, "page": False}
        few |= {"out": tmp_path / out, "partition": "iid", "clients": 3, "dataset": shown(*_named("flat", code_of))}
        kind, *_ = _named(name, code_of)
        return run(Config(**(few | {kind: shown(*_named(name, code_of))} | fields)))

    return run_with


def _named(name, code_of):
    kind, code = code_of[name]
    return kind, name, code


@pytest.mark.parametrize(("name", "private"), [("own_bias", "bias"), ("own_prompt", "own")])
def test_only_what_is_shared_travels(name, private, trained, tmp_path):
    report = trained(name)
    shared = sum(tensor.numel() for key, tensor in report.adapter.items() if key != private)
    assert report.tables().rounds.bytes_up.tolist() == [3 * 4 * shared]
    for client in range(3):
        assert PrivateStore(tmp_path / "run" / "private").read(client, 1).keys() == {private}


def test_the_shares_are_those_of_all_train_rows(trained):
    report = trained("shares", partition={"name": "dirichlet", "min_rows": 4})
    train = report.tables().partition.query("split == 'train'").groupby("label").rows.sum()
    rows = torch.tensor([train[label] + 1.0 for label in report.tables().classes], dtype=torch.float64)
    torch.testing.assert_close(report.adapter["shift"].double(), (rows / rows.sum()).log(), rtol=1e-6, atol=0)


def test_predictions_for_target_rows_become_more_confident(trained, shown):
    method = type(shown(*next(part for part in SHOWN if part[1] == "confident")))
    confidence = []
    for weight in (0.0, 10.0):
        table = trained("flat", f"{weight}", method=method(weight=weight, lr=3e-4)).tables().trained.calibration
        confidence.append(table.query("round == 1 and group == 'held_out'").confidence.sum())
    assert confidence[1] > confidence[0] > 0


def test_an_update_is_sent_in_multiples_of_a_step(trained):
    method = {"name": "probe", "optimizer": "sgd", "lr": 0.1}
    plain, coarse = trained("flat", "plain", method=method), trained("steps", method=method)
    assert 2 * coarse.tables().rounds.bytes_up.sum() == plain.tables().rounds.bytes_up.sum()
    for name, tensor in plain.adapter.items():
        assert 0 < (coarse.adapter[name] - tensor).abs().max() < 1e-5


def test_a_client_that_sends_nothing_new_shortens_the_step(trained):
    fields = {"method": {"name": "probe", "optimizer": "sgd", "lr": 0.1}, "clients": 5}
    runs = (
        trained("flat", "start", **fields, rounds=0),
        trained("flat", "plain", **fields),
        trained("silence", **fields),
    )
    start, plain, silent = (next(iter(report.adapter.values())) for report in runs)
    assert 0 < (silent - start).norm() < (plain - start).norm()


def test_a_client_takes_steps_on_twice_its_rows(trained):
    method = {"name": "probe", "batch_size": 2}
    plain, noisy = trained("flat", "plain", method=method), trained("noisy")
    assert noisy.tables().rounds.steps.sum() == 3  # at most 32 rows each
    assert plain.tables().rounds.steps.sum() == 3 * 2  # 4 rows each


def test_the_last_direction_travels_down_and_is_added_to_gradients(trained):
    method = {"name": "probe", "optimizer": "sgd", "lr": 0.01, "local_epochs": 2}
    guided, fedavg = (
        trained(*each, method=method, rounds=2).tables().rounds for each in (("guided",), ("flat", "fedavg"))
    )
    assert (guided.bytes_down == 2 * guided.bytes_up).all()
    assert (guided.loss == fedavg.loss).tolist() == [True, False]


def test_the_mean_of_the_last_two_models_is_evaluated(trained):
    method = {"name": "probe", "optimizer": "sgd", "lr": 0.1}
    first, second = (trained("flat", f"{rounds}", method=method, rounds=rounds).adapter for rounds in (1, 2))
    midway = trained("midway", method=method, rounds=2).adapter
    torch.testing.assert_close(midway["weight"], (first["weight"] + second["weight"]) / 2)


def test_each_client_starts_from_its_own_model(trained, tmp_path):
    # The second round has no step size, so it ends with what the clients were sent.
    method = {"name": "probe", "lr": 0.01, "schedule": "step", "decay_rounds": 1, "lr_decay": 1e-30}
    for rounds in (1, 2):
        trained("nearest", f"{rounds}", method=method, rounds=rounds)
    stores = [PrivateStore(tmp_path / f"{rounds}" / "private") for rounds in (1, 2)]
    sent, received = ([store.read(client, k + 1)["weight"] for client in range(3)] for k, store in enumerate(stores))
    for own, start in zip(sent, received, strict=True):
        nearest = min((other for other in sent if other is not own), key=lambda other: (other - own).norm())
        torch.testing.assert_close(start, (own + nearest) / 2)


def test_counts_of_a_client_change_what_it_learns(trained):
    fields = {"partition": {"name": "dirichlet", "min_rows": 4}}
    balanced = trained("balanced", **fields)
    probe = trained("flat", "probe", method={"name": "probe", "schedule": "cosine", "clip_norm": 1.0}, **fields)
    assert not torch.equal(balanced.adapter["weight"], probe.adapter["weight"])


def test_a_vector_is_learned_for_each_block(trained, small_clip):
    clip = small_clip("extending", "vit")
    report = trained("shifted", backbone=clip["model"], pretrained=clip["pretrained"])
    shifts = report.adapter["shifts"]
    assert shifts.shape == (2, 32) and (shifts.abs().amax(dim=1) > 0).all()


def test_rows_fall_from_client_to_client(trained):
    table = trained("unequal").tables().partition
    rows = table[table.client < 3].groupby("client").rows.sum().tolist()
    assert rows == [10, 6, 5]  # of 11, 8 and 5, cut 60/20/20 without remainders


def test_the_names_of_files_are_read(trained):
    tables = trained("flat").tables()
    assert (tables.classes, tables.domains) == (["blue", "red"], ["coarse", "fine"])
    held_out = tables.partition[tables.partition.domain == "fine"]
    assert held_out.rows.tolist() == [12, 12] and tables.held_out == ["fine"]


def test_a_missing_file_is_said(trained, tmp_path):
    with pytest.raises(
        InputError, match=r"flat needs files named DOMAIN-CLASS-NUMBER\.jpg in --data-dir, and .* has none"
    ):
        trained("flat", data_dir=tmp_path)


def test_slow_devices_take_ten_times_as_long(trained, shown):
    fleet = type(shown(*next(part for part in SHOWN if part[1] == "two_speeds")))
    slow, fast = (trained("flat", f"{share}", fleet=fleet(slow=share)) for share in (1.0, 0.0))
    times = [report.tables().rounds.clock_s.item() for report in (slow, fast)]
    assert times[0] == pytest.approx(10 * times[1])

"""A user's files are never touched, damaged files are never believed, and a run goes on from where it ended."""

import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import run_until
from PIL import Image
from test_bits import result

from fedsim import InputError, __version__, run
from fedsim.__main__ import main
from fedsim.checkpoint import HISTORY, NAME, load_checkpoint
from fedsim.cluster.pool import open_pool
from fedsim.config import Config
from fedsim.files import write_text
from fedsim.folder import CONFIG, FORMAT, GENERATOR, MARK, claim, safe_name, write_sealed
from fedsim.prepare import encode_experiment, prepare, sizing_of
from fedsim.reporting.compare import compare
from fedsim.reporting.parquet import FACTS
from fedsim.reporting.tables import COLUMNS
from fedsim.simulate import rounds
from fedsim.training.client_store import PrivateStore

SLOW = {"name": "lognormal", "availability": 0.8, "dropout": 0.1}


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def flags(features_dir):
    return ["--dataset=features", f"--data-dir={features_dir}", "--held-out=ink", "--rounds=1", "--actors=0"]


# Whose folder it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["report.html", "labels.parquet", "private/notes.txt", "config.yaml", "status.json", "run.log", ".lock"]
)
@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_folder_with_a_users_file_is_refused_and_nothing_in_it_changes(name, detach, flags, tmp_path, capsys):
    mine = tmp_path / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("rounds: 1\n")
    before = content(tmp_path)
    assert main(["run", *flags, f"--out={tmp_path / 'mine'}", *detach]) == 2
    assert capsys.readouterr().err == (
        f"fedsim: {tmp_path / 'mine'} is not empty and holds no run of this version of fedsim, but "
        f"{name.partition('/')[0]}; give another --out\n"
    )
    assert content(tmp_path) == before


def test_the_folder_of_the_data_is_refused(flags, features_dir, capsys):
    before = content(features_dir)
    assert main(["run", *flags, f"--out={features_dir}"]) == 2
    assert "but classes.parquet, features.parquet; give another --out" in capsys.readouterr().err
    assert content(features_dir) == before


@pytest.fixture
def image_dir(tmp_path):
    root = tmp_path / "images"
    for domain in ("ink", "oil"):
        for label in ("cat", "dog"):
            (root / domain / label).mkdir(parents=True)
            for k in range(5):
                Image.effect_noise((8, 8), 50 + k).save(root / domain / label / f"{k}.png")
    return root


def test_a_new_folder_inside_a_data_set_of_images_is_refused(image_dir, capsys, monkeypatch):
    monkeypatch.chdir(image_dir)
    for out in ([], ["--out=new"], [f"--out={image_dir / 'ink' / 'deep'}"]):
        assert main(["run", "--dataset=folder", "--data-dir=.", "--rounds=1", "--actors=0", *out]) == 2
        assert (
            "is inside --data-dir, where its files would pass for data; give another --out" in capsys.readouterr().err
        )
    assert sorted(path.name for path in image_dir.iterdir()) == ["ink", "oil"]


def test_what_is_inside_a_data_set_is_told_by_where_paths_lead(image_dir, tmp_path, monkeypatch):
    config = {"dataset": "folder", "rounds": 1, "actors": 0, "cache_dir": tmp_path / "cache"}
    monkeypatch.chdir(image_dir)
    prepare(Config(**config, data_dir=Path(), out=Path("../runs/a")))
    (tmp_path / "link").symlink_to(image_dir)
    with pytest.raises(InputError, match="is inside --data-dir"):
        prepare(Config(**config, data_dir=tmp_path / "link", out=image_dir / "runs"))


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_an_empty_out_is_refused_and_the_root_too(command, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, *flags, "--out="]) == 2
    assert "--out is empty; it expects a folder" in capsys.readouterr().err
    assert main([command, *flags, "--out", "/"]) == 2
    assert f"/ is not empty and holds no {command} of this version of fedsim" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_does_not_take_over_the_folder_of_a_sweep(flags, tmp_path, capsys):
    claim(tmp_path / "s1", "sweep")
    write_sealed(tmp_path / "s1" / "sweep.yaml", "trials: 1\n")
    write_text(tmp_path / "s1" / "status.json", "{}")
    before = content(tmp_path)
    assert main(["run", *flags, f"--out={tmp_path / 's1'}"]) == 2
    assert capsys.readouterr().err == f"fedsim: {tmp_path / 's1'} holds a sweep, not a run; give another --out\n"
    assert content(tmp_path) == before


def test_a_new_an_empty_and_a_marked_folder_are_taken_and_files_added_to_a_run_stay(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".gitignore").write_text("*")
    run(config(rounds=1, server="local_only", out=tmp_path / "empty"))
    (tmp_path / "empty" / "private" / "notes.txt").write_text("mine")
    run(config(rounds=2, server="local_only", out=tmp_path / "empty"))
    assert (tmp_path / "empty" / "private" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "empty" / ".gitignore").read_text() == "*"


def test_a_copy_of_a_run_without_hidden_files_goes_on_and_so_does_its_config_alone(config, tmp_path):
    ours = config(out=tmp_path / "run")
    run(ours)
    for kind, names in {"copy": [CONFIG, NAME, HISTORY], "alone": [CONFIG]}.items():
        (tmp_path / kind).mkdir()
        for name in names:
            (tmp_path / kind / name).write_bytes((ours.folder() / name).read_bytes())
        run(ours.model_copy(update={"out": tmp_path / kind}))
        assert result(tmp_path / kind) == result(ours.folder())
        assert (tmp_path / kind / MARK).exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CONFIG).write_bytes((ours.folder() / CONFIG).read_bytes())
    (tmp_path / "mine" / "report.html").write_text("mine")
    with pytest.raises(InputError, match=r"but report\.html; give another --out"):
        run(ours.model_copy(update={"out": tmp_path / "mine"}))


@pytest.mark.parametrize("domain", ["../../x", "a/b", "..", "n\0ul\n", "x" * 300, "ü" * 300, "\udcff", 'a"b:c|d'])
def test_whatever_a_domain_is_called_the_default_folder_is_one_new_component_below_runs(domain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Config(held_out=(domain, "ink"), dataset="features", data_dir=tmp_path).folder()
    assert len(folder.parts) == 2 and folder.parts[0] == "runs" and ".." not in folder.parts
    folder.mkdir(parents=True)
    assert [path.parent for path in tmp_path.rglob("*")] == [tmp_path, tmp_path / "runs"]


def test_ordinary_names_stay_in_the_name_of_a_folder():
    assert safe_name(["office_home", "Real World-Art", "", "été"], "0123") == "office_home-Real World-Art-été-0123"


def test_compare_replaces_its_own_page_and_no_other_file(config, tmp_path, capsys):
    ours = config(rounds=1)
    run(ours)
    (tmp_path / "compare.html").write_text("mine")
    assert main(["compare", str(ours.folder()), "--out", str(tmp_path)]) == 2
    message = f"fedsim: {tmp_path / 'compare.html'} is not a page of this version of fedsim; give another --out\n"
    assert capsys.readouterr().err == message
    assert (tmp_path / "compare.html").read_text() == "mine"
    _, page = compare([ours.folder()], tmp_path / "pages" / "compare.html")
    assert GENERATOR in page.read_bytes()
    compare([ours.folder()], page)


# Damage -----------------------------------------------------------------------------------------------------


def mutations(data: bytes, count: int):
    """Single bits and bytes over the whole file, its parts, and zeros."""
    for place in range(0, len(data), max(1, len(data) // count)):
        for flip in (1 << place % 8, 255):
            yield data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
    for share in (0, 0.3, 0.9):
        end = int(len(data) * share)
        yield data[:end]
        yield data[:end] + bytes(len(data) - end)
    yield data[: len(data) // 2] + b"\0" * 8 + data[len(data) // 2 :]


def refused_or_same(file: Path, read, count: int = 150) -> int:
    """Reads each mutation of a file; returns how many were refused."""
    whole, expected, refused = file.read_bytes(), read(), 0
    for data in mutations(whole, count):
        file.write_bytes(data)
        try:
            assert read() == expected, "another result, and not a word"
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(file) in str(error)
    file.write_bytes(whole)
    assert read() == expected
    return refused


def contents(report) -> tuple:
    tables = {name: getattr(report.tables(), name).to_csv() for name in COLUMNS}
    adapter = {name: tensor.numpy().tobytes() for name, tensor in report.adapter.items()}
    return tables, adapter, report.private.tobytes(), report.summary(), report.facts


@pytest.mark.parametrize("name", [NAME, HISTORY])
def test_a_damaged_checkpoint_or_history_is_refused_and_never_believed(name, config):
    ours = config(server="local_only", clients=4, rounds=2)
    run(ours)
    refused = refused_or_same(
        ours.folder() / name, lambda: contents(load_checkpoint(ours.folder(), ours.experiment())[1]), 40
    )
    assert refused > 40


def test_a_damaged_config_of_a_run_is_refused(config):
    ours = config(rounds=1)
    run(ours)
    assert refused_or_same(ours.folder() / CONFIG, lambda: prepare(ours).done.summary(), 60) > 60


def test_a_damaged_private_file_is_refused_and_so_is_that_of_another_client(tmp_path):
    store = PrivateStore(tmp_path / "private")
    for client in (3, 4):
        store.write(client, 7, {"w": torch.arange(12.0) + client, "gate.bias": torch.ones(2, 3)})
    file, other = (tmp_path / "private" / f"client-{client}-round-7.safetensors" for client in (3, 4))
    refused = refused_or_same(file, lambda: {n: t.numpy().tobytes() for n, t in store.read(3, 7).items()}, 500)
    assert refused > 500
    file.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match=rf"{file} is damaged \(.*; delete the run's folder {tmp_path} to start again"):
        store.read(3, 7)


def test_the_folder_of_an_earlier_format_is_refused_and_the_version_named(config, tmp_path):
    ours = config(rounds=1)
    run(ours)
    file = ours.folder() / CONFIG
    file.write_text(file.read_text().replace(f"by fedsim, format {FORMAT};", "by fedsim;"))  # as format 1 was written
    before = content(ours.folder())
    says = f"{file} was written by another version of fedsim: it has format 1, and fedsim {__version__} reads format 2"
    with pytest.raises(InputError) as refused:
        run(ours)
    remedy = f"delete the run's folder {ours.folder()} to start again, or give another --out"
    assert str(refused.value) == f"{says}; {remedy}"
    with pytest.raises(InputError) as refused:
        compare([ours.folder()], tmp_path / "page.html")
    assert str(refused.value) == f"{says}; leave {ours.folder()} out, or run its experiment in another folder"
    assert content(ours.folder()) == before


@pytest.mark.parametrize("name", [CONFIG, FACTS, "scores.parquet", "rounds.parquet", "labels.parquet"])
def test_compare_refuses_what_is_damaged(name, config, tmp_path, monkeypatch):
    ours = config(rounds=1)
    run(ours)
    monkeypatch.setattr("fedsim.reporting.compare._plots", lambda groups: [])  # of the same tables, and slow
    read = lambda: compare([ours.folder()], tmp_path / "page.html")[0].to_csv()  # noqa: E731
    assert refused_or_same(ours.folder() / name, read, 30) > 10


def test_a_missing_history_says_to_delete_the_folder_of_the_run(config):
    ours = config(rounds=1)
    run(ours)
    file = ours.folder() / HISTORY
    file.unlink()
    with pytest.raises(InputError) as error:
        run(ours)
    expected = f"{file} is missing; delete the run's folder {ours.folder()} to start again, or give another --out"
    assert str(error.value) == expected


def test_the_checkpoint_of_an_earlier_version_is_refused_in_a_sentence(config):
    from safetensors.torch import save_file

    ours = config(rounds=1)
    run(ours)
    save_file({"params/w": torch.ones(2)}, ours.folder() / NAME, {"fedsim": '{"round": 1, "experiment": {}}'})
    with pytest.raises(InputError, match=rf"{NAME} is damaged \(no safetensors file with a digest: 'digest'\); delete"):
        run(ours)


def test_whatever_a_killed_process_has_appended_to_the_history_is_overwritten(config, tmp_path):
    whole = config(out=tmp_path / "whole")
    run(whole)
    for tail in (b"\1", b"\xff" * 8, bytes(100_000)):
        ours = config(out=tmp_path / str(len(tail)))
        run_until(2, ours)
        history = ours.folder() / HISTORY
        with history.open("ab") as stream:
            stream.write(tail)
        for name in (NAME, CONFIG, "scores.parquet"):
            (ours.folder() / f"part-here-1-{name}").write_bytes(tail)
        (ours.folder() / "part-0-1-of-mine.parquet").touch()
        run(ours)
        assert [file.name for file in ours.folder().glob("part-*")] == ["part-0-1-of-mine.parquet"]
        assert result(ours.folder()) == result(whole.folder())
        assert history.stat().st_size == (whole.folder() / HISTORY).stat().st_size


# More rounds, and fewer --------------------------------------------------------------------------------------


LONGER = {
    "averaged": {"method": {"name": "fedclip", "lr": 1e-2}},
    "adam": {"method": "probe", "server": "fedadam", "clients": 6, "partition": "iid", "cohort": 3},
    "alone": {"method": {"name": "probe", "lr": 1e-1}, "server": "local_only", "clients": 4},
    "twice": {"method": "probe", "server": "ditto", "clients": 4, "partition": "iid", "cohort": 2},
    "controlled": {"method": {"name": "probe", "optimizer": "sgd", "lr": 0.1}, "server": "scaffold", "clients": 4},
    "buffered": {
        "clients": 6,
        "partition": "iid",
        "fleet": SLOW,
        "server": {"name": "fedbuff", "buffer": 2, "concurrency": 6},
    },
    "moments": {"method": {"name": "probe", "persist_optimizer": True}, "clients": 4, "partition": "iid"},
}


def found(folder: Path) -> dict:
    spent = pd.read_parquet(folder / "rounds.parquet").drop(columns="seconds")
    return result(folder) | {"spent": spent.to_csv(), "labels": (folder / "labels.parquet").read_bytes()}


def private_of(config, report) -> list[dict]:
    store = PrivateStore(config.folder() / "private")
    return [{name: tensor.tolist() for name, tensor in store.read(k, r).items()} for k, r in enumerate(report.private)]


@pytest.mark.parametrize("name", LONGER)
def test_a_run_prolonged_three_times_is_one_long_run(name, config, tmp_path):
    fields = LONGER[name] | {"eval_every": 3}
    whole = config(**fields, rounds=8, out=tmp_path / "whole")
    expected = run(whole)
    for short in (2, 4, 7, 8):  # the last round of each but 8 is evaluated for being the last
        ours = config(**fields, rounds=short, out=tmp_path / "prolonged")
        report = run(ours)
        alone = config(**fields, rounds=short, out=tmp_path / f"alone-{short}")
        run(alone)
        assert found(ours.folder()) == found(alone.folder())
    assert found(ours.folder()) == found(whole.folder())
    assert list(report.counts) == [0, 3, 6, 8] and report.chosen_round == expected.chosen_round
    assert private_of(ours, report) == private_of(whole, expected)
    assert report.experiment == expected.experiment
    written = yaml.safe_load((ours.folder() / CONFIG).read_text())
    assert written["rounds"] == 8


def test_the_best_round_is_not_one_that_was_evaluated_only_for_being_the_last(config, tmp_path):
    fields = {"method": {"name": "probe", "lr": 0.3}, "eval_every": 2, "clients": 6, "partition": "iid"}
    for seed in range(12):
        short = config(**fields, seed=seed, rounds=1, out=tmp_path / str(seed))
        if run(short).chosen_round == 1:
            break
    ours = short.model_copy(update={"rounds": 6})
    report = run(ours)
    assert list(report.counts) == [0, 2, 4, 6]
    whole = ours.model_copy(update={"out": tmp_path / "whole"})
    run(whole)
    assert found(ours.folder()) == found(whole.folder())


def test_an_interrupted_run_goes_on_with_more_rounds_or_ends_with_fewer(config, tmp_path):
    fields = {"eval_every": 2, "server": "local_only", "clients": 4}
    for rounds_ in (12, 5, 3):  # of 10, and interrupted in 3
        ours = config(**fields, rounds=10, out=tmp_path / str(rounds_))
        run_until(3, ours)
        ours = ours.model_copy(update={"rounds": rounds_})
        report = run(ours)
        whole = config(**fields, rounds=rounds_, out=tmp_path / f"whole-{rounds_}")
        expected = run(whole)
        assert found(ours.folder()) == found(whole.folder())
        assert private_of(ours, report) == private_of(whole, expected)
        assert run(ours).summary() == expected.summary()


def test_fewer_rounds_than_are_done_is_one_sentence(config):
    ours = config(rounds=3)
    run(ours)
    before = content(ours.folder())
    with pytest.raises(InputError) as error:
        run(ours.model_copy(update={"rounds": 2}))
    assert str(error.value) == (
        f"{ours.folder()} holds 3 rounds of this experiment, more than --rounds 2; give --rounds 3 or more, or another "
        "--out"
    )
    assert content(ours.folder()) == before


def test_a_prolonged_run_that_was_interrupted_is_not_taken_for_finished(config, monkeypatch):
    ours = config(rounds=2, page=True)
    run(ours)
    longer = ours.model_copy(update={"rounds": 4})

    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fedsim.simulate.write_page", kill)
        run(longer)
    assert prepare(longer).done is None
    run(longer)
    assert len(pd.read_parquet(ours.folder() / "rounds.parquet")) == 4
    assert (ours.folder() / "report.html").exists()


def test_a_finished_run_says_that_nothing_was_run_and_shows_its_table(flags, tmp_path, capsys):
    argv = ["run", *flags, f"--out={tmp_path / 'run'}"]
    assert main(argv) == 0
    first = capsys.readouterr().out
    files = content(tmp_path)
    assert main(argv) == 0
    again = capsys.readouterr().out
    assert "already finished; nothing was run" in again and "already finished" not in first
    assert again.partition("accuracy in percent")[2] == first.partition("accuracy in percent")[2] != ""
    assert {name for name, data in content(tmp_path).items() if data != files.get(name)} <= {"run/status.json"}


@pytest.mark.parametrize("name", ["labels.parquet", "adapter.safetensors", "config.yaml"])
def test_a_file_that_is_deleted_from_a_finished_run_is_written_again(name, config):
    ours = config(rounds=1)
    run(ours)
    before = (ours.folder() / name).read_bytes()
    (ours.folder() / name).unlink()
    run(ours)
    assert (ours.folder() / name).read_bytes() == before


# Flat over ten thousand rounds -------------------------------------------------------------------------------


def test_a_round_writes_calls_and_keeps_no_more_after_five_hundred_rounds(config, tmp_path):
    quick = {"partition": "by_domain", "method": {"name": "zero_shot"}, "eval_clients": 1}
    experiment = prepare(config(rounds=520, out=tmp_path / "run", **quick))
    config_ = experiment.config
    experiment = encode_experiment(experiment, sizing_of(config_), lambda event: None)
    claim(experiment.folder, "run")
    history, checkpoint = experiment.folder / HISTORY, experiment.folder / NAME
    written, sizes, calls, kept = {}, {}, {}, {}
    with open_pool(sizing_of(config_), 2) as pool:
        steps = rounds(experiment, pool)
        for report in steps:
            done = len(report.rounds)
            if done in (10, 500):
                before, counted = history.stat().st_size, Counter()
                sys.setprofile(lambda frame, event, arg, counted=counted: counted.update([event == "call"]))
                next(steps)
                sys.setprofile(None)
                written[done], sizes[done] = history.stat().st_size - before, checkpoint.stat().st_size
                calls[done] = counted[True]
                tracemalloc.start()
                next(steps)
                first = tracemalloc.get_traced_memory()[0]
                for _ in range(10):
                    next(steps)
                kept[done] = tracemalloc.get_traced_memory()[0] - first
                tracemalloc.stop()
    assert len(list(experiment.folder.iterdir())) < 12
    assert written[500] == written[10]
    assert 0 <= sizes[500] - sizes[10] < 64  # for the digits of the round
    assert calls[500] == pytest.approx(calls[10], rel=0.02)
    assert kept[500] < kept[10] + 2_500

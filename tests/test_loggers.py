"""The rounds of a run in TensorBoard, MLflow and W&B, read back by what is theirs."""

import json
import time
from importlib.util import find_spec

import pytest
from conftest import run_until

from fedsim import run
from fedsim.config import flat
from fedsim.errors import InputError, Stopped
from fedsim.events import RoundValues
from fedsim.folder import claim
from fedsim.reporting.loggers import FOLDER, Loggers
from fedsim.sweep.config import Sweep


@pytest.fixture(params=["tensorboard", "mlflow", "wandb"])
def points_of(request, monkeypatch):
    """For each logger that is installed: the function that reads what it has written to a folder.

    It returns by name (round, value) of each point, in the order of the record; of all records in the folder.
    """
    if request.param == "mlflow":
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if request.param == "wandb":
        monkeypatch.setenv("WANDB_MODE", "offline")
    reader = {"tensorboard": event_file, "mlflow": mlflow_points, "wandb": wandb_points}[request.param]
    pytest.importorskip("tensorboard" if request.param == "tensorboard" else request.param)
    reader.logger = request.param
    return reader


def event_file(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / FOLDER), size_guidance={"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow_runs(folder):
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client, client.search_runs([client.get_experiment_by_name("fedsim").experiment_id])


def mlflow_points(folder):
    client, runs = mlflow_runs(folder)
    (ours,) = runs
    histories = {name: client.get_metric_history(ours.info.run_id, name) for name in ours.data.metrics}
    return {name: [(point.step, point.value) for point in history] for name, history in histories.items()}


def wandb_records(folder):
    """The records of W&B's file, once it has been closed: W&B writes its end a moment after the run has."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline, records = time.monotonic() + 60, []
    while not (records and records[-1].WhichOneof("record_type") == "exit"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        records = [Record.FromString(data) for data in log_entries(file.read_bytes())]
    return records


def log_entries(content):
    """A header of 7 bytes, then blocks of 32 KiB of checksum, length, kind and data."""
    position, data = 7, b""
    while position < len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield data
            data = b""


def wandb_points(folder):
    points = {}
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = items.pop("_step", record.history.step.num)
            for name, value in items.items():
                if not name.startswith("_"):
                    points.setdefault(name, []).append((step, value))
    return points


def test_a_record_has_the_accuracies_and_costs_of_each_round(config, points_of):
    ours = config(loggers=points_of.logger)
    report = run(ours)
    points = points_of(ours.folder())
    assert points["accuracy/validation"] == [(round, pytest.approx(mean)) for round, mean in report.validation.items()]
    for name in ("generalization", "personalization"):
        means = [(round, pytest.approx(report.summary(round=round)[name])) for round in report.counts]
        assert points[f"accuracy/{name}"] == means and len(means) == 4
        assert points[f"zero_shot/{name}"] == [(0, pytest.approx(report.summary("zero_shot")[name]))]
    rounds = report.tables().rounds
    for name in ("loss", "bytes_up", "bytes_down", "seconds", "clock_s"):
        assert points[f"round/{name}"] == [(k + 1, pytest.approx(value)) for k, value in enumerate(rounds[name])]


def test_a_resumed_run_has_each_round_once_and_also_those_that_were_not_logged(config, points_of):
    run_until(2, config(rounds=5))
    assert not list(config().folder().glob("*[!.]db")) and not (config().folder() / FOLDER).exists()
    run_until(4, config(rounds=5, loggers=points_of.logger))
    for rounds in (5, 5, 7):  # resumed; finished; continued
        ours = config(rounds=rounds, loggers=points_of.logger, eval_every=1)
        run(ours)
        points = points_of(ours.folder())
        assert [step for step, _ in points["accuracy/validation"]] == list(range(rounds + 1))
        assert [step for step, _ in points["round/loss"]] == list(range(1, rounds + 1))
        assert [step for step, _ in points["zero_shot/generalization"]] == [0]


def test_a_finished_run_can_be_logged_later(config, points_of):
    run(config())
    run(config(loggers=points_of.logger))
    assert [step for step, _ in points_of(config().folder())["accuracy/validation"]] == [0, 1, 2, 3]


def test_rounds_that_are_not_evaluated_have_costs_alone(config, points_of):
    ours = config(rounds=5, eval_every=2, loggers=points_of.logger)
    run(ours)
    points = points_of(ours.folder())
    assert [step for step, _ in points["accuracy/validation"]] == [0, 2, 4, 5]
    assert [step for step, _ in points["round/bytes_up"]] == [1, 2, 3, 4, 5]


def test_logging_changes_no_result(config, tmp_path, points_of):
    run(config(out=tmp_path / "plain"))
    run(config(out=tmp_path / "logged", loggers=points_of.logger))
    for name in ("scores.parquet", "adapter.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "logged" / name).read_bytes()


def test_mlflow_has_the_fields_of_the_experiment_and_how_the_run_ended(config, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ours = config(loggers="mlflow", prompt=None)
    run_until(1, ours)
    (before,) = mlflow_runs(ours.folder())[1]
    assert before.info.status == "KILLED" and before.info.run_name == "run"
    assert before.data.params == {
        name: str(value) for name, value in flat(ours.experiment()).items() if name != "rounds"
    }
    run(config(loggers="mlflow", rounds=4))
    (after,) = mlflow_runs(ours.folder())[1]
    assert (after.info.status, after.info.run_id) == ("FINISHED", before.info.run_id)
    assert after.data.tags["fedsim.rounds"] == "4"


def test_wandb_has_the_fields_of_the_experiment(config, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ours = config(loggers="wandb")
    run(ours)
    records = [record for record in wandb_records(ours.folder()) if record.WhichOneof("record_type") == "config"]
    fields = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert fields["method"] == ours.experiment()["method"] and fields["rounds"] == 3


def test_a_server_that_does_not_answer_is_found_before_the_run_starts(config, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(
        Stopped, match=r"MLflow does not answer at MLFLOW_TRACKING_URI, http://127\.0\.0\.1:9: "
    ) as error:
        run(config(loggers="mlflow"))
    assert "secret" not in str(error.value) and not config().folder().exists()


def test_an_account_of_wandb_is_asked_for_before_the_run_starts(config, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(InputError, match="logger wandb needs an account"):
        run(config(loggers="wandb"))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(config, name):
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(InputError, match=f"logger {name} needs the package {name}, .* pip install {name}, or uv run"):
        run(config(loggers=name))
    assert not config().folder().exists()


def test_a_logger_that_fails_on_the_way_is_noted_and_does_not_end_the_run(config, tmp_path):
    ours, notes = config(loggers="tensorboard"), []
    claim(ours.folder(), "run")
    with Loggers(ours, ours.folder(), notes.append) as loggers:
        loggers.progress(RoundValues("round", 0, {"round/loss": 1.0}))
        loggers.loggers["tensorboard"].writer.close()
        loggers.progress(RoundValues("round", 1, {"round/loss": 1.0}))
        loggers.progress(RoundValues("round", 2, {"round/loss": 1.0}))
    assert [(note.stage, note.text[:26]) for note in notes] == [("tensorboard", "logging failed in round 1 ")]
    with (
        pytest.raises(Stopped, match="logger tensorboard failed in round 1"),
        Loggers(ours, ours.folder(), None) as silent,
    ):
        silent.progress(RoundValues("round", 0, {"round/loss": 1.0}))
        silent.loggers["tensorboard"].writer.close()
        silent.progress(RoundValues("round", 1, {"round/loss": 1.0}))


def test_a_logger_that_cannot_be_opened_ends_the_run_before_round_1(config):
    ours, events = config(loggers="tensorboard"), []
    claim(ours.folder(), "run")
    (ours.folder() / FOLDER).write_text("a file", encoding="utf-8")
    with pytest.raises(
        Stopped, match=r"logger tensorboard does not start: .*File exists.*; rerun the command without it"
    ):
        run(ours, events.append)
    assert not [event for event in events if event.stage == "training"]


def test_a_run_and_a_sweep_spell_their_loggers_alike(config):
    for given in ("tensorboard,mlflow", ["tensorboard", "mlflow"], "tensorboard, mlflow"):
        assert config(loggers=given).loggers == Sweep(config=config(), loggers=given).loggers
    with pytest.raises(InputError, match="no logger 'tensorbord'; available: tensorboard, mlflow, wandb"):
        config(loggers="tensorbord")


def test_nothing_is_logged_unless_it_is_asked_for(config):
    events = []
    run(config(), events.append)
    assert not (config().folder() / FOLDER).exists() and not (config().folder() / "run_id").exists()
    assert {type(event).__name__ for event in events} == {"Started", "Step", "Note"}

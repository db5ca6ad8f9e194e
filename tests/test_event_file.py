"""The curves of a run, read back by TensorBoard's own reader."""

import pytest
from conftest import run_until

from fedsim import run
from fedsim.reporting.event_file import FOLDER

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def scalars(folder):
    """By tag: (step, value) of each event, in the order of the file; all files of the folder together."""
    events = accumulator.EventAccumulator(str(folder / FOLDER), size_guidance={"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_event_file_has_the_accuracies_and_costs_of_each_round(config):
    ours = config(tensorboard=True)
    report = run(ours)
    found = scalars(ours.folder())
    assert found["accuracy/validation"] == [(round, pytest.approx(mean)) for round, mean in report.validation.items()]
    for name in ("generalization", "personalization"):
        means = [(round, pytest.approx(report.summary(round=round)[name])) for round in report.counts]
        assert found[f"accuracy/{name}"] == means and len(means) == 4
        assert found[f"zero_shot/{name}"] == [(0, pytest.approx(report.summary("zero_shot")[name]))]
    rounds = report.tables().rounds
    for name in ("loss", "bytes_up", "bytes_down", "seconds", "clock_s"):
        assert found[f"round/{name}"] == [(k + 1, pytest.approx(value)) for k, value in enumerate(rounds[name])]


def test_a_resumed_run_has_each_round_once_and_also_those_that_were_not_logged(config):
    run_until(2, config(rounds=5))
    assert not (config().folder() / FOLDER).exists()
    run_until(4, config(rounds=5, tensorboard=True))
    ours = config(rounds=5, tensorboard=True, eval_every=1)
    run(ours)
    found = scalars(ours.folder())
    assert [step for step, _ in found["accuracy/validation"]] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in found["round/loss"]] == [1, 2, 3, 4, 5]
    assert len(list((ours.folder() / FOLDER).iterdir())) == 1


def test_rounds_that_are_not_evaluated_have_costs_alone(config):
    ours = config(rounds=5, eval_every=2, tensorboard=True)
    run(ours)
    found = scalars(ours.folder())
    assert [step for step, _ in found["accuracy/validation"]] == [0, 2, 4, 5]
    assert [step for step, _ in found["round/bytes_up"]] == [1, 2, 3, 4, 5]


def test_there_is_no_event_file_unless_it_is_asked_for(config):
    run(config())
    assert not (config().folder() / FOLDER).exists()

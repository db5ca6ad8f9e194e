"""A run in which nothing would be trained or evaluated is refused; one that lacks a part says so first."""

from dataclasses import replace

import numpy as np
import pytest

from fedsim import Config, InputError, run
from fedsim.__main__ import main
from fedsim.clients import Population
from fedsim.prepare import _check_evaluated, prepare
from fedsim.reporting.remarks import remarks
from fedsim.reporting.tables import COLUMNS
from fedsim.schedule import check_trained

ROW = np.arange(1)
SLOW = {"name": "lognormal", "rows_per_s": 1.0}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"fleet": SLOW, "deadline_s": 1e-9}, "of 6 clients asked 0 drop out and 6 miss the deadline"),
        ({"fleet": SLOW | {"dropout": 0.999999}}, "of 6 clients asked 6 drop out and 0 miss the deadline"),
        ({"fleet": SLOW | {"availability": 1e-9}}, "no client is available in 3 rounds"),
        ({"fleet": SLOW | {"dropout": 0.999999}, "server": {"name": "fedbuff", "buffer": 1}}, "in a row none answered"),
        (
            {"partition": "iid", "clients": 120},  # two rows each, of which one is for training
            "no client takes a local step in 3 rounds: each has fewer train rows than the 2 that a step of method "
            "fedclip needs",
        ),
        (
            {"partition": "iid", "clients": 180, "held_out": (), "method": "probe"},
            "nothing can be evaluated: none of 180 clients has validation or test rows, and no domain is held out",
        ),
    ],
)
def test_a_run_that_would_train_or_evaluate_nothing_is_refused_before_it_starts(fields, sentence, config):
    ours = config(**fields)
    with pytest.raises(InputError) as refused:
        prepare(ours)
    assert sentence in str(refused.value) and not ours.folder().exists()


def test_one_client_that_trains_in_one_round_is_enough(config):
    prepare(config(partition="iid", clients=120, method="probe"))  # a step of one row
    prepare(config(fleet=SLOW, deadline_s=1e-9, rounds=0))  # nothing is to be trained
    rows = np.array([1, 1, 2])
    check_trained(Config(cohort=1, rounds=50), Config().method, 3, lambda ids, round: rows[list(ids)], 0, 0)


def test_rows_are_asked_for_only_until_a_client_takes_a_step():
    asked = []
    check_trained(
        Config(), Config().method, 1000, lambda ids, round: (asked.extend(ids), np.full(len(ids), 5))[1], 0, 0
    )
    assert asked == [0]


def test_a_held_out_domain_without_test_rows_is_refused():
    clients = Population([(ROW, ROW, ROW)], [ROW, ROW[:0]])
    with pytest.raises(InputError, match="held-out domain oil has no test rows"):
        _check_evaluated(Config(held_out="ink,oil"), clients)


def test_a_share_that_cuts_nothing_is_refused_and_the_default_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--dataset.split", "concepts", "--train-share", "0.9"]) == 2
    expected = "--train-share 0.9 has no effect: glyphs defines its own train, validation and test rows"
    assert expected in capsys.readouterr().err
    prepare(Config(train_share=0.6))  # as `--config paper` has it


def test_the_first_words_of_a_result_say_what_it_lacks(config):
    report = run(config(rounds=1, partition="iid", clients=60))  # four rows each: 2 for training, none for the rest
    assert remarks(report.tables()) == [
        "Round 1 is reported because it is the last: no client has validation rows.",
        "No client has test rows of its own.",
    ]
    idle = [row.copy() for row in report.rounds]
    for row in idle:
        row[COLUMNS["rounds"].index("steps")] = 0
    first = remarks(replace(report, rounds=idle).tables())[0]
    assert first == "No client took a local step in any round: the numbers are those of untrained parameters."


def test_a_held_out_domain_of_other_classes_is_named(config):
    report = run(config(rounds=0))
    own = report.holdings[:, 3] > 0
    report.holdings = report.holdings[own | (report.holdings[:, 2] == 0)]  # clients train on the first class alone
    assert not any("held-out domain ink" in remark for remark in remarks(report.tables()))
    report.holdings = report.holdings[(report.holdings[:, 2] > 0) | (report.holdings[:, 3] == 0)]
    assert remarks(report.tables())[-1] == "No client trains on a class of held-out domain ink."


def test_test_rows_of_unseen_concepts_are_said_to_be_harder(config):
    report = run(config(rounds=0))
    assert len(remarks(report.tables())) == 1 and remarks(report.tables())[0].startswith("No round was run")
    report.facts["unseen_test"] = True
    assert remarks(report.tables())[1].startswith("Test rows show concepts that no training or validation row shows")


def test_the_table_has_no_column_for_what_was_not_held_out_and_counts_test_rows(config, tmp_path, features_dir, capsys):
    flags = ["run", "--dataset", "features", "--data-dir", str(features_dir), "--rounds", "0", "--actors", "0"]
    assert main([*flags, "--out", str(tmp_path / "a")]) == 0
    assert "held-out" not in capsys.readouterr().out
    assert main([*flags, "--held-out", "ink", "--out", str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("test rows" in line and "120" in line and "48" in line for line in lines)  # of ink; 24 each of two

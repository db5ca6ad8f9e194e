"""The table that a finished run prints: accuracies, the gain over zero-shot CLIP, and on which rows."""

import re
from pathlib import Path

import pytest

from fedsim import Step, run
from fedsim.__main__ import main
from fedsim.cli.show import show_run
from fedsim.progress import plain_console, progress_bars, show_on
from fedsim.reporting.remarks import comparison


def cells(text, name):
    """The numbers in the row of this name, in all tables."""
    lines = [line for line in text.splitlines() if re.match(rf"│ {re.escape(name)} +│", line)]
    return [cell.strip() for line in lines for cell in line.split("│")[2:-1]]


def shown(report, folder):
    console = plain_console(record=True, width=200)
    show_run(console, report.tables(), folder)
    return console.export_text()


def test_a_gain_is_the_difference_of_the_two_accuracies_above_it(config):
    ours = config(rounds=5, method={"name": "probe", "lr": 0.1}, new_classes=0.5, partition="iid", clients=3)
    text = shown(run(ours), ours.folder())
    zero_shot, trained, gains = (cells(text, name) for name in ("zero-shot CLIP", "probe, fedavg", "gain, points"))
    assert len(gains) == len(zero_shot) == len(trained) >= 8
    for before, after, gain in zip(zero_shot, trained, gains, strict=True):
        assert gain == ("-" if "-" in (before, after) else f"{float(after) - float(before):+.1f}")
    assert any(float(gain) for gain in gains if gain != "-")


def test_a_sentence_says_what_is_compared_on_which_rows(config):
    report = run(config())
    tables = report.tables()
    test = tables.partition[tables.partition.split == "test"]
    own = test[test.domain != "ink"]
    assert comparison(tables) == (
        f"fedclip with fedavg in round {report.chosen_round} is compared with zero-shot CLIP on 120 test rows of "
        f"held-out ink and on {own.rows.sum()} test rows of {own.client.nunique()} clients."
    )
    assert own.client.nunique() == 2 and comparison(tables) in shown(report, config().folder())


def test_the_sentence_names_new_classes_and_leaves_out_what_no_row_tests(config):
    report = run(config(held_out=(), new_classes=0.5, partition="iid", clients=1))
    assert re.search(
        r"CLIP on \d+ test rows of 1 client and on 180 test rows of new classes\.$", comparison(report.tables())
    )


def test_the_files_that_a_run_has_written_are_listed(config):
    with_page, without = config(page=True), config()
    run(without)
    for ours, count in (without, 4), (with_page, 5):
        lines = shown(run(ours), ours.folder()).splitlines()
        files = [line.strip() for line in lines if line.strip().startswith(str(ours.folder()))]
        assert len(files) == count and all(Path(file).exists() for file in files)


def test_the_command_prints_the_gain(features_dir, tmp_path, capsys):
    flags = ["--dataset", "features", "--data-dir", str(features_dir), "--rounds", "1", "--actors", "0"]
    assert main(["run", *flags, "--out", str(tmp_path / "run")]) == 0
    assert "gain, points" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_the_numbers_of_a_stage_are_whole_in_a_terminal_of_this_width(width):
    console = plain_console(record=True, width=width)
    note = "loss 0.00293  validation 71.0%  best round 10"
    with progress_bars(console) as bars:
        for step in Step("encoding images", 2060, 2060), Step("training", 50, 50, note):
            show_on(bars)(step)
    first, second = console.export_text().splitlines()
    assert "2060/2060" in first and second.startswith("training") and "50/50" in second and note in second
    assert "…" not in first + second and ("━" in first) == (width == 120)

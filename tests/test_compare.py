"""Runs side by side: what differs, means over seeds, and one sentence for a folder that is no finished run."""

import re
import statistics

import pandas as pd
import pytest
import yaml
from browser import explore

from fedsim import InputError, run
from fedsim.__main__ import main
from fedsim.folder import write_sealed
from fedsim.formats import percent
from fedsim.reporting.compare import compare


@pytest.fixture
def runs(config, tmp_path, monkeypatch):
    """Runs named experiments; returns their folders and reports."""
    monkeypatch.setattr("fedsim.simulate.write_page", lambda tables, file: file.touch())  # test_page.py reads those

    def make(**experiments):
        folders = [tmp_path / name for name in experiments]
        made = [config(out=folder, **fields) for folder, fields in zip(folders, experiments.values(), strict=True)]
        return folders, [run(one) for one in made]

    return make


def test_a_row_has_what_differs_and_what_its_report_says(runs, tmp_path):
    folders, reports = runs(slow={"method": {"name": "fedclip", "lr": 1e-4}}, fast={"method": {"lr": 1e-2}})
    table, page = compare(folders, tmp_path / "pages" / "page.html")
    assert page == tmp_path / "pages" / "page.html"
    assert list(table.columns) == [
        "name",
        "method.lr",
        "chosen round",
        "generalization",
        "personalization",
        "worst tenth",
        "validation",
        "zero-shot generalization",
        "megabytes up",
        "seconds",
    ]
    for row, name, lr, report in zip(
        table.to_dict("records"), ("slow", "fast"), ("1e-4", "0.01"), reports, strict=True
    ):
        means = report.summary()
        assert (row["name"], row["method.lr"], row["chosen round"]) == (name, lr, str(report.chosen_round))
        assert row["generalization"] == percent(means["generalization"])
        assert row["personalization"] == percent(means["personalization"])
        assert name == "slow" or means != report.summary(round=0)
        assert row["worst tenth"] == percent(means["worst_tenth"])
        assert row["validation"] == percent(means["validation"])
        assert row["zero-shot generalization"] == percent(report.summary("zero_shot")["generalization"])
        assert float(row["megabytes up"]) == pytest.approx(report.tables().rounds.bytes_up.sum() / 1e6, rel=0.01)
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!#|data:image/png)', text)
    assert all(f"<td>{cell}</td>" in text for cell in table.iloc[:, 1:].to_numpy().ravel())
    assert str(tmp_path) not in text


def test_runs_of_several_seeds_are_also_a_mean_and_a_sample_deviation(runs, tmp_path):
    probe = {"method": "probe"}
    folders, reports = runs(
        a=probe,
        b=probe | {"seed": 1, "partition_seed": 1},
        c=probe | {"seed": 2, "partition_seed": 2},
        z={"method": "zero_shot"},
    )
    table, page = compare(folders, tmp_path / "page.html")
    assert list(table.name) == ["a", "b", "c", "z", "probe (3 seeds)"]
    assert list(table.n) == ["1", "1", "1", "1", "3"]
    own = [report.summary()["personalization"] for report in reports[:3]]
    assert len(set(own)) > 1
    assert table.personalization[4] == f"{percent(statistics.mean(own))} ± {percent(statistics.stdev(own))}"
    assert list(table.method) == ["probe", "probe", "probe", "zero_shot", "probe"]
    assert list(table.seed) == ["0", "1", "2", "0", ""]
    assert "method.lr" not in table  # of one method there is one value
    text = page.read_text()
    assert "These runs have different partitions" in text


def test_new_classes_and_their_harmonic_means_are_shown_where_a_run_has_some(runs, tmp_path):
    folders, reports = runs(all={}, half={"new_classes": 0.5})
    table, page = compare(folders, tmp_path / "page.html")
    means = reports[1].summary()
    for head, key in (
        ("local", "local"),
        ("base", "base"),
        ("new", "new"),
        ("harmonic mean (base, new)", "harmonic_2"),
        ("harmonic mean (local, base, new)", "harmonic_3"),
    ):
        assert list(table[head]) == ["-", percent(means[key])]
    text = page.read_text()
    assert "These runs train on different classes" in text
    for report in reports:
        cells = [percent(report.summary()[key]) for key in ("spread", "personalization_own", "macro_f1", "ece")]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text


def test_a_seed_that_was_run_twice_counts_once(runs, tmp_path):
    folders, _ = runs(a={}, again={}, b={"seed": 1})
    table, page = compare(folders, tmp_path / "page.html")
    assert list(table.n) == ["1", "1", "1", "2"]
    assert "a seed that was run twice counts once" in page.read_text()
    table, _ = compare([folders[0], folders[0]], page)
    assert list(table.n) == ["1", "1"]


def test_different_data_and_domains_are_compared_and_said_so(runs, features_dir, tmp_path, capsys):
    (tmp_path / "data").symlink_to(features_dir)
    folders, _ = runs(
        a={}, b={"data_dir": tmp_path / "data"}, c={"held_out": ()}, d={"rounds": 0, "server": "local_only"}
    )
    table, page = compare(folders, tmp_path / "page.html")
    assert list(table.data_dir) == [features_dir.name, "data", features_dir.name, features_dir.name]
    assert list(table.held_out) == ["ink", "ink", "none", "ink"]
    assert table.generalization[2] == "-"
    assert "on different data" in page.read_text() and "hold out different domains" in page.read_text()
    assert main(["compare", *map(str, folders), "--out", str(tmp_path)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "These runs are on different data: their accuracies do not compare." in words


def test_the_same_data_at_another_path_is_the_same_data(runs, features_dir, tmp_path):
    (tmp_path / features_dir.name).symlink_to(features_dir)
    folders, _ = runs(a={}, b={"seed": 1, "data_dir": tmp_path / features_dir.name})
    table, page = compare(folders, tmp_path / "page.html")
    assert "data_dir" not in table and "on different data" not in page.read_text()
    assert list(table.n) == ["1", "1", "2"]


def test_folders_of_one_name_are_told_apart(runs, tmp_path):
    folders, _ = runs(**{"one/run": {"rounds": 0}, "two/run": {"rounds": 0}})
    table, _ = compare(folders, tmp_path / "page.html")
    assert list(table.name) == ["one/run", "two/run"]


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    folders, _ = runs(a={}, b={"seed": 1})
    pages = [compare(folders, tmp_path / f"{k}.html")[1].read_bytes() for k in range(2)]
    assert pages[0] == pages[1]


def test_the_first_words_name_the_best_runs_unless_they_do_not_compare(runs, tmp_path):
    folders, reports = runs(
        a={"rounds": 2, "method": {"name": "fedclip", "lr": 0.01}}, b={"method": "probe"}, c={"held_out": ()}
    )
    text = compare(folders[:2], tmp_path / "page.html")[1].read_text()
    means = {name: report.summary()["generalization"] for name, report in zip("ab", reports, strict=False)}
    assert means["a"] != means["b"]
    best = max(means, key=means.__getitem__)
    assert f"Highest generalization: {best} ({percent(means[best])}%). Highest personalization: " in text
    assert "Fewest megabytes up: " in text
    assert "Highest generalization" not in compare(folders, tmp_path / "page.html")[1].read_text()


def test_a_run_is_hidden_in_all_plots_and_tables_at_once(runs, tmp_path):
    folders, _ = runs(a={}, b={"method": "probe"})
    page = compare(folders, tmp_path / "page.html")[1]
    script = """
    all(".legend input")[0].click();
    const hidden = (kind) => all(`.panel ${kind}`).every((part) => !shown(part));
    const [by_round, , by_bytes] = all(".panel"), { box } = told(by_bytes);
    const names = all("tbody tr").filter(shown).map((row) => row.cells[0].textContent);
    return [all(".panel").length, hidden(".series-0"), hidden(".series-1"), names, point(by_bytes, box[2], box[1])];
    """
    count, a, b, names, said = explore(page, script)
    assert names == ["b", "b"]  # in both tables
    assert (count, a, b) == (4, True, False)
    assert said[0].startswith("bytes up and down since the start ") and [line[:3] for line in said[1:]] == ["b: "]


def test_runs_without_rounds_bytes_or_such_rows_are_drawn_as_well(runs, tmp_path):
    folders, _ = runs(a={"rounds": 0, "held_out": ()}, b={"rounds": 0, "held_out": (), "method": "zero_shot"})
    text = compare(folders, tmp_path / "page.html")[1].read_text()
    assert text.count("nothing to show") == 2


@pytest.fixture
def bad(runs, tmp_path):
    """Folders that are no finished runs, by what is wrong with them."""
    (good,), _ = runs(good={"rounds": 1})
    (tmp_path / "file").write_text("")

    def like(name, *without):
        folder = tmp_path / name
        folder.mkdir()
        for file in good.iterdir():
            if file.is_file() and file.name not in without:
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    tables = "scores.parquet", "labels.parquet", "rounds.parquet"
    cut = like("cut")
    (cut / "scores.parquet").write_bytes((cut / "scores.parquet").read_bytes()[:100])
    other = like("other")
    pd.DataFrame({"round": [1]}).to_parquet(other / "scores.parquet")
    short = like("short")
    fields = yaml.safe_load((short / "config.yaml").read_text())
    write_sealed(short / "config.yaml", yaml.safe_dump(fields | {"rounds": 9}))  # as a run resumed with more writes it
    alien = like("alien")
    (alien / "config.yaml").write_text("lr: 1\n")
    return {
        "nowhere": ([tmp_path / "nowhere"], "nowhere does not exist"),
        "a file": ([tmp_path / "file"], "file is a file"),
        "no run": (
            [tmp_path],
            "is not a finished run of fedsim: it lacks config.yaml, facts.yaml, scores.parquet, labels.parquet",
        ),
        "no table": ([like("half", "scores.parquet", "checkpoint.safetensors")], "it lacks scores.parquet"),
        "unfinished": ([like("going", *tables)], "going is not a finished run of fedsim: it lacks scores.parquet,"),
        "cut short": ([cut], "scores.parquet is damaged ("),
        "other columns": ([other], "other/scores.parquet is damaged (it has no digest)"),
        "fewer rounds": ([short], "short is not finished: it has 1 of 9 rounds"),
        "another's config": (
            [alien],
            "config.yaml is damaged (its content does not match its digest",
        ),
        "none": ([], "compare needs the folder of at least one run"),
    }


def test_what_is_no_finished_run_is_one_sentence(bad, tmp_path):
    for case, (folders, sentence) in bad.items():
        with pytest.raises(InputError) as error:
            compare(folders, tmp_path / "page.html")
        assert sentence in str(error.value), case
        assert "\n" not in str(error.value)
        assert not (tmp_path / "page.html").exists()
    with pytest.raises(InputError, match=r"cannot be written: (Not a directory|File exists)"):
        compare([tmp_path / "good"], tmp_path / "file" / "page.html")


def test_a_file_in_the_folder_s_place_is_one_sentence_on_the_command_line(runs, tmp_path, capsys):
    folders, _ = runs(a={})
    (tmp_path / "taken").write_text("")
    assert main(["compare", str(folders[0]), "--out", str(tmp_path / "taken")]) == 2
    said = capsys.readouterr().err
    assert "taken/compare.html cannot be written" in said and said.count("\n") == 1


def test_the_command_line_shows_the_table_and_the_page(runs, tmp_path, capsys):
    folders, reports = runs(a={}, b={"seed": 1})
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert percent(reports[0].summary()["personalization"]) in shown and "(2 seeds)" in " ".join(shown.split())
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err

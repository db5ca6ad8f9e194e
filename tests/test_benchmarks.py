"""Every command that the benchmarks show runs at a small size, and prints a table that can be checked by hand."""

import ast
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from browser import explore
from shown import MOST, PACS, PROJECT, commands_in, smaller, write_drawings, write_features

from fedsim.registry import parse

FOLDER = PROJECT / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("[!_]*.py"))
TEXTS = [PROJECT / "README.md", FOLDER / "README.md", *SCRIPTS]
FEW = MOST | dict.fromkeys(["--clients", "--cohort"], 10) | dict.fromkeys(["--tower-rounds", "--tower-seeds"], 1)
TINY, ADAPTER = 10_853_377, 131_584  # parameters of the embedded model, and of FedCLIP's adapter of its 256 dimensions
BOTH_WAYS = 2 * 4 / 1e6  # MB of a parameter in a round of one client


def commands_of(script: str) -> list[list[str]]:
    """The flags of every command that the documentation shows of a script, at a small size, each once."""
    commands = []
    for file in TEXTS:
        text = file.read_text(encoding="utf-8")
        text = text if file.suffix == ".md" else ast.get_docstring(ast.parse(text), clean=False) or ""
        commands += [words for words in commands_in(text) if f"benchmarks/{script}.py" in words]
    flags = [words[words.index(f"benchmarks/{script}.py") + 1 :] for words in commands]
    small = [tuple(word for word in smaller(words, FEW, {}) if word != "--quick") for words in flags]
    return [list(flags) for flags in dict.fromkeys(small)]


def printed(script: str, *flags: object) -> str:
    """What a script prints, with --quick."""
    text = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text):
        patch.setattr(sys, "argv", [f"{script}.py", "--quick", *map(str, flags)])
        patch.syspath_prepend(FOLDER)
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    return text.getvalue()


def tables(text: str) -> list[pd.DataFrame]:
    """The tables in a text: a column for each heading, cells as they are printed."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE):
        heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append(pd.DataFrame(rows, columns=heads).set_index(heads[0]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all scripts write; `drawings`, `few` (half of them), `pacs` and `features` are data."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_drawings(folder / "drawings", ("clipart", "ink", "noto"))
    # Small, since all of CLIP is trained on them.
    write_drawings(folder / "few", ("clipart", "ink", "noto"), each=1)
    write_drawings(folder / "pacs", PACS, each=1)
    write_features(folder / "features", PACS)
    return folder


def on_data(folder: Path, flags: list[str], held_out: str = "sketch", drawings: str = "drawings") -> list[object]:
    """Flags with data of the kind that they name, some drawings where they name none, and one domain held out."""
    if "--dataset" not in flags:
        return [*flags, "--dataset", "folder", "--data-dir", folder / drawings, "--held-out", "ink"]
    data = folder / flags[flags.index("--dataset") + 1]
    swaps = {"DIR": data, "ViT-B-32": "tiny", "openai": "embedded"}
    return [*(swaps.get(word, word) for word in flags), "--held-out", held_out]


def test_every_script_is_run_by_a_test():
    run = scripts_run_by(Path(__file__).read_text(encoding="utf-8"))
    assert run == {script.name for script in SCRIPTS}
    for script in SCRIPTS:
        assert commands_of(script.stem), f"no documentation shows how {script.name} is run"


def scripts_run_by(source: str) -> set[str]:
    """The scripts that a file of tests runs: `printed("NAME", ...)`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="printed"), args=[ast.Constant(value=str(name)), *_]):
                names.add(f"{name}.py")
    return names


@pytest.mark.parametrize("flags", commands_of("choose_glyphs"), ids=" ".join)
def test_the_grid_of_the_embedded_experiment_is_ordered_by_validation_accuracy(flags, cluster, folder):
    (table,) = tables(printed("choose_glyphs", *flags, "--out", folder / "choose_glyphs"))
    assert sorted(table.index) == ["contrastive", "cross_entropy"]
    validation = table.validation.astype(float).tolist()
    assert validation == sorted(validation, reverse=True) and 0 < validation[1] <= 100
    assert table["round"].tolist() == ["1", "1"]
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    (in_readme, *_) = tables(readme.partition("## choose_glyphs.py")[2].partition("\n## ")[0])
    assert list(table.columns) == list(in_readme.columns)


TABLES = commands_of("fedclip_table")
ON_PACS = next(flags for flags in TABLES if "pacs" in flags)


@pytest.fixture(scope="module")
def fedclip_runs(cluster, folder) -> tuple[str, Path]:
    """What the paper's table prints of three clients and one round, and the folder of its runs."""
    out = folder / "fedclip_table"
    return printed("fedclip_table", *on_data(folder, ON_PACS), "--out", out), out / "pacs"


def test_the_papers_table_has_every_method_and_its_bytes(fedclip_runs):
    away, own, cost = tables(fedclip_runs[0])
    assert list(away.columns) == ["sketch", "mean"] and list(away.index) == list(own.index)
    assert list(away.index) == ["zero-shot", *cost.index] and len(cost) == 7
    assert all(0 <= float(cell) <= 100 for table in (away, own) for cell in table["mean"])
    sent = {"FedAvg, all of CLIP": TINY, "FedCLIP, the paper's values": ADAPTER, "linear probe": 15 * 256}
    for name, parameters in (sent | {"alone (linear probe)": 0}).items():
        assert float(cost["MB a round"][name]) == pytest.approx(3 * parameters * BOTH_WAYS, abs=0.005)


@pytest.mark.parametrize("flags", [flags for flags in TABLES if flags not in ([], ON_PACS)], ids=" ".join)
def test_the_papers_table_is_made_of_other_data(flags, cluster, folder):
    words = on_data(folder, flags, drawings="few")
    held_out, _, cost = tables(printed("fedclip_table", *words, "--out", folder / "fedclip_table"))
    assert list(held_out.columns) == [words[-1], "mean"]
    assert len(cost) == (5 if "--only" in flags else 7)


@pytest.mark.parametrize("flags", [flags for flags in commands_of("cost") if "--runs" in flags], ids=" ".join)
def test_bytes_to_an_accuracy_are_told_of_finished_runs(flags, fedclip_runs):
    text = printed("cost", *flags[:-1], fedclip_runs[1], "--repeats", 0)
    (table,) = tables(text)
    assert list(table.index) == [measure for measure in ("validation", "own test", "held-out") for _ in range(4)]
    assert table.method.nunique() == 4
    assert f"{TINY / ADAPTER:.3g} times the bytes a round" in " ".join(text.split())


def test_a_step_of_all_of_clip_costs_more_than_one_on_features_and_split_learning_sends_activations():
    assert [] in commands_of("cost")
    table, split = tables(printed("cost"))
    trained, seconds = (
        [float(cell.split()[0].replace(",", "")) for cell in table[name]] for name in ("trained", "CPU seconds")
    )
    cached, published, whole, lora, prompt = seconds
    assert trained == [2 * (256 * 256 + 256), trained[0], 43_224_449, 4 * 40_960 / 4, 16 * 256]
    assert cached < published < whole and cached < min(lora, prompt)

    # ViT-S-32-alt: of 4 images, 1 + 49 tokens with 384 numbers of 4 bytes each, and the logits.
    step = 4 * (50 * 384 + len(parse("dataset", {"name": "glyphs", "split": "concepts"}).load(None).classes)) * 4
    assert len(split) == 3
    for cut in ("after the patch embedding", "after block 6 of 12"):
        row = split.loc[f"split learning, cut {cut}"]
        assert row["MB up a step"] == row["MB down a step"] == f"{step / 1e6:.4g}"
        assert row["MB in a round of 10 steps"] == f"{2 * 10 * step / 1e6:,.4g}"
        assert row["as FedAvg at"] == f"{2 * 4 * 43_224_449 / (2 * step):,.0f} steps"


@pytest.mark.parametrize("flags", commands_of("methods"), ids=" ".join)
def test_the_table_of_methods_has_their_parameters_and_bytes(flags, cluster, folder):
    shown, choice = tables(printed("methods", *on_data(folder, flags), "--out", folder / "methods"))
    assert list(shown.index) == ["zero-shot", "FedCLIP", "FedPGP"] and list(choice.index) == ["FedCLIP", "FedPGP"]
    assert shown["parameters"].tolist()[1:] == [f"{ADAPTER:,}", "2,624"]
    # The median of a protocol with 4 clients and of one with 5.
    assert shown["MB in all"]["FedCLIP"] == f"{4.5 * ADAPTER * BOTH_WAYS:.2f}"
    assert "nan" not in shown.to_string()
    file = next((folder / "methods").glob("*.html"))
    told = explore(
        file,
        """
        const [panel] = all(".panel"), [entry] = all(".legend input"), [table] = all("table");
        const [clip] = told(panel).series;
        const values = point(panel, clip.x[0], clip.y[0]), names = rows(table).map(([name]) => name);
        const hidden = () => names.filter((name, index) => !shown(table.tBodies[0].rows[index]));
        entry.click();
        const [series, gone] = [all(`.panel .series-0`).some(shown), hidden()];
        entry.click();
        return { values, series, gone, back: hidden(), entry: entry.value, names };
        """,
    )
    first, components, source, differs = told["values"]
    assert first.startswith("FedCLIP: ") and f" MB, {ADAPTER:,} trained parameters" in first
    assert components == "fedclip with fedavg, image feature" and "arXiv 2302.13485" in source
    assert differs.startswith("1 difference: the code trains with all of CLIP in training mode.")
    assert told["entry"] == "image feature" and told["series"] is False and told["gone"] == ["FedCLIP"]
    assert told["back"] == [] and told["names"] == ["zero-shot", "FedCLIP", "FedPGP"]
    assert file.stat().st_size < 1_000_000 and "What each method is" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", commands_of("codecs"), ids=" ".join)
def test_codecs_are_compared_by_the_bytes_that_a_client_sends(flags, folder):
    out = folder / "codecs"
    (table,) = tables(printed("codecs", *on_data(folder, flags), "--out", out))
    assert list(table.index) == ["plain", "int8 both ways", "top 1 %"]
    up, down = table["kB up"].astype(float), table["kB down"].astype(float)
    assert up["plain"] == down["plain"] == down["top 1 %"] > down["int8 both ways"]
    assert up["plain"] > up["int8 both ways"] > up["top 1 %"]
    assert list(out.glob("*.svg"))


@pytest.mark.parametrize("flags", commands_of("robustness"), ids=" ".join)
def test_rules_are_set_against_attacks(flags, folder):
    accuracy, success = tables(printed("robustness", *on_data(folder, flags), "--out", folder / "robustness"))
    assert list(accuracy.index) == list(success.index) == ["fedavg", "krum", "fltrust"]
    assert list(accuracy.columns) == ["none", "label_flip", "ipm x 10"] and list(success.columns) == ["label_flip"]


@pytest.mark.parametrize("flags", commands_of("privacy"), ids=" ".join)
def test_privacy_is_compared_by_the_epsilon_that_was_spent(flags, folder):
    out = folder / "privacy"
    (table,) = tables(printed("privacy", *on_data(folder, flags), "--out", out))
    assert list(table.epsilon) == ["none", "8"]
    without, spent = table.spent
    assert without == "nan" and 7.9 < float(spent) <= 8
    assert list(out.glob("*.svg"))


@pytest.mark.parametrize("flags", commands_of("label_marginals"), ids=" ".join)
def test_scrambled_labels_put_zero_shot_at_chance_and_leave_the_majority_class_as_it_is(flags, folder):
    out = folder / "label_marginals"
    where = ["--dataset", "folder", "--data-dir", folder / "drawings", "--out", out]
    (table,) = tables(printed("label_marginals", *flags, *where))
    assert list(table.columns) == ["0.5, right", "0.5, scrambled"]
    assert list(table.index) == ["zero-shot", "own majority class", "prior", "linear probe, alone"]
    right, scrambled = (table[name].astype(float) for name in table)
    assert right["own majority class"] == scrambled["own majority class"]
    assert scrambled["zero-shot"] < right["zero-shot"] / 2
    assert (out / "folder.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_the_majority_class_of_a_client_is_that_of_its_train_rows(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    majority = runpy.run_path(str(FOLDER / "label_marginals.py"))["majority"]
    rows = [(0, "cat", "train", 5), (0, "dog", "train", 3), (0, "cat", "test", 1), (0, "dog", "test", 3)]
    rows += [(1, "dog", "train", 2), (1, "dog", "val", 9), (1, "owl", "val", 9), (1, "dog", "test", 1)]
    partition = pd.DataFrame(rows, columns=["client", "label", "split", "rows"]).assign(domain="ink")
    # Client 0 has most cats, as a quarter of its test rows; client 1 only dogs to train on, and to be tested on.
    assert majority(SimpleNamespace(partition=partition)) == (1 / 4 + 1) / 2


@pytest.mark.parametrize("flags", commands_of("real_clip"), ids=" ".join)
def test_settings_of_fedclip_are_compared_on_features_of_the_users_own(flags, cluster, folder):
    data = folder / "features_of_10_classes"
    if not data.exists():
        write_features(data, PACS, classes=10)
    flags = [str(data) if word == "DIR" else word for word in flags]
    skew, new = tables(printed("real_clip", *flags, "--out", folder / "real_clip"))
    assert list(skew.columns) == ["personalization", "gate off 1/D, %"]
    assert list(new.columns) == ["local", "base", "new", "harmonic_2", "gate off 1/D, %"]
    for table in (skew, new):
        assert len(table) == 4 and table.index[0] == "zero-shot" and table.index[-1] == "linear probe"
        assert all(0 <= float(cell) <= 100 for cell in table.iloc[:, 0])
        gates = table["gate off 1/D, %"].astype(float)
        assert gates.isna().tolist() == [True, False, False, True] and (gates[1:3] >= 0).all()


@pytest.mark.parametrize("flags", commands_of("client_count"), ids=" ".join)
def test_more_clients_send_more_and_what_is_done_is_not_done_again(flags, cluster, folder):
    out = folder / f"client_count-{len(flags)}"
    flags = on_data(folder, flags) if "--dataset" in flags else flags
    first = printed("client_count", *flags, "--out", out)
    rows = pd.read_parquet(out / "rows.parquet")
    width = 16 if "--dataset" in flags else 128
    assert (rows.bytes == 2 * rows.trained * 2 * 4 * 2 * (width**2 + width)).all()
    assert len(tables(first)) == 6 and "More clients" in (out / f"{out_name(flags)}.html").read_text(encoding="utf-8")
    done = (out / "rows.parquet").stat().st_mtime_ns
    assert printed("client_count", *flags, "--out", out) == first
    assert (out / "rows.parquet").stat().st_mtime_ns == done


def out_name(flags: list[object]) -> object:
    return flags[flags.index("--dataset") + 1] if "--dataset" in flags else "synthetic"


@pytest.mark.parametrize("flags", commands_of("sweep"), ids=" ".join)
def test_a_sweep_is_timed_against_a_bare_loop(flags, cluster, folder):
    (table,) = tables(printed("sweep", *on_data(folder, flags)))
    loop, sweep = (int(table.iloc[row, 0].split()[0].replace(",", "")) for row in (0, 1))
    overhead = int(table.iloc[2, 0].split()[0].replace(",", ""))
    assert abs(sweep - loop - overhead) <= 1  # each of the three is rounded
    assert loop > 0 and sweep > 0


@pytest.mark.parametrize("flags", commands_of("encode"), ids=" ".join)
def test_encoding_is_timed_against_a_plain_loop(flags):
    (table,) = tables(printed("encode", *flags))
    assert set(table.index) == {"tiny"} and len(table) == 4
    speeds, ratios = (table[name].astype(float).to_numpy() for name in ("images/s", "against the loop"))
    assert (speeds > 0).all() and ratios == pytest.approx(speeds / speeds[0], abs=0.1)


@pytest.mark.parametrize("flags", commands_of("paper"), ids=" ".join)
def test_the_papers_experiment_is_scaled_by_what_its_loop_passes_through_the_towers(flags):
    text = printed("paper", *flags)
    parts, ratios = tables(text)
    count, each, hours = (parts[name].str.replace(",", "").astype(float) for name in ("count", "ms each", "hours"))
    train, part = 1228 + 1406 + 1002 + 2357, 409 + 468 + 334 + 785  # 60 and 20 percent of PACS's domains
    images = 3 * (train + 2 * part) + 9991  # of one round's evaluations, over the four held-out domains
    assert count.tolist() == [200 * 3 * train, 200 * images, 200 * 4 * 10, 9991, 4, 4 * 200]
    assert hours.to_numpy() == pytest.approx(count * each / 3.6e6, rel=0.01, abs=1e-3)
    assert f"{200 * (3 * train + images):,} against 9,991" in text
    published = parts.index == "published loop"
    there = ratios["ratio"].str.replace(",", "").astype(float)
    assert there["with encoding"] == pytest.approx(hours[published].sum() / hours[~published].sum(), rel=0.02, abs=0.6)
    assert 0 < there["with encoding"] <= there["features already there"]


@pytest.mark.parametrize("flags", commands_of("towers"), ids=" ".join)
def test_a_step_through_the_text_tower_is_timed_against_the_published_way(flags):
    table, evaluations = tables(printed("towers", *flags))  # fails itself where the ways have other results
    assert list(table.index[::2]) == ["PromptFL", "FedTPG", "LoRA, text"]
    seconds, ratios = (table[name].astype(float).to_numpy() for name in ("s a step", "against fedsim"))
    assert (seconds > 0).all() and (ratios[1::2] == 1).all()
    assert ratios[::2] == pytest.approx(seconds[::2] / seconds[1::2], rel=0.05)  # of seconds with four digits
    once = evaluations["passes, fedsim"].astype(int)
    assert once.to_dict() == {"PromptFL": 1, "FedTPG": 1, "LoRA, text": 1, "PromptFolio": 4}  # 3 have a prompt each
    assert (evaluations["passes, without memory"].astype(int) >= 3).all()


def test_what_a_command_costs_is_printed_after_it():
    command = [sys.executable, FOLDER / "_measure.py", sys.executable, "-c", "print('done')"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peaks = dict(re.findall(r"^peak MiB, (\w+): (\d+)$", out, flags=re.MULTILINE))
    assert "done" in out and peaks.keys() == {"all", "root"}


def test_a_process_is_watched_though_its_parent_has_ended():
    tree_of = runpy.run_path(str(FOLDER / "_measure.py"))["Tree"]
    script = "bash -c 'sleep 600 & echo $! $$; read' && read"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(["bash", "-c", script], **pipes) as outer:
        orphan, parent = map(int, outer.stdout.readline().split())
        try:
            tree = tree_of(outer.pid)
            assert tree.look() == [outer.pid, parent, orphan]
            print(file=outer.stdin, flush=True)
            deadline = time.monotonic() + 60
            while Path(f"/proc/{parent}").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert tree.look() == [outer.pid, orphan]
        finally:
            os.kill(orphan, signal.SIGKILL)
            outer.communicate("\n", timeout=60)


def test_a_gpus_table_can_be_made_on_a_cpu():
    assert [] in commands_of("gpu")
    (table,) = tables(printed("gpu", "--only", "ceilings,adapter,towers"))  # the others encode all drawings
    assert set(table.index) == {"ceilings", "adapter", "towers"}
    bits = table[table.what.str.endswith("again")].iloc[:, 1]
    assert len(bits) == 5 and (bits == "the same bits").all()


@pytest.fixture(scope="module")
def engine_rows(folder) -> tuple[str, pd.DataFrame]:
    """What `engine.py --quick` prints, once all engines that are installed have run."""
    text = printed("engine", "--out", folder / "engine")
    return text, tables(text)[0]


def test_every_row_of_the_engine_is_measured(engine_rows):
    text, rows = engine_rows
    ours = rows[~rows.index.isin(["flower", "pfl", "start", "gpu"])]
    assert set(ours.index) == {"cpu", "floor", "scale", "actors", "ray"}
    assert (ours["runs"] == "1 / 1").all() and all(float(ratio) >= 0 for ratio in ours["ratio"])
    engines, apart = re.search(r"clients (\d+) engines end on the same weights: .* within (\S+) of", text).groups()
    assert int(engines) >= 6 and float(apart) < 1e-4


@pytest.mark.parametrize("peer", ["flower", "pfl"])
def test_a_peer_is_measured_where_it_is_installed(peer, engine_rows):
    ratio = engine_rows[1].ratio[peer]
    if ratio == "not installed":
        pytest.skip(f"{peer} is not installed: benchmarks/peers/README.md says how")
    assert float(ratio) > 0


@pytest.mark.parametrize("flags", [flags for flags in commands_of("engine") if flags], ids=" ".join)
def test_rows_of_the_engine_are_printed_again_without_a_run(flags, engine_rows, folder):
    out = folder / "engine"
    before = (out / "rows.jsonl").read_text(encoding="utf-8")
    flags = [str(out / "rows.jsonl") if word.endswith(".jsonl") else word for word in flags]
    assert printed("engine", *flags, "--out", out) == engine_rows[0]
    assert (out / "rows.jsonl").read_text(encoding="utf-8") == before

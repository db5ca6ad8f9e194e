"""What a config file says is what the same words say on the command line."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import fedsim
from fedsim import Config, InputError, run
from fedsim.__main__ import main
from fedsim.cli.flags import parse_run, run_parser
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.config import read_yaml
from fedsim.registry import KINDS, available, find, parse
from fedsim.sweep.command import sweep_parser
from fedsim.sweep.config import Sweep


def read(tmp_path: Path, text: str) -> dict:
    file = tmp_path / "some.yaml"
    file.write_text(text, encoding="utf-8")
    return read_yaml(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("none", "none"),
        ("2024-01-01", "2024-01-01"),
        ("0x1f", "0x1f"),
        ("1e-3", "1e-3"),
        ("10", 10),
        ("-0.5", -0.5),
        ("5.0e-05", 5e-5),
        ("true", True),
        ("null", None),
        ("", None),
    ],
)
def test_only_plain_decimal_numbers_true_false_and_null_are_not_text_in_yaml(text, value, tmp_path):
    assert read(tmp_path, f"a: {text}") == {"a": value}


@pytest.mark.parametrize("text", ["010", "1_000", "7"])
def test_a_seed_is_the_same_in_yaml_and_as_a_flag(text, tmp_path):
    assert Config(**read(tmp_path, f"seed: {text}")).seed == parse_run(["--seed", text])[0].seed == int(text)


def test_text_and_numbers_survive_being_written_and_read(tmp_path):
    letters = random.Random(0)
    words = ["".join(letters.choices("0189._eE+-:~nofyt<=", k=letters.randrange(6))) for _ in range(2000)]
    numbers = [letters.gauss(0, 1) * 10 ** letters.randrange(-30, 30) for _ in range(200)]
    assert read(tmp_path, yaml.safe_dump({"a": words + numbers}))["a"] == words + numbers


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rounds: 3\nseed: 1\nrounds: 4", "line 3, is not YAML: rounds is given twice"),
        ("method:\n  lr: 1\n  lr: 2", "line 3, is not YAML: lr is given twice"),
        ("rounds: true", "rounds must be a number, got True"),
        ("train_share: true", "train_share must be a number, got True"),
        ("method: {batch_size: true}", "method.batch_size must be a number, got True"),
        ("rounds: 1:30", "rounds must be an integer, got '1:30'"),
        ("partition: {name: dirichlet, alpha: .inf}", "partition.alpha must be a finite number, got inf"),
        ("method: {lr: .nan}", "method.lr must be a finite number, got nan"),
        ("held_out: 'ink,,oil'", "held_out must be a list without an empty part, got 'ink,,oil'"),
        ("call_timeout_s: .inf", "call_timeout_s must be a finite number, got inf"),
    ],
)
def test_a_config_file_with_a_doubtful_value_is_refused(text, sentence, tmp_path):
    with pytest.raises(InputError) as refused:
        Config(**read(tmp_path, text))
    assert sentence in str(refused.value)


def floats() -> list[tuple[str, str, str]]:
    return [
        (kind, name, field)
        for kind in KINDS
        for name in available(kind)
        for field, about in find(kind, name).__pydantic_fields__.items()
        if "float" in str(about.annotation)
    ]


@pytest.mark.parametrize(("kind", "name", "field"), floats())
def test_no_field_of_any_component_is_infinite(kind, name, field):
    for value in ("inf", "-inf", "nan", "1e999", float("inf")):
        with pytest.raises(InputError, match=field):
            parse(kind, {"name": name, field: value})


def test_no_field_of_a_config_or_a_sweep_is_infinite_or_a_truth():
    for field, about in Config.model_fields.items():
        if "float" in str(about.annotation) and field != "dtype":
            with pytest.raises(InputError, match=f"{field} must be a finite number"):
                Config(**{field: "inf"})
    with pytest.raises(InputError, match="trials must be a number, got True"):
        Sweep(config=Config(), trials=True)


# Domains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("ink, noto", ("ink", "noto")),
        ("ink,ink", ("ink",)),
        ("none", ("none",)),
        ("", ()),
        (["photo, studio", "no"], ("photo, studio", "no")),
        (7, ("7",)),
        (None, ()),
    ],
)
def test_held_out_domains_are_names_separated_by_commas_or_a_list(value, names):
    assert Config(held_out=value).held_out == names


@pytest.fixture
def odd_domains(features_dir, tmp_path):
    """The small features, with domains called ink, none and "photo, studio"."""
    rows = pd.read_parquet(features_dir / "features.parquet")
    rows["domain"] = rows.domain.replace({"oil": "none", "photo": "photo, studio"})
    rows.to_parquet(tmp_path / "features.parquet")
    pd.read_parquet(features_dir / "classes.parquet").to_parquet(tmp_path / "classes.parquet")
    return tmp_path


def test_a_domain_called_none_is_held_out_and_one_with_a_comma_by_a_list_in_yaml(odd_domains, capsys):
    flags = ["--dataset", "features", "--data-dir", str(odd_domains), "--rounds", "0", "--actors", "0"]
    assert main(["run", *flags, "--held-out", "none", "--out", str(odd_domains / "a")]) == 0
    assert main(["run", *flags, "--held-out", "photo, studio", "--out", str(odd_domains / "b")]) == 2
    assert "a name with a comma needs a list in YAML: held_out: [...]" in capsys.readouterr().err
    file = odd_domains / "c.yaml"
    file.write_text('held_out: ["photo, studio"]', encoding="utf-8")
    assert main(["run", *flags, "--config", str(file), "--out", str(odd_domains / "c")]) == 0
    assert read_yaml(odd_domains / "c" / "config.yaml")["held_out"] == ["photo, studio"]


def test_blanks_around_the_commas_of_objectives_and_seeds_do_not_matter():
    sweep = Sweep(config=Config(), objective="validation, bytes", tuning_seeds="5, 6")
    assert (sweep.objective, sweep.tuning_seeds) == (("validation", "bytes"), (5, 6))


# Surroundings ---------------------------------------------------------------------------------------------------


def test_paths_are_absolute_since_workers_run_in_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE_DIR", "here")
    assert Config().cache_dir == tmp_path / "here"
    assert Config(cache_dir="there", data_dir="data").cache_dir == tmp_path / "there"
    shutil.copy(find_weights(*EMBEDDED).file, "mine.safetensors")
    assert find_weights("tiny", "mine.safetensors").pretrained == str(tmp_path / "mine.safetensors")


def outside(argv: list[str], folder: Path, **variables: str | None) -> subprocess.CompletedProcess:
    """fedsim in a process whose environment has these variables, or lacks those that are None."""
    environment = {name: value for name, value in (os.environ | variables).items() if value is not None}
    command = [sys.executable, "-m", "fedsim", *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True)


@pytest.fixture
def quick(features_dir) -> list[str]:
    """Flags of a run that takes no round, in its own process."""
    flags = ["--dataset", "features", "--data-dir", str(features_dir), "--held-out", "ink"]
    return ["run", *flags, "--method", "zero_shot", "--rounds", "0", "--actors", "0"]


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_the_page_is_utf_8_in_a_locale_that_is_not(quick, tmp_path):
    done = outside([*quick, "--out", "run"], tmp_path, **ASCII)
    assert done.returncode == 0, done.stderr
    assert "→" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_terminal_that_knows_only_ascii_shows_a_name_in_escapes(quick, tmp_path):
    done = outside([*quick, "--out", "r-données-照片"], tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert rb"r-donn\xe9es-\u7167\u7247" in done.stdout and (tmp_path / "r-données-照片" / "report.html").exists()


def test_a_user_without_a_home_needs_only_to_say_where_features_go(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDSIM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(no_home))
    assert "--cache-dir" in run_parser().format_help()
    with pytest.raises(InputError, match="no home folder for encoded features; give --cache-dir"):
        Config()
    assert Config(cache_dir=tmp_path).cache_dir == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Config().cache_dir == tmp_path / "fedsim"


def no_home(cls: type) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_tilde_of_no_user_is_refused():
    with pytest.raises(InputError, match="~no-such-user/x: there is no such user"):
        Config(out="~no-such-user/x")


def test_a_run_says_the_held_out_domains_of_its_config_once(config):
    assert run(config(held_out="ink, ink", rounds=0)).held_out == ["ink"]


# Help -----------------------------------------------------------------------------------------------------------


def test_help_says_the_defaults_of_the_embedded_experiment_too():
    text = " ".join(run_parser().format_help().split())
    assert "(default: 200; glyphs: 50)" in text and "comma-separated (glyphs: ink)" in text
    assert (
        "apply: those marked glyphs, method.objective cross_entropy, method.lr 0.003, method.weight_decay 0.0" in text
    )
    assert ": None" not in text and ": PydanticUndefined" not in text


def test_the_help_of_a_sweep_fits_on_one_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = sweep_parser().format_help().splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 80


def test_version_and_help_are_commands(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"fedsim {fedsim.__version__}\n"
    assert main(["help"]) == 0 and "fedsim sweep" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["help", "compare"])
    assert "Compare finished runs" in capsys.readouterr().out

"""The documentation shows the examples, and they become components where it says; CONTRIBUTING names real files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config as TraitsConfig

PROJECT = Path(__file__).parents[1]
# Where the documentation says that an example is saved.
SAVED = {"my_method.py": "fedsim/methods/bias.py", "my_rule.py": "fedsim/servers/nesterov.py"}


def test_the_documentation_shows_the_examples_as_they_are():
    readme, extending = (PROJECT / name for name in ("README.md", "docs/extending.md"))
    examples = [file.read_text(encoding="utf-8") for file in sorted((PROJECT / "examples").glob("*.py"))]
    shown = re.findall(r"```python\n(.*?)```", extending.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert shown[: len(examples)] == examples
    (part,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert part in examples[0]
    for name in SAVED.values():
        assert f"`{name}`" in readme.read_text("utf-8") and f"`{name}`:" in extending.read_text("utf-8")


def test_contributing_names_files_that_exist():
    folders = "fedsim", "tests", "examples", "tools"
    files = {file.name for folder in folders for file in (PROJECT / folder).rglob("*.py")} | {"NAME.py"}
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\w+\.py\b", text)) <= files


def executed(book, folder: Path) -> list[dict]:
    """What the cells of a notebook show, by MIME type."""
    with TemporaryDirectory() as sockets:  # not TCP, where other users could listen; paths of sockets must be short
        config = TraitsConfig(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        NotebookClient(book, timeout=300, resources={"metadata": {"path": folder}}, config=config).execute()
    return [output.get("data", {}) for cell in book.cells for output in cell.get("outputs", ())]


@pytest.mark.ray
def test_a_notebook_that_has_started_ray_runs_twice_on_that_cluster(features_dir, tmp_path):
    start = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport ray\nfrom ray_start import started"
    start += "\nstarted(ray.init, 'local', num_cpus=2, include_dashboard=False, log_to_driver=False)"
    fields = f"dataset='features', data_dir={str(features_dir)!r}, held_out=('ink',), rounds=1, actors=1, page=False"
    runs = [f"from fedsim import Config, run\nrun(Config({fields}, seed={seed}, out='{seed}'))" for seed in (0, 1)]
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code) for code in (start, *runs, "ray.shutdown()")]
    )
    shown = executed(book, tmp_path)
    assert sum(data.get("text/plain", "").startswith("<Report of fedclip with fedavg: round ") for data in shown) == 2
    assert [(tmp_path / str(seed) / "scores.parquet").exists() for seed in (0, 1)] == [True, True]


@pytest.mark.parametrize("notebook", sorted((PROJECT / "examples").glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom_and_shows_bars_tables_and_plots(notebook, tmp_path):
    book = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "notebooks are stored without output"
    shown = executed(book, tmp_path)
    assert any("image/png" in data for data in shown) and any("<table" in data.get("text/html", "") for data in shown)
    assert any("<div>training <progress max=10 value=10>" in data.get("text/html", "") for data in shown)


@pytest.mark.ray
def test_the_method_runs_on_an_actor_though_it_is_in_no_module(tmp_path):
    example = str(PROJECT / "examples" / "my_method.py")
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'generalization': 0." in done.stdout and (tmp_path / "runs" / "bias" / "report.html").exists()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project in which the examples are saved."""
    copy = tmp_path_factory.mktemp("copy") / "project"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "runs", "sweeps", "assets")
    shutil.copytree(PROJECT, copy, ignore=skipped)
    (copy / "fedsim" / "assets").symlink_to(PROJECT / "fedsim" / "assets")
    for name, place in SAVED.items():
        shutil.copy(PROJECT / "examples" / name, copy / place)
    return copy


def python(*words: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ALL_IN_ONE = """
import json, sys
from fedsim.__main__ import main
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 0
    print("---")
"""


def test_an_example_that_is_saved_is_a_flag_with_the_limits_of_its_parent(project, features_dir):
    components = "--method=bias", "--method.lr=0.3", "--server=nesterov"
    data = "--dataset=features", f"--data-dir={features_dir}", "--held-out=ink"
    run = ["run", *components, *data, "--rounds=2", "--actors=0", "--out=run"]
    commands = ["help", "bias"], ["list", "servers"], ["run", "--help"], run
    printed = python("-c", ALL_IN_ONE, json.dumps(commands), cwd=project)
    text, servers, flags, _ = printed.split("---\n", 3)
    assert text.startswith("--method bias\n\nA bias for each class on top of zero-shot CLIP.\n\nSource: ours.\n")
    assert "step size (default: 0.1; > 0; searched 1e-05:0.1:log)" in " ".join(text.split())
    assert "nesterov " in servers and flags.count("\n") <= 60
    assert (project / "run" / "report.html").exists()


def test_an_example_that_is_saved_passes_the_tests_of_all_components(project):
    contracts = "bias or nesterov or help_lists or one_way or every_method_says"
    tests = [file for file in sorted((project / "tests").glob("test_*.py")) if is_contract(file)]
    out = python(
        "-m", "pytest", "-n0", "-q", "-x", "-pno:cacheprovider", *map(str, tests), "-k", contracts, cwd=project
    )
    assert int(re.search(r"(\d+) passed", out)[1]) > 20


def is_contract(file: Path) -> bool:
    """Whether tests are made of what the registry lists, or test it."""
    return bool({"available", "one_way"} & set(re.findall(r"\w+", file.read_text(encoding="utf-8"))))

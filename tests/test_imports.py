"""Imports follow the arrows of the design and never go back."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fedsim

# A module may import those that stand before it; a package's files, their package and those before it.
ORDER = """
    errors events progress memory files yaml_files fields cache formats shares search_space rng registry params codecs
    attacks datasets partitions representations clip methods updates fleets servers privacy state class_tasks clients
    cluster folder encoding counts training config data schedule ledger reporting checkpoint prepare start federation
    simulate parallel_runs cli sweep __init__ __main__
""".split()  # noqa: SIM905

# The same within fedsim/reporting: from counts to tables, and from tables to what is shown.
REPORTING = "metrics tables accuracies report facts loggers parquet canvas plots html remarks page compare".split()  # noqa: SIM905


def stage(module: str) -> int:
    return ORDER.index(module.split(".")[1] if "." in module else "__init__")


def imported(path: Path) -> list[str]:
    """What importing the file, or calling what is in it, may import; not what it imports when run as a script."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_for_scripts(node)]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [(node.module, alias.name) for node in nodes for alias in node.names]
    modules = [where_is(name) if module == "fedsim" else module for module, name in names]
    return [module for module in modules if module and module.startswith("fedsim.")]


def is_for_scripts(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def where_is(name: str) -> str:
    """The module behind `from fedsim import name`; none behind the version, which the package asks for by itself."""
    return "" if name == "__version__" else fedsim._MODULE_OF.get(name, f"fedsim.{name}")


def test_imports_go_one_way():
    root = Path(fedsim.__file__).parent
    for path in root.rglob("*.py"):
        where = path.relative_to(root)
        own = where.parts[0].removesuffix(".py")
        for module in imported(path):
            assert stage(module) <= ORDER.index(own), f"{where} imports {module}"


def test_reporting_goes_from_counts_to_tables_to_pages():
    root = Path(fedsim.__file__).parent / "reporting"
    modules = {path.stem: imported(path) for path in root.glob("*.py") if path.stem != "__init__"}
    assert set(modules) == set(REPORTING)
    for own, names in modules.items():
        before = {f"fedsim.reporting.{name}" for name in REPORTING[: REPORTING.index(own)]}
        assert {name for name in names if name.startswith("fedsim.reporting")} <= before, own


@pytest.mark.parametrize("file", ["reporting/page.py", "reporting/remarks.py", "reporting/compare.py", "cli/show.py"])
def test_what_is_shown_is_drawn_from_tables_and_never_from_a_report(file):
    assert "fedsim.reporting.report" not in imported(Path(fedsim.__file__).parent / file)


def test_no_imports_form_a_circle():
    root = Path(fedsim.__file__).parents[1]
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.glob("fedsim/**/*.py")}
    graph = {module: {name for name in imported(path) if name in files} for module, path in files.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


def test_ray_is_imported_by_the_cluster_and_by_the_side_of_a_sweep_that_is_ray_tunes_alone():
    root = Path(fedsim.__file__).parent
    importing = set()
    for path in root.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        if "ray" in {name.partition(".")[0] for name in names}:
            importing.add(str(path.relative_to(root)))
    outside = {name for name in importing if not name.startswith("cluster/")}
    assert outside == {"sweep/search.py", "sweep/ray_tune.py"}


def test_every_module_has_its_place():
    root = Path(fedsim.__file__).parent
    there = {path.stem for path in root.glob("*.py")} | {path.parent.name for path in root.glob("*/__init__.py")}
    assert there == set(ORDER)


def test_every_module_can_be_read_in_one_sitting():
    files = list(Path(fedsim.__file__).parent.rglob("*.py"))
    lines = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(files) > 100 and not {file: count for file, count in lines.items() if count > 350}


def test_every_text_file_is_read_and_written_in_an_encoding_that_is_named():
    root = Path(fedsim.__file__).parents[1]
    for path in (path for folder in ("fedsim", "benchmarks", "tools") for path in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node):
                assert "encoding" in {word.arg for word in node.keywords}, f"{path}, line {node.lineno}"


def opens_text(call: ast.Call) -> bool:
    """Whether it is `path.read_text()`, `path.write_text(...)`, or some `open` whose mode is one of text."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    words = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
    modes = [word.value for word in words if isinstance(word, ast.Constant) and word.value in ("r", "w", "a", "x")]
    if name == "open":
        return bool(modes)
    return isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text")


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["help"], ["list"], ["watch", "nowhere"], ["stop", "nowhere"]]
)
def test_a_command_that_computes_nothing_does_not_import_torch(argv):
    program = "import sys; from fedsim.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, timeout=300).returncode == 0


def test_everything_public_is_where_its_name_says_and_is_seen_by_editors():
    source = ast.parse(Path(fedsim.__file__).read_text(encoding="utf-8"))
    shown = {
        name.name: node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert {name: shown.get(name) for name in fedsim.__all__} == fedsim._MODULE_OF
    assert all(getattr(fedsim, name).__name__ == name for name in fedsim.__all__)
    with pytest.raises(AttributeError, match="module 'fedsim' has no attribute 'Runner'"):
        _ = fedsim.Runner


def test_the_tests_of_a_file_run_in_one_process(request):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("all tests run in this process")
    assert request.node.nodeid.endswith("@test_imports")  # as tests/conftest.py says, and xdist has understood

"""The scripts that made the embedded images and model are not in the package, and still run."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fedsim

PACKAGE = Path(fedsim.__file__).parent


def test_assets_hold_data_and_no_code():
    files = [file for file in (PACKAGE / "assets").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".md", ".parquet", ".safetensors", ".txt"}


@pytest.mark.parametrize("script", ["glyphs/build.py", "tiny/measure.py", "tiny/train.py"])
def test_a_script_runs_from_any_folder(script, tmp_path):
    if script != "tiny/measure.py" and find_spec("resvg_py") is None:
        pytest.skip("resvg_py is not installed; `uv run --group assets` installs it")
    command = [sys.executable, str(PACKAGE.parent / "tools" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr

"""What the README shows is run as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from fedsim.__main__ import parse_run

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_method_in_the_readme_runs_on_an_actor_though_it_is_in_no_module(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'generalization': 0." in done.stdout and (tmp_path / "runs" / "bias" / "report.html").exists()


def test_every_command_line_in_the_readme_is_understood():
    commands = re.findall(r"^    uv run fedsim run (.*?)(?: +#.*)?$", README, flags=re.MULTILINE)
    assert len(commands) >= 5
    for flags in commands:
        parse_run(shlex.split(flags))


def test_the_readme_has_two_commands_that_do_all_the_set_up():
    assert re.findall(r"^    (pip install -q uv && uv run .*)$", README, flags=re.MULTILINE) == [
        "pip install -q uv && uv run fedsim run",
        "pip install -q uv && uv run pytest",
    ]

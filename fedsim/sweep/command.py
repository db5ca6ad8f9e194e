"""`fedsim sweep`: the flags of `fedsim run` describe the base config, further flags the search around it."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from fedsim.cli.flags import DETACH, Parser, parse_run, with_dashes
from fedsim.cli.help import flag
from fedsim.cli.launch import launch
from fedsim.errors import InputError, counted
from fedsim.formats import percent, spread
from fedsim.sweep.config import SWEEP_FIELDS, Sweep, read_sweep
from fedsim.sweep.prepare import prepare_sweep
from fedsim.sweep.results import SweepResult
from fedsim.sweep.search import run_sweep

FIELDS = [*SWEEP_FIELDS, "out"]
SEVERAL = "search", "objective", "tuning_seeds", "report_seeds", "loggers"
EPILOG = """\
All flags of `fedsim run` describe the base config; `fedsim help NAME` lists
those of a method or server rule, with their search ranges. A sweep has its own
seeds, so there is no --seed. --search takes:

  method.lr                 over the range that the method declares for it
  method.* server.*         all ranges that they declare (the default)
  method.lr=1e-5:1e-2       over a custom range; log-uniform if the declared
                            range is, or with :log or :linear
  method.batch_size=16,32   over custom values
  method=fedclip,probe      over components; method.lr then stands for
                            fedclip.lr and probe.lr
  cohort=10:100             over a field of the config itself
"""


def sweep_command(argv: Sequence[str]) -> int:
    """fedsim sweep: a search over hyperparameters."""
    sweep, origin = parse_sweep([word for word in argv if word != DETACH])
    check, work = partial(prepare_sweep, sweep), partial(run_sweep, sweep)
    return launch(["sweep", *argv], sweep.folder(), f"around {origin}", check, work, _show, "sweep")


def parse_sweep(argv: Sequence[str]) -> tuple[Sweep, str]:
    """The Sweep that flags describe, and where it starts from in a few words, for the user."""
    argv = with_dashes(argv)
    if seeds := [word for word in argv if word.partition("=")[0] == "--seed"]:
        raise InputError(f"no flag {seeds[0]}: a sweep has --tuning-seeds, and --report-seeds to report on")
    flags, others = sweep_parser().parse_known_args(argv)
    fields = vars(flags)
    file = fields.pop("config", None)
    in_file, base = read_sweep(file) if file else ({}, None)
    names = map(flag, FIELDS)
    config, origin = parse_run(others, "sweep", names, base=None if file is None else (base or {}, f"config {file}"))
    return Sweep(config=config.model_copy(update={"out": None}), **in_file | fields), origin


def sweep_parser() -> argparse.ArgumentParser:
    """The flags that only `fedsim sweep` has: one for each field of Sweep."""
    parser = Parser(
        prog="fedsim sweep",
        description="Search over hyperparameters; the same command again resumes it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of a sweep, such as tune/adapter.yaml, or of a base config",
    )
    for name in FIELDS:
        field = Sweep.model_fields[name]
        default = _default(field.default)
        about = f"{field.description}{default and f' (default: {default})'}"
        several: dict[str, Any] = {"nargs": "*"} if name in SEVERAL else {}
        parser.add_argument(flag(name), dest=name, metavar=_metavar(name), help=about.replace("%", "%%"), **several)
    parser.add_argument(DETACH, action="store_true", help="run in the background; fedsim watch shows the progress")
    return parser


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "method.* server.*"
    return "" if value is None else str(value)


def _metavar(name: str) -> str:
    names = dict.fromkeys(("objective", "sampler", "pruner", "loggers"), "NAME")
    return {"search": "PARAMETER", "out": "DIR", **names}.get(name, "N")


def _show(console: Console, result: SweepResult) -> None:
    states = ", ".join(f"{count} {state}" for state, count in result.trials.state.value_counts().items())
    console.print(f"{counted(len(result.trials), 'trial')}: {states}; the best is trial {result.best_trial}")
    if len(result.reporting):
        console.print(_reporting_table(result.reporting))
    for file in ("sweep.html", "best.yaml", "trials.parquet", "study.db"):
        console.print(f"  {result.folder / file}", soft_wrap=True)


def _reporting_table(reporting: pd.DataFrame) -> Table:
    """The base and the best config on the reporting seeds."""
    heads = {
        "validation": "validation rows",
        "personalization": "own test rows",
        "worst_tenth": "worst tenth",
        "generalization": "held-out domain",
    }
    groups = reporting.groupby("config")[list(heads)]
    mean, deviation = groups.mean(), groups.std()
    table = Table(title="accuracy in percent on the reporting seeds, mean ± deviation")
    for head in ("", *heads.values()):
        table.add_column(head, justify="right" if head else "left")
    for config in mean.index:
        table.add_row(config, *(spread(percent(mean[name][config]), deviation[name][config]) for name in heads))
    return table

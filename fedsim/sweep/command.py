"""`fedsim sweep`: the flags of `fedsim run` describe the base config, and some more the search around it."""

import argparse
from collections.abc import Sequence
from functools import partial

import pandas as pd
from rich.console import Console
from rich.table import Table

from fedsim.cli.flags import DETACH, Parser, dashed, flag, parse_run
from fedsim.cli.progress import launch
from fedsim.errors import InputError
from fedsim.formats import percent, spread
from fedsim.sweep.sweep import Found, Sweep, prepare_sweep, run_sweep

# Its --out as well: that of a config file is the folder of a run.
OURS = [name for name in Sweep.model_fields if name != "config"]
SEVERAL = "search", "objective", "tuning_seeds", "report_seeds", "loggers"
EPILOG = """\
All flags of `fedsim run` describe the config to start from; `fedsim run --help` lists them, and which hyperparameters
declare a range. A sweep has seeds of its own, so there is no --seed. What can be said after --search:

  method.lr                 over the range that the chosen method declares for it
  method.* server.*         all that they declare; this is searched where nothing is said
  method.lr=1e-5:1e-2       over a range of one's own; by logarithm if the declared one is, or as :log or :linear say
  method.batch=16,32,64     over some values
  method=fedclip,probe      over components; method.lr is then each one's own
  cohort=10:100             a field of the config itself
"""


def sweep_command(argv: Sequence[str]) -> int:
    """fedsim sweep: searches, with its progress and a small table at the end."""
    sweep, origin = parse_sweep([word for word in argv if word != DETACH])
    check, work = partial(prepare_sweep, sweep), partial(run_sweep, sweep)
    return launch(["sweep", *argv], sweep.folder(), f"around {origin}", check, work, _show, "sweep")


def parse_sweep(argv: Sequence[str]) -> tuple[Sweep, str]:
    """The Sweep that flags describe, and a sentence on where it starts from."""
    if seeds := [word for word in argv if word.partition("=")[0] == "--seed"]:
        raise InputError(f"no flag {seeds[0]}: a sweep has --tuning-seeds, and --report-seeds to report on")
    ours, rest = sweep_parser().parse_known_args([dashed(word) for word in argv])
    config, origin = parse_run(rest, "sweep", map(flag, OURS))
    return Sweep(config=config.model_copy(update={"out": None}), **vars(ours)), origin


def sweep_parser() -> argparse.ArgumentParser:
    """The flags that `fedsim run` has not got: one for each field of Sweep."""
    parser = Parser(
        prog="fedsim sweep",
        description="Search over hyperparameters; the same command again goes on with it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name in OURS:
        field = Sweep.model_fields[name]
        default = field.default
        if isinstance(default, tuple):
            default = " ".join(map(str, default)) or "method.* server.*"
        about = f"{field.description}" + ("" if default is None else f" (default: {default})")
        several = {"nargs": "*"} if name in SEVERAL else {}
        parser.add_argument(flag(name), dest=name, metavar=_metavar(name), help=about.replace("%", "%%"), **several)
    parser.add_argument(DETACH, action="store_true", help="go on without this terminal; fedsim watch picks it up again")
    return parser


def _show(console: Console, found: Found) -> None:
    told = ", ".join(f"{count} {state}" for state, count in found.trials.state.value_counts().items())
    console.print(f"{len(found.trials)} trials: {told}; the best is trial {found.number}")
    if len(found.reporting):
        console.print(_reported(found.reporting))
    for file in ("sweep.html", "best.yaml", "trials.parquet", "study.db"):
        console.print(f"  {found.folder / file}", soft_wrap=True)


def _reported(reporting: pd.DataFrame) -> Table:
    """The base and the best config on the reporting seeds."""
    heads = {
        "validation": "validation rows",
        "personalization": "own test rows",
        "worst_tenth": "worst tenth",
        "generalization": "held-out domain",
    }
    by = reporting.groupby("which")[list(heads)]
    mean, deviation = by.mean(), by.std()
    table = Table(title="accuracy in percent on the reporting seeds, mean ± deviation")
    for head in ("", *heads.values()):
        table.add_column(head, justify="right" if head else "left")
    for which in mean.index:
        table.add_row(which, *(spread(percent(mean[name][which]), deviation[name][which]) for name in heads))
    return table


def _metavar(name: str) -> str:
    known = {"search": "WHAT", "out": "DIR"} | dict.fromkeys(("objective", "sampler", "pruner", "loggers"), "NAME")
    return known.get(name, "N")

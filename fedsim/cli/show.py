"""The tables that a finished command prints."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedsim.errors import listing
from fedsim.formats import number, percent

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.reporting.report import Report

FILES = "report.html", "scores.parquet", "rounds.parquet", "adapter.safetensors", "config.yaml"


def show_run(console: Console, report: "Report", folder: Path) -> None:
    """The accuracies of a run, next to those of zero-shot CLIP, and where its files are."""
    from fedsim.reporting.page import remarks, rows_tested

    for remark in remarks(report):
        console.print(remark)
    counts = rows_tested(report)
    models = {"zero-shot CLIP": report.zero_shot_summary(), _name_of(report): report.summary()}
    for title, heads in _tables(report).items():
        table = Table(title=title)
        for head in ("", *heads.values()):
            table.add_column(head, justify="right" if head else "left")
        for model, accuracies in models.items():
            table.add_row(model, *(percent(accuracies[key]) for key in heads))
        if counts.keys() & heads.keys():
            table.add_row("test rows", *(number(counts[key]) if key in counts else "" for key in heads))
        console.print(table)
    for file in FILES:
        console.print(f"  {folder / file}", soft_wrap=True)


def _name_of(report: "Report") -> str:
    return f"{report.experiment['method']['name']}, {report.experiment['server']['name']}"


def _tables(report: "Report") -> dict[str, dict[str, str]]:
    """By title of a table, the measures in it and their column heads."""
    summaries = report.zero_shot_summary(), report.summary()
    heads = {"generalization": f"held-out domain ({listing(report.held_out)})"} if report.held_out else {}
    heads |= {"personalization": "clients' own test rows", "worst_tenth": "worst tenth of clients"}
    if any(abs(means["personalization_own"] - means["personalization"]) > 0 for means in summaries):
        heads["personalization_own"] = "own test rows among own classes"
    tables = {f"accuracy in percent, round {report.chosen_round} of {report.last_round}": heads}
    if report.new_classes:
        tables["base and new classes, and harmonic means"] = {
            "local": "local",
            "base": "base",
            "new": "new",
            "harmonic_2": "of base, new",
            "harmonic_3": "of all three",
        }
    return tables


def rich_table(frame: "pd.DataFrame") -> Table:
    if len(frame) < len(frame.columns):  # transposed: many columns of a few runs would not fit
        frame = frame.set_index("name").T.reset_index(names="name")
    table = Table()
    for index, column in enumerate(frame.columns):
        table.add_column(str(column), justify="right" if index else "left", overflow="fold", no_wrap=not index)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    return table

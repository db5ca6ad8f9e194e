"""The tables that a finished command prints."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.reporting.tables import Tables

FILES = "report.html", "scores.parquet", "rounds.parquet", "adapter.safetensors", "config.yaml"


def show_run(console: Console, tables: "Tables", folder: Path) -> None:
    """Prints the accuracies of a run, its gain over zero-shot CLIP, and where its files are."""
    from fedsim.reporting.accuracies import accuracies
    from fedsim.reporting.remarks import comparison, remarks

    for remark in filter(None, [*remarks(tables), comparison(tables)]):
        console.print(remark)
    for title, rows in accuracies(tables).items():
        table = Table(title=title)
        for head in ("", *rows.columns):
            table.add_column(head, justify="right" if head else "left")
        for row in rows.itertuples():
            table.add_row(*row)
        console.print(table)
    for file in (name for name in FILES if (folder / name).exists()):  # --page false leaves one out
        console.print(f"  {folder / file}", soft_wrap=True)


def rich_table(frame: "pd.DataFrame") -> Table:
    if len(frame) < len(frame.columns):  # transposed: many columns of a few runs would not fit
        frame = frame.set_index("name").T.reset_index(names="name")
    table = Table()
    for index, column in enumerate(frame.columns):
        table.add_column(str(column), justify="right" if index else "left", overflow="fold", no_wrap=not index)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    return table

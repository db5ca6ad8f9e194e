"""The tables that a finished command prints."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fedsim.errors import listing
from fedsim.formats import difference, number, percent

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.reporting.tables import Tables

FILES = "report.html", "scores.parquet", "rounds.parquet", "adapter.safetensors", "config.yaml"


def show_run(console: Console, tables: "Tables", folder: Path) -> None:
    """Prints the accuracies of a run, its gain over zero-shot CLIP, and where its files are."""
    from fedsim.reporting.remarks import comparison, remarks, rows_tested
    from fedsim.reporting.tables import TUNED, ZERO_SHOT

    for remark in filter(None, [*remarks(tables), comparison(tables)]):
        console.print(remark)
    tested = rows_tested(tables)
    experiment = tables.experiment
    name = f"{experiment['method']['name']}, {experiment['server']['name']}"
    zero_shot, trained = tables.summary(ZERO_SHOT), tables.summary()
    tuned = tables.summary(TUNED) if tables.tuned else None
    for title, heads in _heads(tables, list(filter(None, (zero_shot, trained, tuned)))).items():
        table = Table(title=title)
        for head in ("", *heads.values()):
            table.add_column(head, justify="right" if head else "left")
        for model, accuracies in {"zero-shot CLIP": zero_shot, name: trained}.items():
            table.add_row(model, *(percent(accuracies[key]) for key in heads))
        table.add_row("gain, points", *(difference(zero_shot[key], trained[key]) for key in heads))
        if tuned:
            table.add_row("tuned models", *(percent(tuned[key]) for key in heads))
        if tested.keys() & heads.keys():
            table.add_row("test rows", *(number(tested[key]) if key in tested else "" for key in heads))
        console.print(table)
    for file in (name for name in FILES if (folder / name).exists()):  # --page false leaves one out
        console.print(f"  {folder / file}", soft_wrap=True)


def _heads(tables: "Tables", means: list[dict[str, float]]) -> dict[str, dict[str, str]]:
    """By title of a printed table, the measures in it and their column heads."""
    heads = {"generalization": f"held-out domain ({listing(tables.held_out)})"} if tables.held_out else {}
    heads |= {"personalization": "clients' own test rows", "worst_tenth": "worst tenth of clients"}
    if any(abs(model["personalization_own"] - model["personalization"]) > 0 for model in means):
        heads["personalization_own"] = "own test rows among own classes"
    if "neighbor" in means[0]:
        heads["neighbor"] = "other clients' test rows"
    if "attack_success" in means[0]:
        heads["attack_success"] = "attack success"
    titles = {f"accuracy in percent, round {tables.chosen_round} of {tables.last_round}": heads}
    if tables.new_classes:
        titles["base and new classes, and harmonic means"] = {
            "local": "local",
            "base": "base",
            "new": "new",
            "harmonic_2": "harmonic mean (base, new)",
            "harmonic_3": "harmonic mean (local, base, new)",
        }
    if "head" in means[0]:
        titles["own test rows by class, from frequent to rare"] = {part: part for part in ("head", "medium", "tail")}
    return titles


def rich_table(frame: "pd.DataFrame") -> Table:
    if len(frame) < len(frame.columns):  # transposed: many columns of a few runs would not fit
        frame = frame.set_index("name").T.reset_index(names="name")
    table = Table()
    for index, column in enumerate(frame.columns):
        table.add_column(str(column), justify="right" if index else "left", overflow="fold", no_wrap=not index)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    return table

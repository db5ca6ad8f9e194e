"""What a finished command prints: tables, and where the files are."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedsim.errors import listing
from fedsim.formats import number, percent


def show_run(console: Console, report, folder: Path) -> None:
    from fedsim.page import remarks, rows_tested

    for remark in remarks(report):
        console.print(remark)
    means = report.zero_shot_summary(), report.summary()
    counts = rows_tested(report)
    heads = {"generalization": f"held-out domain ({listing(report.held_out)})"} if report.held_out else {}
    heads |= {
        "personalization": "clients' own test rows",
        "worst_tenth": "worst tenth of clients",
    }
    if any(abs(one["personalization_own"] - one["personalization"]) > 0 for one in means):
        heads["personalization_own"] = "own test rows among own classes"
    tables = {f"accuracy in percent, round {report.chosen_round} of {report.last_round}": heads}
    if report.new_classes:
        heads = {
            "local": "local",
            "base": "base",
            "new": "new",
            "harmonic_2": "of base, new",
            "harmonic_3": "of all three",
        }
        tables["base and new classes, and harmonic means"] = heads
    method, server = report.experiment["method"]["name"], report.experiment["server"]["name"]
    for title, heads in tables.items():
        table = Table(title=title)
        for head in ("", *heads.values()):
            table.add_column(head, justify="right" if head else "left")
        for name, one in zip(("zero-shot CLIP", f"{method}, {server}"), means, strict=True):
            table.add_row(name, *(percent(one[key]) for key in heads))
        if counts.keys() & heads.keys():
            table.add_row("test rows", *(number(counts[key]) if key in counts else "" for key in heads))
        console.print(table)
    for file in ("report.html", "scores.parquet", "rounds.parquet", "adapter.safetensors", "config.yaml"):
        console.print(f"  {folder / file}", soft_wrap=True)


def rich_table(frame) -> Table:
    if len(frame) < len(frame.columns):  # a few runs stand side by side, or their many columns would not fit
        frame = frame.set_index("name").T.reset_index(names="name")
    table = Table()
    for place, column in enumerate(frame.columns):
        table.add_column(str(column), justify="right" if place else "left", overflow="fold", no_wrap=not place)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    return table

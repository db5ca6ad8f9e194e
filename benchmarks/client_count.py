"""The same data, more clients: what that does to accuracy, to the rounds it takes, and to what these cost.

    uv run python benchmarks/client_count.py                                     # about 6 minutes on 2 cores
    uv run python benchmarks/client_count.py --clients 10 30 100 300 1000 3000 10000  # about 15
    uv run python benchmarks/client_count.py --quick                             # 8 clients, 2 rounds: does it all run?
    uv run python benchmarks/client_count.py --dataset features --data-dir DIR --held-out sketch --address auto

Clients draw their rows, with replacement, from one set of rows, so that only their number changes. Four things are
asked, each of every method: what happens

- as clients are added, each with as many rows as the others before it (the base);
- as the same number of rows is shared out among more of them;
- as another share of them, or a fixed number, trains in a round;
- as their classes are skewed.

The first of `--cohorts` and of `--alphas` is the base's, and one thing varies at a time. Devices are a lognormal fleet,
so that a round lasts as long as its slowest client. None of the methods was tuned here. Cells run side by side; the row
of one is in `rows.parquet` as soon as it is done, and the same command does those that are missing.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, nan
from pathlib import Path

import numpy as np
import pandas as pd
from _runs import add_data, data_of, parsed, parser_of

from fedsim import Config, InputError, Report, run_all
from fedsim.datasets.synthetic import Synthetic
from fedsim.files import write_text
from fedsim.partitions import sizes
from fedsim.registry import parse
from fedsim.reporting.canvas import GREY, PALETTE, WIDE, Canvas, inline_svg
from fedsim.reporting.html import Section, render
from fedsim.reporting.tables import ZERO_SHOT

# FedCLIP's values are those of the README's table of features; all else is the methods' own default.
METHODS = {
    "FedCLIP": ({"name": "fedclip", "lr": 3e-3, "weight_decay": 0.0}, "fedavg"),
    "linear probe": ({"name": "probe"}, "fedavg"),
    "CLIP-Adapter": ({"name": "clip_adapter"}, "fedavg"),
    "FedCLIP, FedProx": ({"name": "fedclip", "lr": 3e-3, "weight_decay": 0.0}, "fedprox"),
    "each alone, FedCLIP": ({"name": "fedclip", "lr": 3e-3, "weight_decay": 0.0}, "local_only"),
}
TRAIN_SHARE = 0.6
LEAST = 5  # rows of a client: three to train on, one to choose a round by, one to be judged by
JUDGED = 100  # clients, where there are as many: of every domain
TAIL_ROWS = 5  # test rows of a client, of fewer of which a worst tenth is those who had bad luck
MADE = Synthetic(rows=100, width=128, classes=10, domains=5, noise=0.1, shift=0.5)
MADE_ROWS = 10_000


@dataclass(frozen=True)
class Setting:
    """All of a cell but its method, its number of clients and its seed.

    Attributes:
        law: how rows grow with clients: "rows each" have the same, or "rows shared" out.
        cohort: how many train in a round: a share of all, or an integer.
        alpha: of the Dirichlet over a client's classes; None is no skew.
    """

    law: str
    cohort: float | int
    alpha: float | None

    def words(self) -> dict[str, str]:
        cohort = f"{self.cohort} clients" if isinstance(self.cohort, int) else f"{100 * self.cohort:g} % of the clients"
        skew = "no skew" if self.alpha is None else f"Dirichlet {self.alpha:g}"
        return {"law": self.law, "cohort": cohort, "skew": skew}


@dataclass(frozen=True)
class Cell:
    """A run in its place; one run may have several, where settings come to the same."""

    method: str
    setting: Setting
    seed: int
    config: Config

    @property
    def run(self) -> str:
        """Another for any other experiment."""
        return self.config.folder().name


@dataclass(frozen=True)
class Measure:
    """A column of the table as it is drawn and printed; if `reached`, it is nan where the target was missed."""

    column: str
    label: str
    scale: float = 1
    reached: bool = False
    zero_shot: str = ""


OWN = Measure("personalization", "own test rows (%)", 100, zero_shot="zero_shot_personalization")
AWAY = Measure("generalization", "held-out domain (%)", 100, zero_shot="zero_shot_generalization")
TAIL = Measure("worst_tenth", "worst tenth of clients (%)", 100, zero_shot="zero_shot_worst_tenth")
ROUNDS = Measure("rounds_to_target", "rounds to target", reached=True)
BYTES = Measure("bytes_to_target", "MB up and down to target", 1e-6, reached=True)
CLOCK = Measure("clock_s_to_target", "simulated s to target", reached=True)
REAL = Measure("seconds_to_target", "computing s to target", reached=True)
ALL_BYTES = Measure("bytes", "MB up and down, all rounds", 1e-6)
ALL_CLOCK = Measure("clock_s", "simulated s, all rounds")
ALL_REAL = Measure("seconds", "computing s, all rounds")
SPENT = "bytes", "clock_s", "seconds"
SHOWN = [OWN, TAIL, AWAY, ROUNDS, BYTES, CLOCK]
MORE = [REAL, ALL_BYTES, ALL_CLOCK, ALL_REAL]
NAMES = ["law", "cohort", "skew", "method"]


# Cells -----------------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, list[Setting]]:
    """By what varies, the base first."""
    base = Setting("rows each", args.cohorts[0], args.alphas[0])
    return {
        "law": [base, replace(base, law="rows shared")],
        "cohort": [replace(base, cohort=cohort) for cohort in args.cohorts],
        "skew": [replace(base, alpha=alpha) for alpha in args.alphas],
    }


def cells(args: argparse.Namespace) -> list[Cell]:
    """Those with the most clients first, for they take longest."""
    data = data_of(args)
    if args.dataset == "synthetic":
        data |= {"dataset": {"name": "features"}, "data_dir": made(args.out / "made")}
    domains = parse("dataset", data["dataset"]["name"]).load(data["data_dir"]).domains
    data |= {"held_out": (args.held_out or domains[-1],)}
    found = []
    for clients in sorted(args.clients, reverse=True):
        for setting in dict.fromkeys(one for some in settings(args).values() for one in some):
            rows = args.rows if setting.law == "rows each" else args.total // clients
            if rows < LEAST:
                print(f"{args.total} rows shared among {clients}: {rows} each, left out", file=sys.stderr)
                continue
            for method, seed in itertools.product(args.methods, range(args.seeds)):
                fields = data | fields_of(method, setting, clients, rows, seed, args)
                out = args.out / "runs" / Config(**fields).folder().name
                found.append(Cell(method, setting, seed, Config(**fields, out=out)))
    return found


def fields_of(method: str, setting: Setting, clients: int, rows: int, seed: int, args: argparse.Namespace) -> dict:
    hyperparameters, server = METHODS[method]
    share = isinstance(setting.cohort, float)
    _, _, test = sizes(rows, TRAIN_SHARE)
    return {
        "method": hyperparameters | {"local_epochs": 1},
        "server": server,
        "clients": clients,
        "cohort": max(1, round(setting.cohort * clients)) if share else min(setting.cohort, clients),
        "partition": {"name": "bootstrap", "rows": rows, "alpha": setting.alpha},
        "train_share": TRAIN_SHARE,
        "fleet": "lognormal",
        "rounds": args.rounds,
        "eval_clients": min(clients, max(JUDGED, ceil(args.judged_rows / test))),
        "seed": seed,
        "partition_seed": seed,
    }


def made(folder: Path) -> Path:
    """A set of features drawn once, in which every method finds something to learn."""
    if not (folder / "classes.parquet").exists():
        features, rows = MADE.load(None), np.arange(MADE_ROWS)
        names = {"label": (features.classes, features.y), "domain": (features.domains, features.domain)}
        table = {"feature": list(features.x[rows])} | {
            column: [name[index] for index in found[rows]] for column, (name, found) in names.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_parquet(pd.DataFrame(table), folder / "features.parquet")
        classes = {"class": features.classes, "prototype": list(features.class_embeddings)}
        write_parquet(pd.DataFrame(classes), folder / "classes.parquet")
    return folder


def row(config: Config, report: Report) -> dict:
    """What a run comes to; and by judged round, what it had come to and cost until then, for any target."""
    tables = report.tables()
    costs, chosen, zero = tables.rounds, tables.summary(), tables.summary(ZERO_SHOT)
    spent = {"bytes": (costs.bytes_up + costs.bytes_down).cumsum(), "clock_s": costs.clock_s}
    spent |= {"seconds": costs.seconds.cumsum()}
    rounds = sorted(report.validation)
    means = {name: chosen[name] for name in ("personalization", "worst_tenth", "generalization", "validation")}
    means |= {f"zero_shot_{name}": zero[name] for name in list(means)}
    if sizes(config.partition.rows, config.train_share)[2] < TAIL_ROWS:
        means |= {name: nan for name in means if name.endswith("worst_tenth")}
    return {
        "run": config.folder().name,
        "clients": config.clients,
        "rows": config.partition.rows,
        "trained": config.cohort,
        "judged": config.eval_clients,
        **means,
        "chosen_round": report.chosen_round,
        **{name: float(values.iloc[-1]) for name, values in spent.items()},
        "by_round": rounds,
        "validation_by_round": [report.validation[round] for round in rounds],
        **{f"{name}_by_round": [0.0, *values.iloc[np.array(rounds[1:]) - 1]] for name, values in spent.items()},
    }


def measure(todo: Sequence[Cell], file: Path, address: str | None) -> pd.DataFrame:
    """A row of each run; those that the table lacks are done, and added to it one by one."""
    tables = [pd.read_parquet(file)] if file.exists() else []
    done = {run for table in tables for run in table.run}
    configs = list({cell.run: cell.config for cell in todo if cell.run not in done}.values())
    for count, (place, report) in enumerate(run_all(configs, address), 1):
        tables = [pd.concat([*tables, pd.DataFrame([row(configs[place], report)])], ignore_index=True)]
        write_parquet(tables[0], file)
        print(f"\r{count}/{len(configs)} ", end="", file=sys.stderr, flush=True)
    return tables[0]


def placed(todo: Sequence[Cell], rows: pd.DataFrame) -> pd.DataFrame:
    """A row of each cell."""
    cells = [{"run": cell.run, "method": cell.method, "seed": cell.seed} | cell.setting.words() for cell in todo]
    return pd.DataFrame(cells).merge(rows, on="run").sort_values("clients", kind="stable")


def write_parquet(table: pd.DataFrame, file: Path) -> None:
    part = file.with_name(f"part-{file.name}")
    table.to_parquet(part, index=False)
    part.replace(file)


# Targets ---------------------------------------------------------------------------------------------------


def with_targets(table: pd.DataFrame, base: Setting, args: argparse.Namespace) -> pd.DataFrame:
    """The same with the target of each cell, an accuracy on validation rows, and what it took to get there.

    The target is `--target-accuracy`; or a share of a method's gain over zero-shot: of the largest in the base, over
    all numbers of clients, mean over seeds. nan where no round has reached it.
    """
    if args.target_accuracy is not None:
        table = table.assign(target=args.target_accuracy)
    else:
        gain = table.validation - table.zero_shot_validation
        mine = of(table, base)
        most = gain[mine.index].groupby([mine.method, mine.clients]).mean().groupby("method").max()
        table = table.assign(target=table.zero_shot_validation + args.target * table.method.map(most))
    return table.join(pd.DataFrame([reached(one) for one in table.itertuples()], index=table.index))


def reached(cell) -> dict[str, float]:
    """What a cell had spent when its validation accuracy first was the target's; nan where it never was."""
    there = np.flatnonzero(np.asarray(cell.validation_by_round)[1:] >= cell.target) + 1
    spent = {"rounds": cell.by_round} | {name: getattr(cell, f"{name}_by_round") for name in SPENT}
    return {f"{name}_to_target": float(values[there[0]]) if len(there) else nan for name, values in spent.items()}


def of(table: pd.DataFrame, setting: Setting, method: str | None = None) -> pd.DataFrame:
    words = setting.words() | ({"method": method} if method else {})
    return table[(table[list(words)] == pd.Series(words)).all(axis=1)]


# As text ---------------------------------------------------------------------------------------------------


def text_of(values: pd.Series, measure: Measure) -> str:
    """Mean ± deviation over seeds; of a target, how many of them got there, if not all."""
    values = measure.scale * values
    there = values.dropna()
    if there.empty:
        return "never" if measure.reached else "-"
    many = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    mean, deviation = (f"{one:.1f}" if measure.zero_shot else show(one) for one in (there.mean(), there.std()))
    return mean + (f" ± {deviation}" if len(there) > 1 else "") + many


def show(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2f}"


def by_clients(table: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """A row for each setting and method, a column for each number of clients."""
    cells = table.groupby([*NAMES, "clients"], sort=False)[measure.column].agg(lambda seeds: text_of(seeds, measure))
    wide = cells.unstack("clients", sort=False).sort_index(axis=1)
    wide.index = pd.Index([", ".join(names) for names in wide.index], name=f"{measure.label}, by clients")
    return wide.fillna("")


# The page --------------------------------------------------------------------------------------------------


@inline_svg
def grid(canvas: Canvas, rows: dict[str, dict[str, pd.DataFrame]], measures: Sequence[Measure]) -> str:
    """By number of clients: a row of panels for each group of lines, a column for each measure."""
    figure = canvas.figure(WIDE, 0.8 + 2.4 * len(rows))
    panels = figure.subplots(len(rows), len(measures), squeeze=False, sharex=True)
    handles, said = {}, []
    for axes, ((group, lines), one) in zip(panels.flat, itertools.product(rows.items(), measures), strict=True):
        for colour, (name, table) in zip(PALETTE, lines.items(), strict=False):
            handles[name] = draw(axes, table, one, colour)
            most = table[table.clients == table.clients.max()]
            said.append(f"{group} {name}, {one.label}: {text_of(most[one.column], one)}")
        rule(axes.xaxis, sorted({number for table in lines.values() for number in table.clients}))
        if one is ROUNDS:
            axes.set_ylim(bottom=0)
            axes.yaxis.get_major_locator().set_params(integer=True)
        elif not one.zero_shot:
            rule(axes.yaxis)
    for axes, one in zip(panels[0], measures, strict=True):
        axes.set_title(one.label, fontsize="medium")
    for axes, group in zip(panels[:, 0], rows, strict=True):
        axes.set_ylabel(group)
    for axes in panels[-1]:
        axes.set_xlabel("clients")
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=4, fontsize="small")
    return f"With the most clients: {'; '.join(said)}"


def rule(axis, ticks: Sequence[int] = ()) -> None:
    """Logarithmic, with numbers as they are said, at these ticks or at as many as there is room for."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    if not np.isfinite(axis.get_minpos()):  # no run has reached its target: there is nothing to scale
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    steps = (1,) if high > 3000 * low else (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_tick_params(labelsize="small")


def draw(axes, table: pd.DataFrame, one: Measure, colour: str):
    seeds = (one.scale * table[one.column]).groupby(table.clients)
    mean = seeds.mean()
    low, high = (mean - seeds.std(), mean + seeds.std()) if one.zero_shot else (seeds.min(), seeds.max())
    axes.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0)
    if one.zero_shot:
        zero = (one.scale * table[one.zero_shot]).groupby(table.clients).mean()
        axes.plot(zero.index, zero, color=GREY, linestyle="--", linewidth=1)
    if one.reached:
        some = mean[seeds.count() < seeds.size()]
        axes.plot(some.index, some, "o", color=colour, markerfacecolor="white", zorder=3)
        if len(never := mean.index[mean.isna()]):  # at the upper edge, wherever that is
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(never, np.ones(len(never)), "x", color=colour, **edge)
    return axes.plot(mean.index, mean, color=colour, marker=".")[0]


def page(table: pd.DataFrame, args: argparse.Namespace) -> str:
    vary = settings(args)
    dashed = "Dashed: zero-shot CLIP on the same rows, which are drawn again for every number of clients and seed."
    accuracy = f"Bands: mean ± deviation over seeds. {dashed}"
    cost = (
        "Bands: from the least to the most of the seeds. To the target: a hollow dot is the mean of those seeds that "
        "got there, where some did not; a cross at the upper edge says that none did."
    )
    methods = {"": {method: of(table, vary["law"][0], method) for method in args.methods}}
    plots = [
        grid(accuracy, methods, [OWN, TAIL, AWAY]),
        grid(cost, methods, [ROUNDS, BYTES, CLOCK, REAL]),
        grid("Bands: from the least to the most of the seeds.", methods, [ALL_BYTES, ALL_CLOCK, ALL_REAL]),
    ]
    words = vary["law"][0].words()
    words = f"The base: {args.rows} rows each; in a round, {words['cohort']} train; {words['skew']}."
    sections = [
        Section("", about(table, args)),
        Section("More clients, each with as many rows", [words], plots),
    ]
    asked = {
        "law": ("The same rows, shared among more clients", f"{args.total:,} rows in all, or {args.rows} each."),
        "cohort": ("Who trains in a round", "A share of the clients, or as many of them however many there are."),
        "skew": (
            "Skewed classes",
            "How much of each class a client has is drawn from a Dirichlet, or the same for all.",
        ),
    }
    caption = f"All else as in the base. Bands of accuracies: mean ± deviation over seeds. {dashed} {cost}"
    for what, (heading, words) in asked.items():
        rows = {method: {one.words()[what]: of(table, one, method) for one in vary[what]} for method in args.methods}
        if len(vary[what]) > 1:
            plot = grid(caption, rows, [OWN, AWAY, ROUNDS, BYTES, CLOCK])
            sections.append(Section(heading, [words], [plot]))
    tables = {f"{one.label}: mean ± deviation over seeds": by_clients(table, one) for one in SHOWN + MORE}
    sections.append(Section("All numbers", tables=tables))
    return render("More clients on the same data", sections)


def about(table: pd.DataFrame, args: argparse.Namespace) -> list[str]:
    """What was run, and how it is to be read."""
    data = f"{MADE_ROWS:,} made features" if args.dataset == "synthetic" else f"those of {args.dataset}"
    if args.target_accuracy is not None:
        target = f"{100 * args.target_accuracy:g} % correct on validation rows"
    else:
        target = (
            f"{100 * args.target:g} % of the largest gain over zero-shot that the method has in the base with any "
            "number of clients, on validation rows; so the target is each method's own, and rounds show what the "
            "number of clients does to a method, not which is better"
        )
    return [
        f"Clients draw their rows with replacement from {data}, so that only their number changes; train, validation "
        "and test rows are apart once for all, and a client's are of one domain. "
        f"{args.rounds} rounds, {args.seeds} seeds, one local epoch. Accuracy is that of the round that validation "
        "rows chose. No method was tuned here.",
        f"The target: {target}. A validation curve is noisy, and the first round at which it touches the target is "
        "early by chance where few rows are judged.",
        f"{args.judged_rows:,} test rows or those of {JUDGED} clients are judged, whichever are more. A worst tenth is "
        f"shown where a client has {TAIL_ROWS} test rows or more. Simulated seconds are of a lognormal fleet, whose "
        "slowest client of a round ends it; computing seconds are of training alone, of runs side by side.",
    ]


def share_or_count(text: str) -> float | int:
    """0.1 is a tenth of the clients, 20 is 20 of them."""
    value = float(text) if "." in text else int(text)
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise argparse.ArgumentTypeError(f"a cohort is a share up to 1.0, or a count from 1 on, not {text}")
    return value


def skew(text: str) -> float | None:
    return None if text == "none" else float(text)


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser, "synthetic", "synthetic is one set of features, made once")
    parser.add_argument("--held-out", help="a domain (default: the last one)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["FedCLIP", "linear probe"])
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 30, 100, 300, 1000])
    parser.add_argument("--rows", type=int, default=50, help="of a client, of all splits together")
    parser.add_argument("--total", type=int, default=50_000, help="rows, where they are shared out")
    parser.add_argument(
        "--cohorts", nargs="+", type=share_or_count, default=[0.1, 0.5, 20], help="0.1: a share; 20: 20"
    )
    parser.add_argument("--alphas", nargs="+", type=skew, default=[None, 1.0, 0.1], help="none: no skew")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judged-rows", type=int, default=2000, help="test rows, more or less")
    parser.add_argument("--target", type=float, default=0.5, help="a share of a method's gain over zero-shot")
    parser.add_argument("--target-accuracy", type=float, help="in [0, 1], the same for all, in place of it")
    parser.add_argument("--address", help="of a Ray cluster (default: a private one)")
    parser.add_argument("--out", type=Path, default=Path("runs/client_count"))
    tiny = {"methods": ["FedCLIP"], "clients": [4, 8], "total": 400, "cohorts": [0.5, 2], "alphas": [None, 0.1]}
    args = parsed(parser, **tiny, rounds=2, seeds=1, judged_rows=10, out=Path("runs/client_count-quick"))
    args.out = args.out.absolute()
    try:
        todo = cells(args)
        if not todo:
            parser.error("none of these cells can be run; take fewer --clients, or more --rows and --total")
        rows = measure(todo, args.out / "rows.parquet", args.address)
    except InputError as error:
        parser.error(str(error))
    table = with_targets(placed(todo, rows), settings(args)["law"][0], args)
    write_parquet(table, args.out / f"{args.dataset}.parquet")
    write_text(args.out / f"{args.dataset}.html", page(table, args))
    for one in SHOWN:
        print(f"\n{by_clients(table, one).to_markdown()}")
    print(f"\n-> {args.out / f'{args.dataset}.html'}")


if __name__ == "__main__":
    main()

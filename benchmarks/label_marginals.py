"""What label-shift tables measure: methods on right and on scrambled labels, and what class shares alone are worth.

    uv run python benchmarks/label_marginals.py
    uv run python benchmarks/label_marginals.py --quick     # one concentration, two methods: does it all run?

Several clients per domain with Dirichlet label skew, as in the published tables on DomainNet and Office-Caltech10. With
scrambled labels, as the code behind several of them has it (fedsim/partitions/domain_dirichlet.py), the rows of a
client show the images of other rows. docs/label_marginals.md explains the result. All runs are in this process, on one
thread; the same command resumes them.
"""

import argparse
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from _runs import add_data, data_of, parsed, parser_of, save_svg, spread

from fedsim import Config, run
from fedsim.registry import parse
from fedsim.reporting.tables import ZERO_SHOT, Tables

# FedCLIP as in a plain `fedsim run`, and larger steps of the probe, since both learn little with their defaults in 10
# rounds. The others as published.
METHODS = {
    "prior": {"method": "prior", "rounds": 0},
    "FedCLIP": {
        "method": {"name": "fedclip", "objective": "cross_entropy", "lr": 3e-3, "weight_decay": 0.0, "local_epochs": 1}
    },
    "PromptFL": {"method": {"name": "promptfl", "local_epochs": 1}},
    "PromptFolio (personal)": {"method": {"name": "promptfolio", "local_epochs": 1}},
    "linear probe, alone": {"method": {"name": "probe", "lr": 1e-2, "local_epochs": 1}, "server": "local_only"},
}
ZERO, MAJORITY = "zero-shot", "own majority class"
LABELS = {False: "right", True: "scrambled"}
COLOURS = {"right": "#2563a8", "scrambled": "#c2410c"}


def majority(tables: Tables) -> float:
    """The accuracy, mean over clients, of predicting the class of which the client has the most train rows."""
    rows = tables.partition.pivot_table(
        index=["client", "label"], columns="split", values="rows", aggfunc="sum", fill_value=0, observed=True
    )
    test = rows.test.groupby("client").sum()
    hit = rows.test[rows.train.groupby("client").idxmax()].droplevel("label")
    return (hit / test)[test > 0].mean()


def cells(args: argparse.Namespace) -> list[dict]:
    """Each run, and the accuracies that are taken from it."""
    domains = parse("dataset", args.dataset).load(args.data_dir).domains
    data = data_of(args) | {"rounds": args.rounds, "clients": len(domains) * args.clients, "actors": 0}
    results = []
    for alpha, scrambled, seed in product(args.alphas, LABELS, range(args.seeds)):
        skew = {"name": "domain_dirichlet", "alpha": alpha, "scramble_labels": scrambled}
        here = data | {"partition": skew, "seed": seed, "partition_seed": seed}
        about = {"alpha": alpha, "labels": LABELS[scrambled], "seed": seed}
        for name in args.methods:
            out = args.out / args.dataset / f"{name}-{alpha}-{LABELS[scrambled]}-{seed}".replace(" ", "_")
            report = run(Config(**(here | METHODS[name]), out=out))
            tables = report.tables()
            if name == args.methods[0]:
                results.append(about | {"method": ZERO, "accuracy": tables.summary(ZERO_SHOT)["personalization"]})
                results.append(about | {"method": MAJORITY, "accuracy": majority(tables)})
            results.append(about | {"method": name, "accuracy": tables.summary()["personalization"]})
        print(f"\rDirichlet {alpha}, {LABELS[scrambled]} labels, seed {seed}: done", end="", flush=True)
    return results


def by_method(table: pd.DataFrame) -> pd.DataFrame:
    """Methods x (concentration, labels): percent, mean ± deviation over seeds."""
    shown = table.groupby(["method", "alpha", "labels"], sort=False).accuracy.agg(spread).unstack([1, 2])
    shown.columns = [f"{alpha}, {labels}" for alpha, labels in shown.columns]
    return shown


def plot(table: pd.DataFrame, file: Path) -> None:
    """A panel for each concentration, a line for each method from scrambled to right labels, as SVG."""
    alphas, methods = table.alpha.unique(), [name for name in table.method.unique() if name != MAJORITY]
    figure, axes = plt.subplots(
        1, len(alphas), figsize=(2.2 + 2.3 * len(alphas), 3.3), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, alpha in zip(axes.flat, alphas, strict=True):
        means = table[table.alpha == alpha].groupby(["method", "labels"]).accuracy.mean().unstack()
        for labels, colour in COLOURS.items():
            axis.plot(means[labels][methods], range(len(methods)), "o", color=colour, ms=7, label=f"{labels} labels")
        for place, name in enumerate(methods):
            axis.plot(means.loc[name, list(COLOURS)], [place, place], color="0.75", lw=2, zorder=0)
        axis.axvline(means.right[MAJORITY], color="0.3", lw=1.2, ls="--", label=MAJORITY)
        axis.set_title(f"Dirichlet {alpha}", fontsize=11)
        axis.set_xlim(0, 95)
        axis.set_xticks(range(0, 76, 25))
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(len(methods)), methods)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("accuracy on clients' own test rows, percent", fontsize=10)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3, fontsize=10, frameon=False)
    save_svg(figure, file)


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.1, 0.3, 0.5])
    parser.add_argument("--clients", type=int, default=5, help="of each domain")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/label_marginals"))
    tiny = {"seeds": 1, "rounds": 1, "alphas": [0.5], "clients": 1, "out": Path("runs/label_marginals-quick")}
    args = parsed(parser, **tiny, methods=["prior", "linear probe, alone"])

    torch.set_num_threads(1)
    table = pd.DataFrame(cells(args))
    table["accuracy"] *= 100
    table.to_parquet(args.out / f"{args.dataset}.parquet", index=False)
    plot(table, args.out / f"{args.dataset}.svg")
    print(f"\n\npercent of clients' own test rows, mean ± deviation over {args.seeds} seeds\n")
    print(by_method(table).to_markdown())
    print(f"\n-> {args.out / f'{args.dataset}.svg'}")


if __name__ == "__main__":
    main()

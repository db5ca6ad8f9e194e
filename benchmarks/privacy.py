"""Accuracy against epsilon: an adapter, a prompt and LoRA under client-level differential privacy.

    uv run python benchmarks/privacy.py
    uv run python benchmarks/privacy.py --quick     # two epsilons, one round: does it all run?
    uv run python benchmarks/privacy.py --dataset features --data-dir DIR --held-out sketch --methods fedclip

`central_dp` with an adaptive clip norm at the median, over clients that all take part in every round. The noise on the
mean has a norm that grows with the square root of the number of shared parameters and falls with the number of clients.
All runs are in this process, on one thread; the same command resumes them.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from _runs import add_data, data_of, parsed, parser_of, save_curves, spread

from fedsim import Config, run

# Step sizes that suit the embedded model; the objective is a mean over rows.
METHODS: dict[str, dict[str, Any]] = {
    "fedclip": {"objective": "cross_entropy", "lr": 3e-3, "weight_decay": 0.0},
    "promptfl": {"length": 4, "lr": 0.1, "local_epochs": 1, "weight_decay": 0.0},
    "lora": {"objective": "cross_entropy", "lr": 3e-3},
}
WITHOUT = "none"


def privacy_of(epsilon: str) -> str | dict[str, Any]:
    adaptive = {"clip": 0.1, "quantile": 0.5, "clip_lr": 0.5}
    return WITHOUT if epsilon == WITHOUT else {"name": "central_dp", "epsilon": float(epsilon), **adaptive}


def cells(args: argparse.Namespace) -> pd.DataFrame:
    """The numbers of each run."""
    common = data_of(args) | {"held_out": args.held_out, "rounds": args.rounds, "actors": 0, "page": False}
    common |= {
        "partition": "iid",
        "clients": args.clients,
        "eval_every": args.rounds,
        "eval_clients": min(10, args.clients),
    }
    results = []
    for method, epsilon, seed in product(args.methods, args.epsilons, range(args.seeds)):
        out = args.out / args.dataset / f"{method}-{epsilon}-{seed}"
        fields = {"method": {"name": method, **METHODS[method]}, "privacy": privacy_of(epsilon), "seed": seed}
        report = run(Config(**common, **fields, partition_seed=seed, out=out))
        tables = report.tables()
        summary, zero_shot = tables.summary(round=args.rounds), tables.summary("zero_shot")
        about = {"method": method, "epsilon": epsilon, "parameters": report.facts["trained_parameters"]}
        scores = {"zero-shot": zero_shot["generalization"], "held out": summary["generalization"]}
        spent = {"spent": tables.rounds.epsilon.iloc[-1]}
        results.append(about | spent | {name: 100 * accuracy for name, accuracy in scores.items()})
        print(f"\r{method}, epsilon {epsilon}, seed {seed}: done" + " " * 20, end="", flush=True)
    return pd.DataFrame(results)


def plot(results: pd.DataFrame, file: Path) -> None:
    """Held-out accuracy after the last round over epsilon, mean over seeds, as SVG; dashed without privacy."""
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for colour, (method, rows) in zip(
        plt.get_cmap("tab10").colors, results.groupby("method", sort=False), strict=False
    ):  # type: ignore[attr-defined]
        mean = rows.groupby("epsilon", sort=False)["held out"].mean()
        label = f"{method}, {rows.parameters.iloc[0]:,} parameters"
        if WITHOUT in mean.index:
            axis.axhline(mean[WITHOUT], ls="--", color=colour, lw=1.2)
        private = mean.drop(WITHOUT, errors="ignore")
        axis.plot([float(epsilon) for epsilon in private.index], private, "o-", color=colour, lw=1.6, label=label)
    axis.axhline(results["zero-shot"].mean(), ls=":", color="0.4", lw=1.2, label="zero-shot CLIP")
    save_curves(figure, file, "epsilon at delta 1e-5", "held-out accuracy, percent")


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epsilons", nargs="+", default=[WITHOUT, "128", "32", "8", "2"])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--held-out", nargs="+", default=["ink"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/privacy"))
    tiny = {"seeds": 1, "rounds": 1, "clients": 4, "methods": ["fedclip"], "epsilons": [WITHOUT, "8"]}
    args = parsed(parser, **tiny, out=Path("runs/privacy-quick"))

    torch.set_num_threads(1)
    results = cells(args)
    plot(results, args.out / f"{args.dataset}.svg")
    table = results.groupby(["method", "epsilon"], sort=False)
    numbers, scores = table[["parameters", "spent", "zero-shot"]].mean().round(2), table[["held out"]].agg(spread)
    print(f"\n\npercent after {args.rounds} rounds, mean ± deviation over {args.seeds} seeds\n")
    print(numbers.join(scores).reset_index().to_markdown(index=False))
    print(f"\n-> {args.out / f'{args.dataset}.svg'}")


if __name__ == "__main__":
    main()

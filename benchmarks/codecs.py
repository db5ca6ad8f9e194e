"""Accuracy against bytes: one method whose clients' updates are encoded in different ways.

    uv run python benchmarks/codecs.py
    uv run python benchmarks/codecs.py --quick     # three codecs, one round: does it all run?
    uv run python benchmarks/codecs.py --dataset features --data-dir DIR --held-out sketch --method probe

FedCLIP as in a plain `fedsim run`, unless `--method` says another. Bytes are those that one client sends, and receives,
in a round: of the encoded tensors, packed bits, scales and positions included. All runs are in this process, on one
thread; the same command resumes them.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from _runs import add_data, data_of, parsed, parser_of, save_curves, spread

from fedsim import Config, Report, run
from fedsim.config import merged, read_yaml

CODECS: dict[str, dict[str, Any]] = {
    "plain": {"name": "plain"},
    "bf16": {"name": "half"},
    "int8": {"name": "int8"},
    "int8 both ways": {"name": "int8", "down": "int8"},
    "QSGD, 4 bits": {"name": "qsgd"},
    "QSGD, 2 bits": {"name": "qsgd", "bits": 2},
    "sign": {"name": "sign"},
    "sign, no feedback": {"name": "sign", "error_feedback": False},
    "top 1 %": {"name": "top_k"},
    "top 1 %, no feedback": {"name": "top_k", "error_feedback": False},
    "random 1 %": {"name": "random_k", "error_feedback": True},
    "random 1 %, unbiased": {"name": "random_k"},
}
DASHED = "no feedback", "unbiased"


def curve(report: Report) -> pd.DataFrame:
    """The kB that a client has sent, and the mean validation accuracy in percent, by round."""
    rounds = report.tables().rounds.set_index("round")
    sent = (rounds.bytes_up / rounds.clients).cumsum() / 1e3
    accuracy = pd.Series(report.validation) * 100
    return pd.DataFrame({"kB": sent.reindex(accuracy.index).fillna(0.0), "validation": accuracy})


def cells(args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The numbers of each run, and its curve."""
    base = read_yaml("glyphs") if args.method == "fedclip" else {"method": {"name": args.method}}
    fields = merged(base, data_of(args) | {"held_out": args.held_out, "rounds": args.rounds, "actors": 0})
    results, curves = [], []
    for (name, codec), seed in product(CODECS.items(), range(args.seeds)):
        if name not in args.codecs:
            continue
        out = args.out / args.dataset / f"{name}-{seed}".replace(" ", "_").replace("%", "percent")
        report = run(Config(**fields, codec=codec, seed=seed, partition_seed=seed, out=out))
        tables, about = report.tables(), {"codec": name, "seed": seed}
        summary, rounds = tables.summary(), tables.rounds
        costs = {f"kB {way}": (rounds[f"bytes_{way}"] / rounds.clients).iloc[-1] / 1e3 for way in ("up", "down")}
        scores = {"held out": summary["generalization"], "own test": summary["personalization"]}
        results.append(about | costs | {place: 100 * accuracy for place, accuracy in scores.items()})
        curves.append(curve(report).assign(**about).rename_axis("round").reset_index())
        print(f"\r{name}, seed {seed}: done" + " " * 20, end="", flush=True)
    return pd.DataFrame(results), pd.concat(curves, ignore_index=True)


def plot(curves: pd.DataFrame, file: Path) -> None:
    """Validation accuracy, mean over seeds, over the kB that a client has sent, as SVG."""
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    colours = iter(plt.get_cmap("tab10").colors)  # type: ignore[attr-defined]
    last: dict[str, Any] = {}
    for name in curves.codec.unique():
        mean = curves[(curves.codec == name) & (curves["round"] > 0)].groupby("round")[["kB", "validation"]].mean()
        dashed = any(word in name for word in DASHED)
        family = name.partition(",")[0] if dashed else name
        last[family] = colour = last.get(family) or next(colours)
        axis.plot(mean.kB, mean.validation, "--" if dashed else "-", color=colour, lw=1.6, label=name)
    save_curves(figure, file, "sent by a client, kB", "validation accuracy, percent")


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser)
    parser.add_argument("--method", default="fedclip")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--held-out", nargs="+", default=["ink"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/codecs"))
    tiny = {"seeds": 1, "rounds": 1, "out": Path("runs/codecs-quick"), "codecs": ["plain", "int8 both ways", "top 1 %"]}
    args = parsed(parser, **tiny)

    torch.set_num_threads(1)
    results, curves = cells(args)
    curves.to_parquet(args.out / f"{args.dataset}.parquet", index=False)
    plot(curves, args.out / f"{args.dataset}.svg")
    table = results.groupby("codec", sort=False)
    costs, scores = table[["kB up", "kB down"]].mean().round(1), table[["held out", "own test"]].agg(spread)
    costs.insert(1, "smaller", costs["kB up"].iloc[0] / costs["kB up"])
    print(f"\n\nkB of a client in a round; percent, mean ± deviation over {args.seeds} seeds\n")
    print(costs.round(1).join(scores).to_markdown())
    print(f"\n-> {args.out / f'{args.dataset}.svg'}")


if __name__ == "__main__":
    main()

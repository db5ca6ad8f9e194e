"""Every held-out domain x method x seed: is federation worth it, and does it carry to a domain nobody has?

    uv run python benchmarks/leave_one_out.py                                # the embedded images
    uv run python benchmarks/leave_one_out.py --dataset features --data-dir DIR

A seed draws the partition, the splits, the initial weights and the batches. Cells are ordinary runs in folders
of their own, so that the same command goes on where it was interrupted.
"""

import argparse
import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from fedsim import Config, run
from fedsim.config import merged, read_yaml
from fedsim.registry import parse

# Trained at the embedded experiment's hyperparameters unless it says `paper`.
METHODS = {
    "FedCLIP, the paper's values": ("paper", {}),
    "FedCLIP, chosen values": ("glyphs", {}),
    "linear probe": ("glyphs", {"method": {"name": "probe"}}),
    "local only (FedCLIP, chosen)": ("glyphs", {"server": "local_only"}),
    "local only (linear probe)": ("glyphs", {"method": {"name": "probe"}, "server": "local_only"}),
}


def cell(fields: dict) -> dict[str, float]:
    """One run's four numbers, in percent."""
    report = run(Config(**fields, actors=0))
    zero, ours = report.zero_shot_summary(), report.summary()
    return {
        "held-out": 100 * ours["generalization"],
        "own test": 100 * ours["personalization"],
        "zero-shot held-out": 100 * zero["generalization"],
        "zero-shot own test": 100 * zero["personalization"],
        "round": report.chosen_round,
    }


def cells(args: argparse.Namespace) -> list[tuple[str, str, int, dict]]:
    data = {"dataset": {"name": args.dataset}, "data_dir": args.data_dir}
    domains = args.held_out or parse("dataset", args.dataset).load(args.data_dir).domains
    made = []
    for (name, (base, change)), domain, seed in itertools.product(METHODS.items(), domains, range(args.seeds)):
        here = {"held_out": (domain,), "seed": seed, "partition_seed": seed, "rounds": args.rounds}
        out = args.out / args.dataset / f"{name}-{domain}-{seed}".replace(" ", "_")
        made.append((name, domain, seed, merged(merged(read_yaml(base), change), data | here) | {"out": out}))
    return made


def spread(values: pd.Series) -> str:
    return f"{values.mean():.1f} ± {values.std():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="glyphs")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--held-out", nargs="+", help="these domains only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/leave_one_out"))
    args = parser.parse_args()

    work = cells(args)
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        results = list(pool.map(cell, [fields for *_, fields in work]))
    table = pd.DataFrame(
        [{"method": m, "domain": d, "seed": s} | r for (m, d, s, _), r in zip(work, results, strict=True)]
    )
    zero = table[table.method == next(iter(METHODS))].assign(method="zero-shot")
    zero[["held-out", "own test"]] = zero[["zero-shot held-out", "zero-shot own test"]]
    table = pd.concat([zero, table], ignore_index=True)
    for column in ("held-out", "own test"):
        by_domain = table.groupby(["method", "domain"], sort=False)[column].agg(spread).unstack(sort=False)
        mean = table.groupby(["method", "seed"], sort=False)[column].mean().groupby("method", sort=False).agg(spread)
        print(f"\n{column} accuracy in percent, mean ± deviation over {args.seeds} seeds, by held-out domain\n")
        print(by_domain.assign(mean=mean).to_markdown())


if __name__ == "__main__":
    main()

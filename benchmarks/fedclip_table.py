"""The table of the FedCLIP paper, for any data and backbone: every held-out domain x method x seed.

    uv run python benchmarks/fedclip_table.py                                # the embedded images and model
    uv run python benchmarks/fedclip_table.py --split concepts               # test rows of concepts without train rows
    uv run python benchmarks/fedclip_table.py --quick                        # one round, one seed: does it all run?
    uv run python benchmarks/fedclip_table.py --dataset features --data-dir DIR --only FedCLIP probe alone
    uv run python benchmarks/fedclip_table.py --dataset pacs --data-dir DIR --backbone ViT-B-32 --pretrained openai \\
        --rounds 200 --tower-rounds 200 --tower-seeds 3                      # the paper's own experiment

Accuracy on the held-out domain and on the own test rows of clients: zero-shot, FedAvg and FedProx of all
of CLIP, FedCLIP, a linear probe, and each client alone. A seed draws the partition, the splits, the initial weights and
the batches. Cells are ordinary runs in folders of their own: the same command resumes them.
"""

import argparse
import itertools
from pathlib import Path

import pandas as pd
from _runs import add_data, data_of, parsed, parser_of, spread

from fedsim import Config, Report, run_all
from fedsim.config import merged, read_yaml
from fedsim.registry import parse
from fedsim.reporting.tables import ZERO_SHOT

# The hyperparameters are those of FedCLIP's paper, or those chosen for the embedded images and their split.
CHOSEN = {"images": "glyphs", "concepts": "glyphs_concepts"}
METHODS = {
    "FedAvg, all of CLIP": ("paper", {"method": {"name": "finetune"}}),
    "FedProx, all of CLIP": ("paper", {"method": {"name": "finetune"}, "server": {"name": "fedprox"}}),
    "FedCLIP, the paper's values": ("paper", {}),
    "FedCLIP, chosen values": ("chosen", {}),
    "linear probe": ("chosen", {"method": {"name": "probe"}}),
    "alone (FedCLIP, chosen)": ("chosen", {"server": "local_only"}),
    "alone (linear probe)": ("chosen", {"method": {"name": "probe"}, "server": "local_only"}),
}


def cell(report: Report) -> dict[str, float]:
    """One run's numbers, in percent; and what it sent."""
    tables = report.tables()
    zero, ours, rounds = tables.summary(ZERO_SHOT), tables.summary(), tables.rounds
    return {
        "held-out": 100 * ours["generalization"],
        "own test": 100 * ours["personalization"],
        "zero-shot held-out": 100 * zero["generalization"],
        "zero-shot own test": 100 * zero["personalization"],
        "round": report.chosen_round,
        "MB a round": (rounds.bytes_up + rounds.bytes_down).mean() / 1e6,
        "seconds a round": rounds.seconds.median(),
    }


def cells(args: argparse.Namespace) -> list[tuple[str, str, int, Config]]:
    data = data_of(args)
    if args.dataset == "glyphs":
        data["dataset"]["split"] = args.split
    folder = args.dataset if args.split == "images" else f"{args.dataset}-{args.split}"
    domains = args.held_out or parse("dataset", args.dataset).load(args.data_dir).domains
    methods = {name: how for name, how in METHODS.items() if not args.only or any(word in name for word in args.only)}
    made = []
    for (name, (values, change)), domain, seed in itertools.product(methods.items(), domains, range(args.seeds)):
        large = "all of CLIP" in name
        if large and seed >= args.tower_seeds:
            continue
        here = {"held_out": (domain,), "seed": seed, "partition_seed": seed}
        here |= {"rounds": args.tower_rounds if large else args.rounds}
        base = CHOSEN[args.split] if values == "chosen" else values
        out = args.out / folder / f"{name}-{domain}-{seed}".replace(" ", "_")
        fields = merged(merged(read_yaml(base), change), data | here)
        made.append((name, domain, seed, Config(**fields, out=out)))
    return made


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser)
    parser.add_argument("--split", choices=CHOSEN, default="images", help="of the embedded images")
    parser.add_argument("--only", nargs="+", help="methods with any of these words in their names")
    parser.add_argument("--held-out", nargs="+", help="these domains only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tower-seeds", type=int, default=2, help="seeds of what trains all of CLIP")
    parser.add_argument("--tower-rounds", type=int, default=4, help="rounds of what trains all of CLIP")
    parser.add_argument("--address", help="of a Ray cluster (default: a private one)")
    parser.add_argument("--at-once", type=int, help="runs at a time at most (default: as many as fit)")
    parser.add_argument("--out", type=Path, default=Path("runs/fedclip_table"))
    tiny = {"seeds": 1, "rounds": 1, "tower_seeds": 1, "tower_rounds": 1, "out": Path("runs/fedclip_table-quick")}
    args = parsed(parser, **tiny)

    work = cells(args)
    reports = run_all([config for *_, config in work], args.address, at_once=args.at_once)
    results = {index: cell(report) for index, report in reports}
    table = pd.DataFrame(
        [{"method": m, "domain": d, "seed": s} | results[index] for index, (m, d, s, _) in enumerate(work)]
    )
    first = table.drop_duplicates(["domain", "seed"]).assign(method="zero-shot")
    first[["held-out", "own test"]] = first[["zero-shot held-out", "zero-shot own test"]]
    table = pd.concat([first, table], ignore_index=True)
    for column in ("held-out", "own test"):
        by_domain = table.groupby(["method", "domain"], sort=False)[column].agg(spread).unstack(sort=False)
        mean = table.groupby(["method", "seed"], sort=False)[column].mean().groupby("method", sort=False).agg(spread)
        print(f"\n{column} accuracy in percent, mean ± deviation over seeds, by held-out domain\n")
        print(by_domain.assign(mean=mean).to_markdown())
    cost = table[table.method != "zero-shot"].groupby("method", sort=False)
    print("\nwhat it costs, medians over runs; the round is the one that validation rows chose\n")
    print(cost[["MB a round", "seconds a round", "round"]].median().round(2).to_markdown())


if __name__ == "__main__":
    main()

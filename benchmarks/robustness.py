"""Attacks against server rules: what is left of the accuracy, and how often an attack gets what it aims at.

    uv run python benchmarks/robustness.py
    uv run python benchmarks/robustness.py --quick     # three attacks, three rules, one round: does it all run?
    uv run python benchmarks/robustness.py --dataset features --data-dir DIR --held-out sketch --clients 50

FedCLIP as in a plain `fedsim run`, with the clients' rows drawn IID. Rules know how many clients are malicious: f
of `krum` and `bulyan`, and the share that `trimmed_mean` cuts. Both tables are of the last round, as the round chosen
on validation rows may be one in which an attack has not done much. All runs are in this process, on one thread; the
same command resumes them.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _runs import add_data, data_of, parsed, parser_of, spread

from fedsim import Config, run
from fedsim.config import merged, read_yaml
from fedsim.shares import part

ATTACKS: dict[str, dict[str, Any]] = {
    "none": {"name": "honest"},
    "label_flip": {"name": "label_flip"},
    "backdoor": {"name": "backdoor"},
    "sign_flip x 10": {"name": "sign_flip", "scale": 10.0},
    "noise": {"name": "noise"},
    "alie": {"name": "alie"},
    "ipm x 10": {"name": "ipm", "epsilon": 10.0},
}
RULES = (
    "fedavg",
    "median",
    "trimmed_mean",
    "krum",
    "multi-krum",
    "bulyan",
    "geometric_median",
    "norm_bound",
    "centered_clipping",
    "fltrust",
)


def rule(name: str, clients: int, share: float, root_rows: int) -> dict[str, Any]:
    """A server rule that expects this share of the clients to be malicious."""
    malicious = part(clients, share)
    fields: dict[str, dict[str, Any]] = {
        "trimmed_mean": {"share": share},
        "krum": {"f": malicious},
        "multi-krum": {"name": "krum", "f": malicious, "m": clients - malicious - 2},
        "bulyan": {"f": malicious},
        "fltrust": {"root_rows": root_rows},
    }
    return {"name": name} | fields.get(name, {})


def cells(args: argparse.Namespace) -> pd.DataFrame:
    """Accuracy of the honest clients and success of the attack, in percent, of each run."""
    fields = merged(
        read_yaml("glyphs"), data_of(args) | {"held_out": args.held_out, "rounds": args.rounds, "actors": 0}
    )
    fields |= {"partition": "iid", "clients": args.clients, "eval_every": args.rounds}
    results = []
    for name, server, seed in product(args.attacks, args.rules, range(args.seeds)):
        attack = ATTACKS[name] | ({"share": args.share} if name != "none" else {})
        out = args.out / args.dataset / f"{name}-{server}-{seed}".replace(" ", "_")
        ours = {"attack": attack, "server": rule(server, args.clients, args.share, args.root_rows)}
        ours |= {"seed": seed, "partition_seed": seed}
        means = run(Config(**fields, **ours, out=out)).summary(round=args.rounds)
        about = {"attack": name, "rule": server, "seed": seed}
        scores = {"accuracy": means["pooled"], "success": means.get("attack_success", float("nan"))}
        results.append(about | {key: 100 * share for key, share in scores.items()})
        print(f"\r{name}, {server}, seed {seed}: done" + " " * 20, end="", flush=True)
    return pd.DataFrame(results)


def table(results: pd.DataFrame, score: str) -> str:
    """A row for each rule, a column for each attack."""
    results = results.dropna(subset=score)
    cells = results.groupby(["rule", "attack"], sort=False)[score].agg(spread).unstack()
    rows, columns = results.rule.unique(), results.attack.unique()
    return cells.loc[rows, columns].to_markdown()


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--held-out", nargs="+", default=["ink"])
    parser.add_argument("--clients", type=int, default=25)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--root-rows", type=int, default=100, help="of fltrust")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/robustness"))
    tiny: dict[str, Any] = {"attacks": ["none", "label_flip", "ipm x 10"], "rules": ["fedavg", "krum", "fltrust"]}
    tiny |= {"seeds": 1, "rounds": 1, "clients": 6, "root_rows": 20, "out": Path("runs/robustness-quick")}
    args = parsed(parser, **tiny)

    torch.set_num_threads(1)
    results = cells(args)
    of = f"{part(args.clients, args.share)} of {args.clients} clients malicious, round {args.rounds}"
    print(f"\n\nown test rows of the others, percent; {of}, mean ± deviation over {args.seeds} seeds\n")
    print(table(results, "accuracy"))
    print("\nsuccess of the attack, percent\n")
    print(table(results, "success"))


if __name__ == "__main__":
    main()

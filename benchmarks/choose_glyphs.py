"""How `fedsim/experiments/glyphs.yaml` was chosen: a small grid, judged by validation accuracy alone.

    uv run python benchmarks/choose_glyphs.py
    uv run python benchmarks/choose_glyphs.py --split concepts
    uv run python benchmarks/choose_glyphs.py --quick     # two settings, one round: does it all run?

Each setting trains with every domain held out once; its score is the clients' validation accuracy in the chosen
round, mean over the held-out domains. Seed 100 draws everything, so that no seed that is reported has been tuned on.
Accuracy on test rows is printed next to it, for information; it decides nothing.
"""

import itertools
from pathlib import Path

import pandas as pd
from _runs import parsed, parser_of

from fedsim import Config, Report, run_all

DOMAINS = "clipart", "ink", "noto", "render3d", "twemoji"
GRID = {
    "objective": ["contrastive", "cross_entropy"],
    "lr": [3e-4, 1e-3, 3e-3],
    "weight_decay": [0.0, 0.01, 0.2],
}
SEED = 100
ACCURACIES = "generalization", "personalization", "worst_tenth", "validation"


def score(report: Report) -> dict[str, float]:
    """One run's accuracies in percent, and its chosen round."""
    summary = report.summary()
    return {name: 100 * summary[name] for name in ACCURACIES} | {"round": report.chosen_round}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--objective", nargs="+", default=GRID["objective"])
    parser.add_argument("--lr", nargs="+", type=float, default=GRID["lr"])
    parser.add_argument("--weight-decay", nargs="+", type=float, default=GRID["weight_decay"])
    parser.add_argument("--held-out", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--split", choices=["images", "concepts"], default="images", help="of the embedded images")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--address", help="of a Ray cluster (default: a private one)")
    parser.add_argument("--out", type=Path, default=Path("runs/choose_glyphs"))
    tiny = {"lr": [3e-4], "weight_decay": [0.01], "held_out": ["ink"], "rounds": 1}
    args = parsed(parser, **tiny, out=Path("runs/choose_glyphs-quick"))
    grid = [vars(args)[name] for name in GRID]
    settings = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*grid)]
    work = [(setting, domain) for setting in settings for domain in args.held_out]
    configs = [
        Config(
            dataset={"name": "glyphs", "split": args.split},
            method={"name": "fedclip"} | setting,
            held_out=(domain,),
            rounds=args.rounds,
            page=False,
            seed=SEED,
            partition_seed=SEED,
            out=args.out / "-".join(map(str, (args.split, *setting.values(), domain))),
        )
        for setting, domain in work
    ]
    table = pd.DataFrame([work[index][0] | score(report) for index, report in run_all(configs, args.address)])
    means = table.groupby(list(GRID)).mean().sort_values("validation", ascending=False).round(1)
    print(means.reset_index().to_markdown(index=False))


if __name__ == "__main__":
    main()

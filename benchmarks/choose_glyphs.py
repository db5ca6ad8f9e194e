"""How `fedsim/experiments/glyphs.yaml` was chosen: a small grid, judged by validation accuracy alone.

    uv run python benchmarks/choose_glyphs.py

Each setting trains with every domain held out once; its score is the clients' validation accuracy in the chosen
round, mean over the held-out domains. Seed 100 draws everything, so that no seed that is reported has been tuned on.
Test rows are printed beside it, to look at afterwards, and choose nothing.
"""

import itertools
from pathlib import Path

import pandas as pd

from fedsim import Config, Report, run_all

DOMAINS = "clipart", "ink", "noto", "render3d", "twemoji"
GRID = {
    "objective": ["contrastive", "cross_entropy"],
    "lr": [3e-4, 1e-3, 3e-3],
    "weight_decay": [0.0, 0.01, 0.2],
}
ROUNDS, SEED = 50, 100


def score(report: Report) -> dict[str, float]:
    """One run's validation, held-out and own-test accuracy, in percent."""
    return {name: 100 * value for name, value in report.summary().items()} | {"round": report.chosen_round}


def main() -> None:
    settings = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    work = [(setting, domain) for setting in settings for domain in DOMAINS]
    configs = [
        Config(
            method={"name": "fedclip"} | setting,
            held_out=(domain,),
            rounds=ROUNDS,
            seed=SEED,
            partition_seed=SEED,
            out=Path("runs/choose_glyphs") / "-".join(map(str, (*setting.values(), domain))),
        )
        for setting, domain in work
    ]
    table = pd.DataFrame([work[index][0] | score(report) for index, report in run_all(configs)])
    means = table.groupby(list(GRID)).mean().sort_values("validation", ascending=False).round(1)
    print(means.reset_index().to_markdown(index=False))


if __name__ == "__main__":
    main()

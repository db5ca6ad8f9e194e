"""How `fedsim/experiments/glyphs.yaml` was chosen: a small grid, judged by validation accuracy alone.

    uv run python benchmarks/choose_glyphs.py

Each setting trains with every domain held out once; its score is the clients' validation accuracy in the chosen
round, mean over the held-out domains. Seed 100 draws everything, so that no seed that is reported has been tuned on.
Test rows are printed beside it, to look at afterwards, and choose nothing.
"""

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from fedsim import Config, run

DOMAINS = "clipart", "ink", "noto", "render3d", "twemoji"
GRID = {
    "objective": ["contrastive", "cross_entropy"],
    "lr": [3e-4, 1e-3, 3e-3],
    "weight_decay": [0.0, 0.01, 0.2],
}
ROUNDS, SEED = 50, 100


def score(fields: dict) -> dict[str, float]:
    """One run's validation, held-out and own-test accuracy, in percent."""
    report = run(Config(**fields, actors=0))
    return {name: 100 * value for name, value in report.summary().items()} | {"round": report.chosen_round}


def main() -> None:
    settings = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    work = [(setting, domain) for setting in settings for domain in DOMAINS]
    fields = [
        {
            "method": {"name": "fedclip"} | setting,
            "held_out": (domain,),
            "rounds": ROUNDS,
            "seed": SEED,
            "partition_seed": SEED,
            "out": Path("runs/choose_glyphs") / "-".join(map(str, (*setting.values(), domain))),
        }
        for setting, domain in work
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        scores = list(pool.map(score, fields))
    table = pd.DataFrame([setting | one for (setting, _), one in zip(work, scores, strict=True)])
    means = table.groupby(list(GRID)).mean().sort_values("validation", ascending=False).round(1)
    print(means.reset_index().to_markdown(index=False))


if __name__ == "__main__":
    main()

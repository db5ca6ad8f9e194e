"""FedCLIP on vectors of a real CLIP: what the paper's values learn there, and why it is little.

    uv run python benchmarks/real_clip.py --data-dir DIR
    uv run python benchmarks/real_clip.py --data-dir DIR --quick     # three settings, one round: does it all run?

DIR holds `features.parquet` and `classes.parquet` (`--dataset features`), with unit features as most caches of CLIP
have them. Two protocols: label skew (Dirichlet 0.1, 10 clients; own test rows) and base-to-new classes. Settings
differ in one thing at a time: the loss, the step size, the decay, and the length of the features, of which CLIP's own
are about ten times as long. The gate is looked at, too: how far its D weights are from 1/D.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _runs import parsed, parser_of, spread
from safetensors.torch import load_file

from fedsim import Config, Report, run_all
from fedsim.config import merged, read_yaml
from fedsim.encoding import from_features
from fedsim.registry import name_of
from fedsim.training.task import backbone_of

LENGTH = 10  # about that of the image features of OpenAI's ViT-B/32
SETTINGS = {  # of FedCLIP: what differs from the paper's values, and the length of the features
    "the paper's values": ({}, 1),
    "the paper's values, length 10": ({}, LENGTH),
    "no decay": ({"weight_decay": 0.0}, 1),
    "no decay, lr 1e-3": ({"weight_decay": 0.0, "lr": 1e-3}, 1),
    "no decay, lr 1e-3, length 10": ({"weight_decay": 0.0, "lr": 1e-3}, LENGTH),
    "class cross-entropy": ({"objective": "cross_entropy"}, 1),
    "class cross-entropy, no decay, lr 1e-3": ({"objective": "cross_entropy", "weight_decay": 0.0, "lr": 1e-3}, 1),
    "linear probe": ({"name": "probe"}, 1),
}
PROTOCOLS = {"label_skew": ["personalization"], "base_to_new": ["local", "base", "new", "harmonic_2"]}


def lengthened(data: Path, out: Path, length: int) -> Path:
    """A copy of a feature folder in which every feature is `length` times as long."""
    if length == 1:
        return data
    out.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(data / "features.parquet")
    column = table["feature"].combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32) * length
    feature = pa.FixedSizeListArray.from_arrays(pa.array(values), len(values) // len(column))
    pq.write_table(
        table.set_column(table.schema.get_field_index("feature"), "feature", feature), out / "features.parquet"
    )
    shutil.copy(data / "classes.parquet", out / "classes.parquet")
    return out


@torch.no_grad()
def gate_moved(config: Config) -> float:
    """Mean of |D * gate - 1| over all rows and dimensions, in percent, in the chosen round; nan without a gate."""
    if name_of(config.method) != "fedclip":
        return float("nan")
    features = config.dataset.load(config.data_dir)
    module = config.method.build(backbone_of(from_features(features)))
    module.load_state_dict(load_file(config.folder() / "adapter.safetensors"))
    gate = module.attention(torch.from_numpy(np.array(features.x, np.float32)))
    return 100 * (gate * gate.shape[1] - 1).abs().mean().item()


def row(report: Report, protocol: str) -> dict[str, float]:
    ours, zero = report.summary(), report.summary("zero_shot")
    return {name: 100 * ours[name] for name in PROTOCOLS[protocol]} | {
        f"zero-shot {name}": 100 * zero[name] for name in PROTOCOLS[protocol]
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="settings with any of these words in their names")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--address", help="of a Ray cluster (default: a private one)")
    parser.add_argument("--out", type=Path, default=Path("runs/real_clip"))
    args = parsed(parser, rounds=1, seeds=1, only=["length 10", "probe"], out=Path("runs/real_clip-quick"))
    work = cells(args)
    reports = run_all([config for *_, config in work], args.address)
    rows = []
    for index, report in reports:
        setting, protocol, seed, config = work[index]
        rows.append(
            {"setting": setting, "protocol": protocol, "seed": seed, "gate": gate_moved(config)} | row(report, protocol)
        )
    print_tables(pd.DataFrame(rows))


def cells(args: argparse.Namespace) -> list[tuple[str, str, int, Config]]:
    made = []
    for setting, (change, length) in SETTINGS.items():
        if args.only and not any(word in setting for word in args.only):
            continue
        data = lengthened(args.data_dir, args.out / f"length-{length}", length)
        for protocol in PROTOCOLS:
            for seed in range(args.seeds):
                fields = {"dataset": "features", "data_dir": data, "seed": seed, "partition_seed": seed}
                fields |= {"page": False, "rounds": args.rounds, "method": {"name": "fedclip"} | change}
                name = f"{setting}-{protocol}-{seed}".replace(" ", "_").replace("/", "_")
                config = Config(**merged(read_yaml(protocol), fields), out=args.out / name)
                made.append((setting, protocol, seed, config))
    return made


def print_tables(table: pd.DataFrame) -> None:
    for protocol, metrics in PROTOCOLS.items():
        runs = table[table.protocol == protocol]
        zero = runs[[f"zero-shot {name}" for name in metrics]].drop_duplicates().agg(spread)
        shown = runs.groupby("setting", sort=False)[metrics].agg(spread)
        shown = pd.concat([pd.DataFrame({"zero-shot": zero.set_axis(metrics)}).T, shown])
        shown["gate off 1/D, %"] = runs.groupby("setting", sort=False)["gate"].mean().round(2)
        print(f"\n{protocol}: percent, mean ± deviation over seeds\n")
        print(shown.to_markdown())


if __name__ == "__main__":
    main()

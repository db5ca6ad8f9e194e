"""Every method x protocol x seed: accuracy against bytes, and what it is worth to choose the round on test rows.

    uv run python benchmarks/methods.py
    uv run python benchmarks/methods.py --quick     # two methods, two protocols, one round: does it all run?
    uv run python benchmarks/methods.py --address auto --dataset pacs --data-dir DIR --backbone ViT-B-32 \\
        --pretrained openai --rounds 100

With `--backbone`, methods that need a vision transformer are among them. Every method has its own published
hyperparameters but for one local epoch; none was tuned here. What trains all of the image tower is in
`fedclip_table.py`. Cells are ordinary runs in folders of their own, one task of the cluster each: the same command
resumes them.
"""

import argparse
import itertools
from pathlib import Path

import pandas as pd
from _methods_page import page
from _runs import add_data, data_of, parsed, parser_of, spread

from fedsim import Config, Report, run_all
from fedsim.config import merged, read_yaml
from fedsim.errors import counted
from fedsim.registry import parse
from fedsim.reporting.tables import ZERO_SHOT

METHODS = {
    "FedCLIP": ("fedclip", "fedavg"),
    "linear probe": ("probe", "fedavg"),
    "linear probe, alone": ("probe", "local_only"),
    "FedOT": ("fedot", "fedavg"),
    "Fed-MP": ("fedmp", "likeness"),
    "CLIP-Adapter": ("clip_adapter", "fedavg"),
    "Tip-Adapter": ("tip_adapter", "fedavg"),
    "PromptFL": ("promptfl", "fedavg"),
    "KgCoOp": ("kgcoop", "fedavg"),
    "ProGrad": ("prograd", "fedavg"),
    "CoCoOp": ("cocoop", "fedavg"),
    "ProDA": ("proda", "fedavg"),
    "FedTPG": ("fedtpg", "fedavg"),
    "PromptFolio": ("promptfolio", "fedavg"),
    "FedPGP": ("fedpgp", "fedavg"),
    "DP-FPL": ("dp_fpl", "fedavg"),
    "FedPHA": ("fedpha", "fedavg"),
    "FedAPT": ("fedapt", "fedavg"),
    "LoRA, FedIT": ("lora", "fedavg"),
    "FFA-LoRA": ("lora", "ffa_lora"),
    "FedSA-LoRA": ("lora", "fedsa_lora"),
    "LoRA, stacking": ("lora", "lora_stacking"),
    "FedEx-LoRA": ("lora", "fedex_lora"),
    "distilled CNN": ("distil", "fedavg"),
    "Fed-BBPT": ("fed_bbpt", "fedavg"),
    "ZooPFL": ("zoopfl", "fedavg"),
    "FedMS": ("fedms", "fedavg"),
    "FedDLP": ("feddlp", "fedavg"),
}
NEED_VIT = {  # the embedded model has no patches
    "FedOTP": ("fedotp", "fedavg"),
    "PLOT": ("plot", "fedavg"),
    "TRIP": ("trip", "moving_average"),
    "PromptSRC": ("promptsrc", "moving_average"),
    "ADAPT": ("adapt", "domain_prompts"),
    "CAPT": ("capt", "label_clusters"),
    "FedMVP": ("fedmvp", "fedavg"),
    "SGPT": ("sgpt", "group_keys"),
    "PLAN": ("plan", "domain_means"),
}
ALL = METHODS | NEED_VIT
PROTOCOLS = {  # fedsim/experiments/NAME.yaml, and the number that its papers print
    "leave_one_out": "generalization",
    "in_domain": "personalization",
    "base_to_new": "harmonic_3",
    "pathological": "personalization",
    "label_skew": "personalization",
    "few_shot": "personalization",
}
CHOICE = (
    "What choosing on test rows is worth: mean over protocols and seeds. Many published codes print the third column"
)


def cell(report: Report, metric: str) -> dict[str, float]:
    """One run under three ways to choose the round that is reported, in percent."""
    tables = report.tables()
    by_round = {round: tables.summary(round=round) for round in report.counts}
    scores = {round: 100 * summary[metric] for round, summary in by_round.items() if round}
    rounds = tables.rounds
    chosen = by_round[report.chosen_round]
    return {
        "zero-shot": 100 * tables.summary(ZERO_SHOT)[metric],
        "validation": scores[report.chosen_round],
        "last": scores[report.last_round],
        "test": max(scores.values()),
        "round": report.chosen_round,
        "bytes": int((rounds.bytes_up + rounds.bytes_down).sum()),
        "parameters": report.facts["trained_parameters"],
        "gflops": rounds.flops.sum() / 1e9,
        "seconds": rounds.seconds.sum(),
        **{f"chosen/{name}": value for name, value in chosen.items()},
    }


def cells(args: argparse.Namespace) -> list[dict]:
    data = data_of(args) | {"rounds": args.rounds, "threads_per_actor": args.threads}
    domains = args.held_out or parse("dataset", args.dataset).load(args.data_dir).domains
    made = []
    for name, protocol, seed in itertools.product(
        args.methods or (ALL if args.backbone else METHODS), args.protocols, range(args.seeds)
    ):
        method, server = ALL[name]
        what = {"method": {"name": method, "local_epochs": 1}, "server": server} | data
        for domain in domains if protocol == "leave_one_out" else [None]:
            here = {"seed": seed, "partition_seed": seed} | ({"held_out": (domain,)} if domain else {})
            out = (
                args.out / args.dataset / "-".join(filter(None, (name, protocol, domain, str(seed)))).replace(" ", "_")
            )
            config = Config(**merged(read_yaml(protocol), what | here), out=out)
            made.append({"method": name, "protocol": protocol, "domain": domain, "seed": seed, "config": config})
    return made


def by_method(table: pd.DataFrame) -> pd.DataFrame:
    """Methods x protocols: the number that each protocol's papers print, mean ± deviation over seeds."""
    # One number per seed first: held-out domains are not repeats of one another.
    seeds = table.groupby(["method", "protocol", "seed"], sort=False)[["validation", "zero-shot"]].mean()
    shown = seeds["validation"].groupby(["method", "protocol"], sort=False).agg(spread).unstack(sort=False)
    zero = seeds["zero-shot"].groupby(["protocol"], sort=False).agg(spread)
    shown = pd.concat([pd.DataFrame({"zero-shot": zero}).T, shown])
    runs = table.groupby("method", sort=False)
    shown["parameters"] = runs.parameters.median().map("{:,.0f}".format)
    shown["MB in all"] = (runs.bytes.median() / 1e6).map("{:,.2f}".format)
    shown["GFLOP in all"] = runs.gflops.median().map("{:,.0f}".format)
    return shown.fillna("-")


def by_choice(table: pd.DataFrame) -> pd.DataFrame:
    """Each method under three ways to choose the round, mean over protocols and seeds; what the last one is worth."""
    shown = table.groupby("method", sort=False)[["validation", "last", "test"]].mean()
    gain = (table["test"] - table["validation"]).groupby(table.method, sort=False)
    shown["test - validation"] = gain.agg(spread)
    shown.columns = ["chosen on validation rows", "last round", "chosen on test rows", "test - validation"]
    shown["rank by validation"], shown["rank by test"] = (
        shown[column].rank(ascending=False).astype(int) for column in shown.columns[[0, 2]]
    )
    return shown.round(1)


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser)
    parser.add_argument("--methods", nargs="+", choices=ALL)
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--held-out", nargs="+", help="domains that leave_one_out holds out in turn (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--address", help="of a Ray cluster (default: a private one)")
    parser.add_argument("--threads", type=int, default=1, help="of one cell, each with a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    tiny = {"seeds": 1, "rounds": 1, "out": Path("runs/methods-quick")}
    args = parsed(parser, **tiny, methods=["FedCLIP", "FedPGP"], protocols=["base_to_new", "few_shot"])

    work = cells(args)
    results = []
    for index, report in run_all([one["config"] for one in work], args.address):
        about = {name: value for name, value in work[index].items() if name != "config"}
        results.append(about | cell(report, PROTOCOLS[about["protocol"]]))
        print(f"\r{len(results)}/{len(work)}", end="", flush=True)
    place = {name: k for k, name in enumerate((*ALL, *PROTOCOLS))}
    table = pd.DataFrame(results).sort_values(["method", "protocol"], key=lambda names: names.map(place), kind="stable")
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_parquet(args.out / f"{args.dataset}.parquet", index=False)
    size = f"{counted(args.rounds, 'round')}, {counted(args.seeds, 'seed')}"
    about = f"{args.dataset}, {args.backbone or 'the embedded model'}, {size}."
    methods = {name: ALL[name] for name in table.method.unique()}
    protocols = {name: PROTOCOLS[name] for name in args.protocols}
    shown = {"Every method and protocol": by_method(table), CHOICE: by_choice(table)}
    (args.out / f"{args.dataset}.html").write_text(page(about, table, methods, protocols, shown), encoding="utf-8")
    print(f"\n\npercent, mean ± deviation over {args.seeds} seeds, the round chosen on validation rows\n")
    print(by_method(table).to_markdown())
    print("\nwhat choosing on test rows is worth: percent, mean over protocols and seeds\n")
    print(by_choice(table).to_markdown())
    print(f"\n-> {args.out / f'{args.dataset}.html'}")


if __name__ == "__main__":
    main()

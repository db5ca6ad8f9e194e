"""What FedCLIP costs next to federating all of CLIP: parameters, bytes, operations, seconds, memory, with ViT-B-32.

    uv run python benchmarks/cost.py                                     # about 10 minutes on one core
    uv run python benchmarks/cost.py --runs runs/fedclip_table/glyphs    # and bytes to an accuracy, of finished runs
    uv run python benchmarks/cost.py --repeats 0 --runs DIR              # these alone
    uv run python benchmarks/cost.py --quick                             # a smaller CLIP: does it all run?

A step is one of the engine's own, on 32 of the embedded drawings behind the real preprocessing. Weights are random: a
step costs the same whatever they are, and nothing need be downloaded. Every measurement is a fresh process with one
thread; they alternate (A B C, A B C, ...), so that a slow minute hits all.
"""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from textwrap import fill

import numpy as np
import pandas as pd
import torch
from _measure import median_and_range
from _runs import parsed, parser_of

from fedsim.clients import Population
from fedsim.clip.checkpoints import find_weights
from fedsim.clip.model import Clip, Frozen
from fedsim.cluster.placement import Sizing
from fedsim.datasets import TRAIN
from fedsim.datasets.glyphs import Glyphs
from fedsim.encoding import encode
from fedsim.memory import collect_seldom, keep_freed_memory
from fedsim.methods import Batch
from fedsim.methods.fed_bbpt import FedBBPT
from fedsim.registry import parse
from fedsim.reporting.metrics import accuracy_per_client, accuracy_per_domain
from fedsim.reporting.parquet import read_tables
from fedsim.representations import Encoded
from fedsim.rng import torch_rng
from fedsim.servers.fedavg import FedAvg
from fedsim.training.flops import flops_of
from fedsim.training.models import Models
from fedsim.training.round_zero import initial_params
from fedsim.training.rows import RuleInputs, TrainRows
from fedsim.training.stack import train_stack
from fedsim.training.task import Task, backbone_of
from fedsim.training.trainer import Trainer

BACKBONE, BATCH = "ViT-B-32", 32
PROMPT, DRAWN_BY = "a picture of a {}", 0
WHOLE, ADAPTER = 151_277_313, 525_312  # parameters of CLIP ViT-B/32, and of FedCLIP's adapter on its 512 dimensions
PAPER = "1.5E8", "5.3E5"  # the same to two digits, which is how the paper comes to "283x faster than FedAVG"
ESTIMATED = FedBBPT()
LINE, STEPS = 100e6, 10  # bits per second and local steps of the round that is worked out as an example
ROUNDS = 200  # of the paper, over which a cache pays
GAINS = 0, 1, 2, 4  # points above zero-shot


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    Attributes:
        steps: of one measurement by default, enough for the clock.
        tower: whether the frozen image tower is run on the batch in every step, forward only.
    """

    says: str
    method: str
    steps: int
    tower: bool = False


VARIANTS = {
    "cached": Variant("FedCLIP, cached features", "fedclip", 400),
    "published": Variant("FedCLIP, image tower in every step", "fedclip", 2, tower=True),
    "all": Variant("all of CLIP (`finetune`)", "finetune", 1),
    "lora": Variant("LoRA on the text tower (`lora`)", "lora", 3),
    "prompt": Variant("prompt (`promptfl`)", "promptfl", 3),
}


class Client:
    """One client with a batch of train rows, and what the engine trains it with."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.features: Encoded = pickle.loads((folder / "features.pickle").read_bytes())
        frozen: Frozen = pickle.loads((folder / "frozen.pickle").read_bytes())
        if variant.method != "fedclip" or variant.tower:
            # Mapped and not read, as an actor maps what all workers of its machine share.
            state = torch.load(folder / "state.pt", mmap=True, weights_only=True)
            frozen = replace(frozen, state={name: tensor.numpy() for name, tensor in state.items()})
        self.rows, nothing = np.arange(len(self.features)), np.empty(0, np.int64)
        models = Models(self.features, frozen)
        trainer = Trainer(models, Population([(self.rows, nothing, nothing)], []))
        self.task = Task(parse("method", {"name": variant.method, "local_epochs": 1}), FedAvg(), seed=0)
        self.module, like = models.module(self.task)
        self.params, self.optimizer = trainer.buffers(self.task, 1)
        self.shared = self.task.select(like, "shared")
        for name, tensor in self.params.items():
            tensor[0].copy_(like[name])
        name = "pixels" if variant.tower else self.task.method.reads.image
        x = torch.from_numpy(self.features.representations.read(name, self.rows))
        self.x, self.y = x if x.dtype == torch.uint8 else x.float(), torch.from_numpy(self.features.y)
        self.tower = models.clip("float32").image_tower() if variant.tower else None

    @torch.no_grad()
    def step(self) -> None:
        x = self.x if self.tower is None else self.tower.encode(self.x)
        self.module.train()
        rows, inputs, rngs = TrainRows(x, self.y, [len(x)]), RuleInputs(self.shared), [torch_rng(DRAWN_BY, "batches")]
        train_stack(self.module, self.params, self.optimizer, rows, self.task.method, self.task.server, inputs, rngs)


def prepare(folder: Path, backbone: str, batch: int) -> dict:
    """Weights, images and features for the other processes; and all that is counted and not measured."""
    import open_clip

    torch.manual_seed(DRAWN_BY)
    model = open_clip.create_model(backbone)
    whole = sum(tensor.numel() for tensor in model.parameters())
    torch.save(model.state_dict(), folder / "random.pt")
    del model
    weights = find_weights(backbone, str(folder / "random.pt"))
    images = Glyphs(split="concepts").load(None)
    rows = np.random.default_rng(DRAWN_BY).choice(np.flatnonzero(images.split == TRAIN), batch, replace=False)
    what = (PROMPT,), folder, Sizing(actors=0), lambda event: None, ["pixels"]
    features = encode(images.take(np.sort(rows)), weights, *what)
    clip = Clip(weights)
    frozen = clip.frozen()
    torch.save({name: torch.from_numpy(array) for name, array in frozen.state.items()}, folder / "state.pt")
    (folder / "features.pickle").write_bytes(pickle.dumps(features))
    (folder / "frozen.pickle").write_bytes(pickle.dumps(replace(frozen, state={})))
    counts = {name: counted(variant, folder, clip) for name, variant in VARIANTS.items()}
    found = whole, counts["all"]["trained"], counts["cached"]["trained"]
    assert found == (WHOLE, WHOLE, ADAPTER) or backbone != BACKBONE, found
    return {
        "batch": batch,
        "classes": len(np.unique(features.y)),
        "counts": counts,
        "split": split_learning(folder),
        "estimate": ESTIMATED.directions * 4,
    }


def counted(variant: Variant, folder: Path, clip: Clip) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    client = Client(variant, folder)
    task, features = client.task, client.features
    backbone = backbone_of(features, reads=task.method.reads, clip=clip)
    params = initial_params(task, backbone)
    down, up = task.payload(params, cohort=1)
    per_step, per_row = flops_of(task, backbone, features, client.rows)
    # torch counts nothing of the fused attention of frozen towers, which is a third of their work.
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter:
        client.step()
    torch.backends.mha.set_fastpath_enabled(True)
    return {
        "trained": sum(tensor.numel() for tensor in task.select(params, "shared", "private").values()),
        "down": down,
        "up": up,
        "flops": counter.get_total_flops(),
        "extrapolated": per_step + len(client.rows) * per_row,
    }


def split_learning(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of a batch by where the image tower is cut, read off the activations of a step of `finetune`.

    The server has what is behind the cut and the text tower, and returns logits. Neither images nor labels leave the
    client: activations and the gradient of the logits go up, the logits and the gradient of the activations down.
    """
    client, seen = Client(VARIANTS["all"], folder), {}
    visual = client.module.image_tower._module
    blocks = visual.transformer.resblocks

    def keep(cut: str, tensor: torch.Tensor) -> None:
        tensor.retain_grad()
        seen[cut] = tensor

    cuts = {"after the patch embedding": 0, f"after block {len(blocks) // 2} of {len(blocks)}": len(blocks) // 2}
    for cut, k in cuts.items():
        blocks[k].register_forward_pre_hook(lambda _, args, cut=cut: keep(cut, args[0]))
    client.task.method.loss(client.module, Batch(client.x, client.y)).backward()
    logits = len(client.x) * len(client.features.classes) * client.params["logit_scale"].element_size()
    behind = "ln_post", "proj", "transformer"
    found = {}
    for cut, k in cuts.items():
        front = [weight for name, weight in visual.named_parameters() if not name.startswith(behind)]
        part = sum(weight.nbytes for weight in (*front, *blocks[:k].parameters()))
        found[cut] = {"up": seen[cut].nbytes + logits, "down": seen[cut].grad.nbytes + logits, "part": part}
    return found


def measured(variant: Variant, folder: Path, steps: int | None) -> dict[str, float]:
    """CPU and wall seconds of a step, and MiB that the process took at its most."""
    steps = steps or variant.steps
    torch.set_num_threads(1)
    keep_freed_memory()  # both as in fedsim's actors
    collect_seldom()
    idle = peak()
    client = Client(variant, folder)
    loaded = peak()
    client.step()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        client.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "cpu_s": cpu / steps,
        "wall_s": wall / steps,
        "peak_mib": peak(),
        "idle_mib": idle,
        "loaded_mib": loaded - idle,
        "used_mib": peak() - idle,
    }


def peak() -> float:
    """MiB, the most that this process has had in memory."""
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024


def once(folder: Path, *options: str) -> dict:
    """Runs this script for one of its parts, in a process with one thread."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, __file__, "--folder", str(folder), *options]
    said = subprocess.run(command, env=env | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(said.stdout.splitlines()[-1].removeprefix("RESULT "))


def measure(repeats: int, steps: int | None, backbone: str, batch: int) -> tuple[dict, dict[str, list[dict]]]:
    """What was counted; and by variant what was measured."""
    length = ["--steps", str(steps)] if steps else []
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        facts = once(Path(folder), "--backbone", backbone, "--batch", str(batch))
        for repeat in range(repeats):
            for name in VARIANTS:
                runs[name].append(run := once(Path(folder), "--variant", name, *length))
                cost = f"{run['cpu_s']:.3g} s of CPU, {run['wall_s']:.3g} s a step, {run['peak_mib']:.0f} MiB"
                print(f"{repeat + 1}/{repeats} {name}: {cost}", file=sys.stderr)
    return facts, runs


COLUMNS = "trained", "MB down + up", "GFLOP", "CPU seconds", "lowest to highest", "peak MiB", "of it above idle"


def table(facts: dict, runs: dict[str, list[dict]]) -> str:
    """One line a variant; in brackets, times that of the first."""
    lines = [
        f"| a local step of {facts['batch']} images | {' | '.join(COLUMNS)} |",
        "| --- " * (1 + len(COLUMNS)) + "|",
    ]
    counts, first = facts["counts"], facts["counts"]["cached"]
    seconds, peaks, used = (of_runs(runs, key) for key in ("cpu_s", "peak_mib", "used_mib"))
    for name, variant in VARIANTS.items():
        of = counts[name]
        _, low, high = median_and_range(run["cpu_s"] for run in runs[name])
        cells = [
            variant.says,
            f"{of['trained']:,} ({times(of['trained'], first['trained'])})",
            f"{of['down'] / 1e6:.3g} + {of['up'] / 1e6:.3g} ({times(sent(of), sent(first))})",
            f"{of['flops'] / 1e9:.3g} ({times(of['flops'], first['flops'])})",
            f"{seconds[name]:.3g} ({times(seconds[name], seconds['cached'])})",
            f"{low:.3g} to {high:.3g}",
            f"{peaks[name]:,.0f} ({times(peaks[name], peaks['cached'])})",
            f"{used[name]:,.0f} ({times(used[name], used['cached'])})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def split_table(facts: dict) -> str:
    """Split learning next to FedAvg, with the same gradients."""
    whole = facts["counts"]["all"]
    lines = [
        f"| gradients of `finetune`, {facts['batch']} images a step | MB up a step | MB down a step "
        f"| MB in a round of {STEPS} steps | as FedAvg at |",
        "| --- " * 5 + "|",
        f"| FedAvg on all of CLIP | | | {sent(whole) / 1e6:,.4g} | |",
    ]
    for cut, of in facts["split"].items():
        step = of["up"] + of["down"]
        cells = f"split learning, cut {cut}", *(f"{of[way] / 1e6:.4g}" for way in ("up", "down"))
        lines.append(f"| {' | '.join(cells)} | {STEPS * step / 1e6:,.4g} | {sent(whole) / step:,.0f} steps |")
    parts = " and ".join(f"{2 * of['part'] / 1e6:.3g}" for of in facts["split"].values())
    prompt = facts["counts"]["prompt"]["up"]
    said = paragraphs(
        [
            "Split learning (MPSL, FES-PIT; their own cuts were not read): activations at the cut and the gradient of",
            "the logits go up, the logits and the gradient of the activations down, in 32 bits; images and labels stay",
            f"with the client. Averaging the clients' parts takes {parts} MB more in a round, up and down.",
        ],
        [
            "A client that estimates gradients (`fed_bbpt`) and takes one step in a round could send the slope in each",
            f"direction, {facts['estimate']} bytes instead of {prompt:,}: the server can draw the directions itself.",
            "fedsim sends and counts the parameters.",
        ],
    )
    return "\n".join(lines) + f"\n\n{said}"


def of_runs(runs: dict[str, list[dict]], key: str) -> dict[str, float]:
    return {name: median(run[key] for run in of) for name, of in runs.items()}


def times(a: float, b: float) -> str:
    ratio = a / b
    return f"{ratio:,.0f} x" if ratio >= 100 else f"{ratio:.3g} x"


def sent(of: dict) -> float:
    return of["down"] + of["up"]


def derived(facts: dict, runs: dict[str, list[dict]]) -> str:
    counts = facts["counts"]
    trained, flops, mb = (
        {name: f(of) for name, of in counts.items()}
        for f in (lambda of: of["trained"], lambda of: of["flops"], lambda of: sent(of) / 1e6)
    )
    seconds = of_runs(runs, "cpu_s")
    line = {name: 8e6 * mb[name] / LINE for name in counts}
    whole_round = {name: line[name] + STEPS * seconds[name] for name in counts}
    # What the two have not in common; and all that it takes to fill the cache with a batch.
    tower = seconds["published"] - seconds["cached"]
    kept = ROUNDS * seconds["all"] / (tower + ROUNDS * seconds["cached"])
    over = {v.method: counts[n]["extrapolated"] / flops[n] for n, v in VARIANTS.items() if not v.tower}
    loaded = of_runs(runs, "loaded_mib")
    busy = median(run["wall_s"] / run["cpu_s"] for of in runs.values() for run in of)
    paper = float(PAPER[0]) / float(PAPER[1])
    ratio = trained["all"] / trained["cached"]
    ratios = {name: seconds["all"] / seconds[name] for name in counts}
    return paragraphs(
        [
            f'**{paper:.0f} is a ratio of parameters.** "283x faster than FedAVG" is {PAPER[0]} / {PAPER[1]} =',
            f"{paper:.1f}, both counts rounded to two digits; counted in the modules it is {trained['all']:,} /",
            f"{trained['cached']:,} = {ratio:.1f}. So much more is trained, and sent: {mb['all']:,.0f} against",
            f"{mb['cached']:.1f} MB a round for each client, up and down. **Time is another matter.** A local step of",
            f"all of CLIP takes {ratios['published']:.3g} times the CPU seconds of FedCLIP's as published, where the",
            f"frozen image tower is run in every step ({flops['all'] / flops['published']:.3g} times the operations):",
            "both push every image through the tower, and only one comes back through it. On features computed once",
            f"it takes {ratios['cached']:,.0f} times the seconds ({flops['all'] / flops['cached']:,.0f} times the",
            f"operations): {100 * tower / seconds['published']:.2f} % of the published step is the tower, which says",
            "the same of an image every time. With the pass that fills the cache counted in, the steps of",
            f"{ROUNDS} rounds are {kept:,.0f} times as fast. None of these is {ratio:.0f}; that",
            "is a time only where a round is nothing",
            f"but sending. A client's round of {STEPS} steps over a line of {LINE / 1e6:.0f} Mbit/s comes to",
            f"{whole_round['all']:.0f} s for all of CLIP ({line['all']:.0f} s of them on the line),",
            f"{whole_round['published']:.1f} s for FedCLIP as published ({line['published']:.2f} s on the line) and",
            f"{whole_round['cached']:.2f} s on cached features:",
            f"{whole_round['all'] / whole_round['published']:.3g} and",
            f"{whole_round['all'] / whole_round['cached']:.3g} times faster.",
        ],
        [
            f"The batch shows {facts['classes']} classes, of which the engine computes each text once; operations are",
            "those of this very step, without the optimizer's. `flops_of` in fedsim.training.flops, which",
            "goes on from two rows and four as if each brought a text of its own, says",
            f"{', '.join(f'{x:.3g} times as many for `{m}`' for m, x in over.items())}.",
            f"Idle is the process with its libraries, {median(of_runs(runs, 'idle_mib').values()):,.0f} MiB; what is",
            f"above it counts loading CLIP, which alone takes {loaded['lora']:,.0f} MiB for `lora` and",
            f"{loaded['prompt']:,.0f} for `promptfl`.",
            f"Medians of {len(runs['all'])} fresh processes each; a step took {busy:.2f} wall seconds per CPU second",
            f"in the median process. {machine()}, one thread; torch {torch.__version__}.",
        ],
    )


def paragraphs(*texts: list[str]) -> str:
    return "\n\n".join(fill(" ".join(text), 120, break_long_words=False, break_on_hyphens=False) for text in texts)


def machine() -> str:
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{models[0] if models else 'unknown CPU'}, {os.cpu_count()} cores"


Reached = dict[tuple[str, int], tuple[int, float]]  # by accuracy and gain: the first round to have it, MB until then


@dataclass(frozen=True)
class Finished:
    """A finished run of `fedclip_table.py`: when it was so many points above zero-shot, and what it sent in all."""

    method: str
    cell: tuple[str, ...]
    rounds: int
    mb: float
    best: dict[str, float]
    reached: Reached


def validation(scores: pd.DataFrame, away: pd.Series) -> pd.Series:
    return accuracy_per_client(scores[scores.split == "val"])


def own_test(scores: pd.DataFrame, away: pd.Series) -> pd.Series:
    return accuracy_per_client(scores[(scores.split == "test") & ~away])


def held_out(scores: pd.DataFrame, away: pd.Series) -> pd.Series:
    return accuracy_per_domain(scores[(scores.split == "test") & away])


MEASURES: dict[str, Callable[[pd.DataFrame, pd.Series], pd.Series]] = {
    "validation": validation,
    "own test": own_test,
    "held-out": held_out,
}


def read(run: Path) -> Finished:
    name, *cell = run.name.rsplit("-", 2)
    tables = read_tables(run)
    rounds, domains = tables.rounds, tables.held_out
    mb = (rounds.bytes_up + rounds.bytes_down).cumsum().set_axis(rounds["round"]) / 1e6
    best, reached = {}, {}
    for measure, of in MEASURES.items():
        before, after = (
            100 * of(model.scores, model.scores.domain.isin(domains)).groupby("round").mean()
            for model in (tables.zero_shot, tables.trained)
        )
        gained = (after - before.item()).drop(0, errors="ignore")
        best[measure] = gained.max()
        for gain in GAINS:
            if len(there := gained.index[gained > gain - 1e-9]):
                reached[measure, gain] = int(there[0]), mb[there[0]]
    return Finished(name.replace("_", " "), tuple(cell), len(rounds), mb.iloc[-1], best, reached)


def finished(folder: Path) -> list[Finished]:
    """Those that train on top of CLIP together, of cells (held-out domain and seed) that all these methods have."""
    folders = [run for run in sorted(folder.glob("*CLIP*-*-*")) if not run.name.startswith("alone")]
    runs = [read(run) for run in folders if (run / "scores.parquet").exists()]
    cells = {run.cell for run in runs}
    methods = {run.method for run in runs}
    cells = {cell for cell in cells if {run.method for run in runs if run.cell == cell} == methods}
    return [run for run in runs if run.cell in cells]


def reach(runs: list[Finished]) -> str:
    """Bytes until an accuracy is first reached, of methods whose cells are the same."""
    by_method: dict[str, list[Finished]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    gains = " | ".join(f"+{gain}" if gain else "zero-shot" for gain in GAINS)
    lines = [f"| accuracy | method | rounds | MB in all | most gained | {gains} |", "| --- " * (5 + len(GAINS)) + "|"]
    for measure in MEASURES:
        for method, of in by_method.items():
            cells = [measure, method, f"{median(run.rounds for run in of):g}", f"{median(run.mb for run in of):,.0f}"]
            cells.append(f"{median(run.best[measure] for run in of):+.1f}")
            for gain in GAINS:
                hits = [run.reached[measure, gain] for run in of if (measure, gain) in run.reached]
                when = f": {median(mb for _, mb in hits):,.4g} MB, round {median(r for r, _ in hits):g}" if hits else ""
                cells.append(f"{len(hits)} of {len(of)}{when}" if hits else "never")
            lines.append(f"| {' | '.join(cells)} |")
    said = [
        "Points above zero-shot CLIP: how many runs (a held-out domain and a seed each) ever had them after a round,",
        "and medians over these of that round and of what all clients together had been sent and had sent by then. A",
        "method that never had them in its rounds might in more; and test rows may be that lucky for a round.",
    ]
    for (whole, theirs), (gate, ours) in product(by_method.items(), repeat=2):
        if "all of CLIP" not in whole or not gate.startswith("FedCLIP"):
            continue
        pairs = [(a.reached, b.reached) for a in theirs for b in ours if a.cell == b.cell]
        both = [a[key][1] / b[key][1] for a, b in pairs for key in a.keys() & b.keys()]
        alone = [sum(len(a.keys() - b.keys()) for a, b in pairs), sum(len(b.keys() - a.keys()) for a, b in pairs)]
        middle = f", {median(both):.3g} times as many bytes in the median" if both else ""
        a_round, ours_a_round = (median(run.mb / run.rounds for run in of) for of in (theirs, ours))
        said.append(
            f"**{whole} next to {gate}:** {a_round / ours_a_round:.3g} times the bytes a round; over accuracies, gains "
            f"and runs, both reach {len(both)} of {len(pairs) * len(MEASURES) * len(GAINS)}{middle}, {alone[0]} are "
            f"reached by {whole} alone and {alone[1]} by {gate} alone."
        )
    return "\n".join(["", *lines, "", paragraphs(said)])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--backbone", default=BACKBONE, help="of random weights (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; 0: none")
    parser.add_argument("--steps", type=int, help="of each measurement (default: enough for the clock)")
    parser.add_argument("--runs", type=Path, help="folder of a data set's finished runs, by fedclip_table.py")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a part's process
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parsed(parser, repeats=1, steps=1, backbone="ViT-S-32-alt", batch=4)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be 1 or more, got {args.steps}")
    if args.folder:
        variant = args.variant and VARIANTS[args.variant]
        found = (
            measured(variant, args.folder, args.steps) if variant else prepare(args.folder, args.backbone, args.batch)
        )
        print("RESULT", json.dumps(found))
        return
    if args.runs and not args.runs.is_dir():
        parser.error(f"--runs needs a folder of runs; there is none at {args.runs}")
    if args.repeats:
        facts, runs = measure(args.repeats, args.steps, args.backbone, args.batch)
        print(table(facts, runs))
        print(f"\n{derived(facts, runs)}\n")
        print(split_table(facts))
    if args.runs:
        of = finished(args.runs)
        print(reach(of) if of else f"\nNo cell in {args.runs} that all methods there have finished.")


if __name__ == "__main__":
    main()

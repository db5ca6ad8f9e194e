"""What has to be measured on a GPU, in one table: encoding, adapters in stacks, prompts and LoRA, memory, same bits.

    python benchmarks/gpu.py                        # under 6 minutes on one GPU; Ray is used where it is installed
    python benchmarks/gpu.py --only adapter,bits    # some sections
    python benchmarks/gpu.py --quick                # tiny sizes, on a CPU too: does it all run?

Weights are random: a step costs the same whatever they are, and nothing need be downloaded. Ratios are of runs on this
GPU, in turns (A B A B ...), and each is a median; rates are of this GPU alone. A floor is what the memory of the GPU
allows, from a copy that is timed here.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))  # the plain loop is one of the peers
import job as plain

from fedsim import Config, run
from fedsim.clients import Population
from fedsim.clip.checkpoints import EMBEDDED, find_weights, width_of
from fedsim.clip.model import Clip
from fedsim.clip.precision import autocast
from fedsim.clip.texts import DEFAULT
from fedsim.cluster.worker import device_of
from fedsim.datasets import TRAIN, Features, Images
from fedsim.encoding import BLOCK, Encoder, from_features
from fedsim.files import digest
from fedsim.params import flatten
from fedsim.registry import parse
from fedsim.representations import Encoded
from fedsim.servers.fedavg import FedAvg
from fedsim.training.round_zero import initial_params
from fedsim.training.stack import TOWER_BYTES, stack_size
from fedsim.training.task import Task, backbone_of
from fedsim.training.trainer import Chunk
from fedsim.training.worker import ClientWorker
from fedsim.updates import ChunkSum

ROWS, WIDTH, CLASSES = 64, 512, 7  # of a client of the adapter's job: two local steps of 32 rows
SAME = {True: "the same bits", False: "OTHER BITS"}
PRECISIONS = "fp32", "bf16"
PHOTO = 500, 375  # pixels of a picture, as in ImageNet and PACS's order of size


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `quick` is for a machine without a GPU."""

    backbones: tuple[str, ...]
    images: int
    clients: int
    loop_clients: int
    tower_clients: int
    classes: int
    rounds: int
    repeats: int
    copy_bytes: int


FULL = Sizes(("ViT-B-32", "ViT-B-16"), 512, 512, 64, 32, 100, 5, 5, 4 << 30)
QUICK = Sizes((EMBEDDED[0],), 8, 4, 2, 2, 5, 2, 1, 16 << 20)


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    section: str
    says: str
    value: float | str
    unit: str = ""


class Bench:
    """The device, the sizes and a scratch folder."""

    def __init__(self, sizes: Sizes, device: str, scratch: Path) -> None:
        self.sizes, self.device, self.scratch = sizes, device, scratch

    # Sections ---------------------------------------------------------------------------------------------------

    def ceilings(self) -> Iterator[Line]:
        """What this GPU can do at most."""
        yield Line("ceilings", "copy in memory, bytes read and written", self.copy_rate / 1e9, "GB/s")
        side = 256 if self.device == "cpu" else 8192
        for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
            a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            seconds = self.timed(lambda a=a, b=b: a @ b)
            yield Line(
                "ceilings", f"matrix product of {side} x {side}, {name}", 2 * side**3 / seconds / 1e12, "TFLOP/s"
            )

    def encode(self) -> Iterator[Line]:
        """The frozen image tower over pictures: fedsim's blocks, and the tower alone."""
        images = self.pictures()
        for name in self.sizes.backbones:
            weights = self.weights(name)
            encoder = Encoder(images, weights, None, self.device)
            encoder.encode(0)  # loads the model
            blocks = range(len(images) // BLOCK or 1)
            seconds = self.timed(lambda encoder=encoder, blocks=blocks: [encoder.encode(k) for k in blocks])
            yield Line("encode", f"{name}, files to features, one process", len(images) / seconds, "images/s")
            size = len(encoder.clip.pixels([images.open(0)])[0][0])
            for batch in (BLOCK, 4 * BLOCK):
                pixels = torch.randn(batch, 3, size, size, device=self.device)
                pixels = pixels.contiguous(memory_format=torch.channels_last)
                for precision in PRECISIONS:
                    seconds = self.timed(partial(_tower, Clip(weights.at(precision), self.device), pixels))
                    what = f"{name}, the tower alone, batches of {batch}, {precision}"
                    yield Line("encode", what, batch / seconds, "images/s")
            yield Line("encode", f"{name}, peak memory", self.peak_gb(partial(encoder.encode, 0)), "GB")
            yield Line("encode", f"{name}, a block again", _same(encoder.encode(0), encoder.encode(0)))
            few = [images.open(k) for k in range(4)]
            ours, theirs = (clip.encode_images(few).astype(float) for clip in (encoder.clip, Clip(weights)))
            apart = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            yield Line("encode", f"{name}, distance from the CPU's features (float16 rounds by 3e-4)", apart)

    def adapter(self) -> Iterator[Line]:
        """FedCLIP's adapter on cached features: a round of clients in stacks, and the plain loop over them."""
        count = self.sizes.clients
        features, clients = self.made(count)
        task = Task(parse("method", "fedclip"), FedAvg(), seed=0)
        trainer = ClientWorker(features, clients, None, self.device)
        params = initial_params(task, backbone_of(features))
        what = task, 1, {0: flatten(params)}, np.empty(0), Chunk(0, [(k, 0) for k in range(count)])
        few = self.sizes.loop_clients
        rounds = {
            "fedsim": lambda: trainer.train(*what),
            "loop": partial(self.loop, features, few, None),
            "fused": partial(self.loop, features, few, True) if self.device != "cpu" else None,
        }
        seconds = self.in_turn({name: call for name, call in rounds.items() if call})
        each = {name: took / (count if name == "fedsim" else few) for name, took in seconds.items()}
        stack = stack_size(params, task.method, self.device)
        yield Line(
            "adapter", f"{count} clients of {ROWS} rows, stacks of {min(stack, count)}", 1 / each["fedsim"], "updates/s"
        )
        for name, says in {"loop": "a plain PyTorch loop", "fused": "the same with fused Adam"}.items():
            if name in each:
                yield Line("adapter", says, 1 / each[name], "updates/s")
                yield Line("adapter", f"fedsim / {says}", each[name] / each["fedsim"], "x")
        trained = sum(tensor.numel() for tensor in params.values())
        # Adam alone reads and writes a weight and its two moments, and reads the gradient, at each of two steps.
        floor = 2 * 7 * 4 * trained / self.copy_rate
        yield Line("adapter", "memory-bandwidth floor of Adam / fedsim", 100 * floor / each["fedsim"], "%")
        yield Line("adapter", "peak memory", self.peak_gb(rounds["fedsim"]), "GB")
        yield Line("adapter", "a round again", _same(*(trainer.train(*what).delta for _ in range(2))))

    def towers(self) -> Iterator[Line]:
        """Local steps of methods through the text tower, in a round whose clients are stacked or not."""
        name = self.sizes.backbones[-1]
        clips = {precision: Clip(self.weights(name).at(precision)).frozen() for precision in PRECISIONS}
        methods = {"promptfl": "PromptFL, 16 tokens", "lora": "LoRA of the text tower"}
        for (method, about), precision in product(methods.items(), PRECISIONS):
            frozen, says = clips[precision], f"{about}, {precision}"
            count, batch = self.sizes.tower_clients, 4 if self.device == "cpu" else 32
            features, clients = self.made(count, frozen.weights, batch)
            task = Task(parse("method", {"name": method, "batch_size": batch, "local_epochs": 1}), FedAvg(), seed=0)
            trainer = ClientWorker(features, clients, frozen, self.device)
            params, tower_bytes = trainer.models.module(task)[1], trainer.models.tower_bytes(task)
            chunk = Chunk(0, [(k, 0) for k in range(count)])
            train = partial(trainer.train, task, 1, {0: flatten(params)}, np.empty(0), chunk)
            with patch.dict(TOWER_BYTES, cpu=TOWER_BYTES["cuda"]):  # on a CPU, which has no stacks of towers, too
                stack = min(count, stack_size(params, task.method, self.device, tower_bytes))
                seconds = self.in_turn({"stacked": train} | ({"alone": partial(_alone, train)} if stack > 1 else {}))
            what = f"{says}: {name}, {self.sizes.classes} classes, batch {batch}, {count} clients in stacks of"
            for way, size in {"alone": 1, "stacked": stack}.items():
                if way in seconds:
                    yield Line("towers", f"{what} {size}", count / seconds[way], "steps/s")
            if stack > 1:
                yield Line("towers", f"{says}, stacks of {stack} / of 1", seconds["alone"] / seconds["stacked"], "x")
            yield Line("towers", f"{says}, {count} clients, peak memory", self.peak_gb(train), "GB")
            yield Line("towers", f"{says}, {count} clients, a round again", _same(train().delta, train().delta))

    def bits(self) -> Iterator[Line]:
        """Whole runs on the embedded drawings: the same bits again, and with actors that share the GPU."""
        gpus = None if self.device == "cpu" else 0.5
        for method in ("fedclip", "promptfl"):
            fields = {"method": method, "rounds": self.sizes.rounds, "partition": "iid", "clients": 8, "shots": 4}
            fields |= {"held_out": ("ink",), "gpus_per_actor": gpus, "cache_dir": self.scratch / "cache"}
            ways = {"once": 0, "again": 0} | ({"2 actors on the GPU": 2} if gpus and _has_ray() else {})
            results: dict[str, str] = {}
            for way, actors in ways.items():
                began = time.perf_counter()
                out = self.scratch / f"{method} {way}"
                run(Config(**fields, actors=actors, out=out))
                results[way] = digest(
                    *((out / file).read_bytes().hex() for file in ("scores.parquet", "adapter.safetensors"))
                )
                yield Line("bits", f"{method}, whole run, {way}", time.perf_counter() - began, "s")
            for way in list(ways)[1:]:
                yield Line("bits", f"{method}, once and {way}", SAME[results[way] == results["once"]])

    # What they use ----------------------------------------------------------------------------------------------

    @property
    def copy_rate(self) -> float:
        """Bytes per second of a copy, read and written."""
        if not hasattr(self, "_copy_rate"):
            source = torch.randn(self.sizes.copy_bytes // 4, device=self.device)
            target = torch.empty_like(source)
            self._copy_rate = 2 * self.sizes.copy_bytes / self.timed(lambda: target.copy_(source))
        return self._copy_rate

    def timed(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, after one that warms up."""
        return self.in_turn({"": call})[""]

    def in_turn(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each call; they take turns."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(1 + self.sizes.repeats):
            for name, call in calls.items():
                self.wait()
                began = time.perf_counter()
                call()
                self.wait()
                seconds[name] += [time.perf_counter() - began] * bool(repeat)
        return {name: median(each) for name, each in seconds.items()}

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def peak_gb(self, call: Callable[[], object]) -> float:
        """Gigabytes that torch holds at most during a call; 0 on a CPU."""
        if self.device == "cpu":
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 1e9

    def weights(self, name: str):
        """Random weights of a backbone in a file, as a user's checkpoint would be."""
        if name == EMBEDDED[0]:
            return find_weights(*EMBEDDED)
        import open_clip

        file = self.scratch / f"{name}.pt"
        if not file.exists():
            torch.manual_seed(0)
            torch.save(open_clip.create_model(name).state_dict(), file)
        return find_weights(name, str(file))

    def pictures(self) -> Images:
        """JPEG files of a photo's size in memory, of smooth noise."""
        from PIL import Image

        rng = np.random.default_rng(0)
        files = []
        for _ in range(self.sizes.images):
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
            stream = BytesIO()
            small.resize(PHOTO, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
            files.append(stream.getvalue())
        index = np.zeros(len(files), np.int64)
        names = [f"picture {k}" for k in range(len(files))]
        about = {"classes": ("thing",), "domains": ("noise",), "split": np.zeros(len(files), np.int8)}
        return Images(files=files, names=names, y=index, domain=index, **about)

    def made(self, count: int, weights=None, rows: int = ROWS) -> tuple[Encoded, Population]:
        """Random features of so many clients, and class embeddings: of a backbone's width where one is given."""
        width, classes = (width_of(weights), self.sizes.classes) if weights else (WIDTH, CLASSES)
        rng = np.random.default_rng(0)
        text = rng.standard_normal((classes, width)).astype(np.float32)
        total = count * rows
        features = Features(
            x=rng.standard_normal((total, width), np.float32).astype(np.float16),
            y=rng.integers(classes, size=total),
            domain=np.zeros(total, np.int64),
            classes=tuple(f"thing number {k}" for k in range(classes)),
            domains=("noise",),
            split=np.full(total, TRAIN, np.int8),
            class_embeddings=text / np.linalg.norm(text, axis=1, keepdims=True),
            logit_scale=100.0,
        )
        nothing = np.empty(0, np.int64)
        splits = [(np.arange(k * rows, (k + 1) * rows), nothing, nothing) for k in range(count)]
        data = from_features(features)
        data = replace(data, class_embeddings=replace(data.class_embeddings, templates=(DEFAULT,)))
        return data, Population(splits, [])

    def loop(self, features: Encoded, count: int, fused: bool | None) -> None:
        """One client after the other, as anybody would write it; the rows are on the GPU before it starts."""
        if not hasattr(self, "_rows"):
            x = torch.from_numpy(features.representations.features).float()
            arrays = x, torch.from_numpy(features.y), torch.from_numpy(features.class_embeddings.vectors)
            self._rows = tuple(array.to(self.device) for array in arrays)
        x, y, text = self._rows
        server, worker = (plain.Adapter(WIDTH).to(self.device) for _ in range(2))
        received = server.state_dict()
        total = {name: torch.zeros_like(tensor) for name, tensor in received.items()}
        for client in range(count):
            worker.load_state_dict(received)
            rows = client * ROWS + torch.randperm(ROWS, device=self.device)
            plain.local_epoch(worker, [(x[some], y[some]) for some in rows.split(plain.BATCH)], text, fused)
            for name, tensor in worker.state_dict().items():
                total[name] += tensor / count
        server.load_state_dict(total)


def _alone(train: Callable[[], ChunkSum]) -> ChunkSum:
    with patch.dict(TOWER_BYTES, dict.fromkeys(TOWER_BYTES, 0)):
        return train()


@torch.no_grad()
def _tower(clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
    with autocast(clip.weights.precision, clip.device):
        return clip.model.encode_image(pixels)


def _same(one: np.ndarray, other: np.ndarray) -> str:
    return SAME[one.tobytes() == other.tobytes()]


def _has_ray() -> bool:
    try:
        import ray  # noqa: F401
    except ImportError:
        return False
    return True


def table(lines: list[Line]) -> str:
    rows = ["| section | what | | |", "| --- | --- | ---: | --- |"]
    for line in lines:
        value = line.value if isinstance(line.value, str) else f"{line.value:,.4g}"
        rows.append(f"| {line.section} | {line.says} | {value} | {line.unit} |")
    return "\n".join(rows)


SECTIONS = "ceilings", "encode", "adapter", "towers", "bits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help=f"sections, separated by commas: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on the CPU: does it run?")
    parser.add_argument("--out", type=Path, help="write the lines here as JSON too")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(SECTIONS):
        parser.error(f"no sections {', '.join(sorted(unknown))}; there are: {', '.join(SECTIONS)}")
    if not args.quick and not torch.cuda.is_available():
        parser.error("torch finds no GPU on this machine; --quick runs tiny sizes on the CPU")
    device = "cpu" if args.quick else device_of(1.0)
    torch.set_num_threads(1)  # as an actor has it
    print(f"{'CPU' if args.quick else torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(QUICK if args.quick else FULL, device, Path(scratch))
        for section in args.only.split(","):
            began = time.perf_counter()
            for line in getattr(bench, section)():
                lines.append(line)
                print(f"  {line.says}: {line.value} {line.unit}", file=sys.stderr, flush=True)
            print(f"{section} took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(lines))
    if args.out:
        args.out.write_text(json.dumps([asdict(line) for line in lines]), encoding="utf-8")


if __name__ == "__main__":
    main()

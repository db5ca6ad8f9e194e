"""How fast are images encoded, from files to features: fedsim against a plain loop over a DataLoader of PyTorch?

    uv run python benchmarks/encode.py
    uv run python benchmarks/encode.py --quick      # 16 images and the embedded model: does it all run?

Photos of smooth noise (JPEG, 500 x 375) and models of random weights, which cost what trained ones do. The loop has the
same model, preprocessing and batches under `torch.inference_mode`, with 0 or 2 workers that decode. fedsim is one
process of a pool, as on a machine with one GPU: once as it is, and once with a number of decoding threads. The loop
and fedsim run in separate processes, because fedsim changes its process's allocator settings. All have one thread of
PyTorch, take turns and are warm: model and workers are started before. Medians of images a second.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from _runs import parsed, parser_of
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fedsim.clip.checkpoints import EMBEDDED, Weights, find_weights
from fedsim.clip.model import Clip
from fedsim.datasets import TRAIN, Images
from fedsim.encoding import BLOCK, Encoder
from fedsim.memory import keep_freed_memory

PHOTO = 500, 375  # pixels, as in ImageNet
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Photos(Dataset):
    """Preprocessed images, as any loop over a DataLoader has them."""

    def __init__(self, files: list[Path], preprocess: Callable[[Image.Image], torch.Tensor]) -> None:
        self.files, self.preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            return self.preprocess(image)


@torch.inference_mode()
def plain_loop(clip: Clip, loader: DataLoader) -> np.ndarray:
    return torch.cat([clip.model.encode_image(batch.to(clip.device)).half().cpu() for batch in loader]).numpy()


def by_fedsim(encoder: Encoder) -> np.ndarray:
    return np.concatenate([encoder.encode(block) for block in range(-(-len(encoder.images) // BLOCK))])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--backbones", nargs="+", default=[EMBEDDED[0], "ViT-B-32"], help="open_clip model names")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="decoding threads of the second row of fedsim")
    args = parsed(parser, images=16, repeats=1, backbones=[EMBEDDED[0]])
    with tempfile.TemporaryDirectory() as folder:
        table = pd.DataFrame([row for name in args.backbones for row in rows(name, args, Path(folder))])
    print(table.set_index("backbone").to_markdown(floatfmt=("", "", ".0f", ".2f")))


def rows(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    data = weights_of(name, folder), photos(folder / "photos", args.images)
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as loop, ProcessPoolExecutor(1, spawn) as fedsim:
        processes = dict.fromkeys(loop.submit(start, loops, *data, 2).result(), loop)
        processes |= dict.fromkeys(fedsim.submit(start, encoders, *data, args.threads).result(), fedsim)
        features = [process.submit(encoded, kind).result() for kind, process in processes.items()]  # warm
        for each in features:
            np.testing.assert_allclose(each, features[-1], rtol=0.01, atol=0.01)
        seconds = {kind: [] for kind in processes}
        for _ in range(args.repeats):
            for kind, process in processes.items():
                seconds[kind].append(process.submit(timed, kind).result())
    speeds = {kind: args.images / median(each) for kind, each in seconds.items()}
    first = next(iter(speeds.values()))
    return [
        {"backbone": name, "": kind, "images/s": speed, "against the loop": speed / first}
        for kind, speed in speeds.items()
    ]


WORK: dict[str, Callable[[], np.ndarray]] = {}  # of this process: passes over the photos


def start(make: Callable[..., dict[str, Callable[[], np.ndarray]]], *args: object) -> list[str]:
    """The names of this process's passes, which `make` makes of `args`."""
    torch.set_num_threads(1)
    WORK.update(make(*args))
    return list(WORK)


def loops(weights: Weights, files: list[Path], workers: int) -> dict[str, Callable[[], np.ndarray]]:
    clip = Clip(weights, DEVICE)
    work = {}
    for count in (0, workers):
        loader = DataLoader(Photos(files, clip.preprocess), BLOCK, num_workers=count, persistent_workers=count > 0)
        work[f"plain loop, {count} workers"] = partial(plain_loop, clip, loader)
    return work


def encoders(weights: Weights, files: list[Path], threads: int) -> dict[str, Callable[[], np.ndarray]]:
    keep_freed_memory()  # as every pool has it
    zeros = np.zeros(len(files), np.int64)
    about = {"y": zeros, "domain": zeros, "classes": ("photo",), "domains": ("noise",)}
    images = Images(files=files, names=list(map(str, files)), split=np.full(len(files), TRAIN, np.int8), **about)
    threaded = Encoder(images, weights, None, DEVICE)
    threaded.threads = threads
    return {
        "fedsim": partial(by_fedsim, Encoder(images, weights, None, DEVICE)),
        f"fedsim, {threads} threads decode": partial(by_fedsim, threaded),
    }


def encoded(kind: str) -> np.ndarray:
    return WORK[kind]().astype(float)


def timed(kind: str) -> float:
    began = time.perf_counter()
    WORK[kind]()
    return time.perf_counter() - began


def weights_of(name: str, folder: Path) -> Weights:
    if name == EMBEDDED[0]:
        return find_weights(*EMBEDDED)
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / f"{name}.pt")
    return find_weights(name, str(folder / f"{name}.pt"))


def photos(folder: Path, count: int, size: tuple[int, int] = PHOTO, seed: int = 0) -> list[Path]:
    folder.mkdir(exist_ok=True)
    rng, files = np.random.default_rng(seed), [folder / f"{k}.jpg" for k in range(count)]
    for file in files:
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(file, quality=90)
    return files


if __name__ == "__main__":
    main()

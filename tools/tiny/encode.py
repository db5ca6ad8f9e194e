"""Features of all views of all icons, in chunks that a second run takes up again."""

from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import numpy as np
import torch

import corpus
import tower
from views import Views

_CHUNK = 500  # icons a file
_BATCH = 32


def encode(icons_file: Path, downloads: Path, folder: Path) -> None:
    """Writes `folder/NNN.npz` with `features` (N, 1280) float16 and `icon` (N,), the icon's row."""
    folder.mkdir(parents=True, exist_ok=True)
    tower.pretrained(downloads)  # fetched once, before the workers ask for it
    count = -(-len(corpus.load(icons_file)) // _CHUNK)
    jobs = [(icons_file, downloads, folder, chunk) for chunk in range(count)]
    with ProcessPoolExecutor(cpu_count(), mp_context=get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_encode_chunk, jobs), 1):
            print(f"encoded {done} of {count} chunks", flush=True)


def read(folder: Path, chunks: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 1280) float32 features and (N,) rows of their icons, of all or of the first chunks."""
    parts = [np.load(file) for file in sorted(folder.glob("*.npz"))[:chunks]]
    features = torch.from_numpy(np.concatenate([part["features"] for part in parts])).float()
    return features, torch.from_numpy(np.concatenate([part["icon"] for part in parts]))


def _encode_chunk(job: tuple[Path, Path, Path, int]) -> None:
    icons_file, downloads, folder, chunk = job
    file = folder / f"{chunk:03}.npz"
    if file.exists():
        return
    torch.set_num_threads(1)
    network, all_icons = _loaded(icons_file, downloads)
    views, rows, waiting, found = Views(seed=chunk), [], [], []
    for row in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(all_icons))):
        seen = views.of(all_icons[row])
        rows += [row] * len(seen)
        waiting += seen
        while len(waiting) >= _BATCH:
            found.append(tower.features(network, torch.stack(waiting[:_BATCH])))
            waiting = waiting[_BATCH:]
    if waiting:
        found.append(tower.features(network, torch.stack(waiting)))
    unfinished = file.with_name(f"{file.stem}.part")
    with unfinished.open("wb") as stream:
        np.savez(stream, features=torch.cat(found).half().numpy(), icon=np.array(rows))
    unfinished.rename(file)


@cache
def _loaded(icons_file: Path, downloads: Path):
    return tower.pretrained(downloads), corpus.load(icons_file)

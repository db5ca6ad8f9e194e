"""Images -> features, once: by a pool of workers, resumable, into one memory-mapped file.

The file's name is a key of everything that made it: the architecture, the bytes of the weights, the
preprocessing, and the list of images with their sizes and times.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from filelock import FileLock

from fedsim.clip import Clip
from fedsim.cluster import Sizing
from fedsim.datasets import Features, Images, map_matrix, write_matrix
from fedsim.pool import Event, Progress, open_pool
from fedsim.rng import seed_for
from fedsim.weights import Weights

BLOCK = 64  # images of one call: fixed, since a tower's sums may follow the size of its batch


class Encoder:
    """Turns blocks of images, and prompts, into features; loads CLIP when first asked."""

    def __init__(self, images: Images, weights: Weights, device: str) -> None:
        self.images, self.weights, self.device = images, weights, device
        self.loaded: Clip | None = None

    @property
    def clip(self) -> Clip:
        self.loaded = self.loaded or Clip(self.weights, self.device)
        return self.loaded

    def encode(self, block: int) -> np.ndarray:
        """(n, D) float16 of the images of one block."""
        stop = min((block + 1) * BLOCK, len(self.images))
        return self.clip.encode_images([self.images.open(index) for index in range(block * BLOCK, stop)])

    def keep(self, level: str, part: tuple[int, int]) -> np.ndarray:
        """(n, ...) what is kept at a level of one view of one block of images; view 0 is the one for judging."""
        view, block = part
        rows = range(block * BLOCK, min((block + 1) * BLOCK, len(self.images)))
        # Views have no part in a run's seed: they are drawn once and kept.
        seeds = [seed_for(0, "view", view, row) for row in rows] if view else None
        pixels = self.clip.pixels([self.images.open(row) for row in rows], seeds)
        if level == "pixels":
            return pixels
        return self.clip.encode_tokens(pixels) if level == "tokens" else self.clip.encode_pixels(pixels)

    def prototypes(self, prompts: list[str]) -> tuple[np.ndarray, float]:
        """(C, D) float32 unit rows, and the logit scale."""
        return self.clip.encode_texts(prompts), self.clip.logit_scale


def feature_file(images: Images, weights: Weights, cache: Path) -> Path:
    """Where the features of these images under these weights are, or will be."""
    return cache / f"{_digest(weights.key, images.fingerprint())}.arrow"


def text_file(classes: Sequence[str], weights: Weights, prompt: str, cache: Path) -> Path:
    """Where the text features of these classes are, or will be."""
    return cache / f"{_digest(weights.key, *(prompt.format(name) for name in classes))}.text.npz"


def encode(
    images: Images,
    weights: Weights,
    prompt: str,
    cache: Path,
    sizing: Sizing,
    progress: Progress,
    level: str = "features",
    augment: int = 0,
) -> Features:
    """Features of all images and prototypes of all classes, from the cache where they are there.

    Args:
        prompt: with `{}` where the class name goes.
        cache: a folder of this machine.
        level: of `sites.IMAGE_LEVELS`: what clients read of an image, kept beside its features.
        augment: augmented views of each image that are kept at that level.

    Raises:
        InputError: an image is corrupt, or the weights are.
    """
    cache.mkdir(parents=True, exist_ok=True)
    file = feature_file(images, weights, cache)
    with FileLock(file.with_suffix(".lock")):  # the next process finds it done
        features = _encode(images, weights, prompt, file, sizing, progress)
        if level == "features" and not augment:
            return features
        kept = file.with_suffix(f".{level}-{augment}.npy")
        if not kept.exists():
            _keep(images, weights, kept, level, augment, sizing, progress)
        for part in file.parent.glob(f"{file.stem}.{level}-*-*.npy"):  # one that was killed left them
            part.unlink()
        return replace(features, augment=augment, kept={level: kept})


def _keep(images: Images, weights: Weights, file: Path, level: str, augment: int, sizing: Sizing, progress) -> None:
    blocks = range(-(-len(images) // BLOCK))
    wanted = [(view, block) for view in range(1 + augment) for block in blocks]
    # Of their level: a run of another may have been killed, and its parts are here too.
    parts = {(view, block): file.with_suffix(f".{level}-{view}-{block:06d}.npy") for view, block in wanted}
    todo = [part for part in wanted if not parts[part].exists()]
    total = len(images) * (1 + augment)
    if todo:
        with open_pool(sizing, len(todo), Encoder, images, weights) as pool:
            for done, (part, array) in enumerate(zip(todo, pool.map("keep", todo, level), strict=True), 1):
                _save(parts[part], array)
                ready = (len(parts) - len(todo) + done) * BLOCK
                progress(Event(f"keeping {level}", min(ready, total), total))
    first = np.load(parts[wanted[0]], mmap_mode="r")
    whole = file.with_name(f"part-{os.getpid()}-{file.name}")
    about = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with whole.open("wb") as stream:  # not through a map, by which a full disk would end the process
        np.lib.format.write_array_header_2_0(stream, about | {"shape": (total, *first.shape[1:])})
        for part in wanted:  # one at a time: together they may be larger than memory
            stream.write(np.load(parts[part]).tobytes())
    whole.replace(file)


def _encode(images: Images, weights: Weights, prompt: str, file: Path, sizing: Sizing, progress: Progress) -> Features:
    prompts = [prompt.format(name) for name in images.classes]
    texts = text_file(images.classes, weights, prompt, file.parent)
    parts = [file.with_suffix(f".{block:06d}.npy") for block in range(-(-len(images) // BLOCK))]
    todo = [] if file.exists() else [block for block, part in enumerate(parts) if not part.exists()]
    if todo or not texts.exists():
        with open_pool(sizing, len(todo), Encoder, images, weights) as pool:
            for done, (block, x) in enumerate(zip(todo, pool.map("encode", todo), strict=True), 1):
                _save(parts[block], x)
                ready = (len(parts) - len(todo) + done) * BLOCK
                progress(Event("encoding images", min(ready, len(images)), len(images)))
            if not texts.exists():
                prototypes, scale = next(pool.map("prototypes", [prompts]))
                _save(texts, prototypes=prototypes, scale=np.float64(scale))
    if not file.exists():
        write_matrix(file, np.concatenate([np.load(part) for part in parts]))
        for part in parts:
            part.unlink()
    text = np.load(texts)
    return _with_labels(images, file, text["prototypes"], float(text["scale"]), prompt)


def keep(features: Features, cache: Path) -> Features:
    """Features of one's own, written where actors can map them."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"{_digest(features.x)}.arrow"
    if not file.exists():
        write_matrix(file, features.x)
    return _with_labels(features, file, features.prototypes, features.logit_scale)


def _with_labels(rows, file: Path, prototypes: np.ndarray, logit_scale: float, prompt: str = "{}") -> Features:
    return Features(
        y=rows.y,
        domain=rows.domain,
        classes=rows.classes,
        domains=rows.domains,
        split=rows.split,
        unseen_test=rows.unseen_test,
        notes=rows.notes,
        file=file,
        x=map_matrix(file),
        prototypes=prototypes,
        logit_scale=logit_scale,
        prompt=prompt,
    )


def _digest(*things) -> str:
    digest = blake2b(digest_size=12)
    for thing in things:
        digest.update(thing.encode() + b"\n" if isinstance(thing, str) else np.ascontiguousarray(thing).data)
    return digest.hexdigest()


def _save(file: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> None:
    """Whole or not at all, so that a kill leaves nothing half-written."""
    part = file.with_name(f"part-{os.getpid()}-{file.name}")
    with part.open("wb") as stream:
        np.savez(stream, **arrays) if array is None else np.save(stream, array)
    part.replace(file)

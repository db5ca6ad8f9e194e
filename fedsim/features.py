"""Images -> features, once: by a pool of workers, resumable, into files that are mapped.

A file's name is a key of everything that made it: the architecture, the bytes of the weights, the preprocessing, and
the bytes of the images in their order.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.cache import Notice, locked, map_array, read_array, write_array
from fedsim.clip.checkpoints import Weights
from fedsim.clip.model import Clip
from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import open_pool
from fedsim.datasets import Features, Images
from fedsim.errors import InputError, Stopped
from fedsim.events import Note, Progress, Step
from fedsim.files import digest
from fedsim.rng import seed_for

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
        rows = self._rows(block)
        return self._finite(self.clip.encode_images(map(self.images.open, rows)), rows)

    def keep(self, level: str, part: tuple[int, int]) -> np.ndarray:
        """(n, ...) what is kept at a level of one view of one block of images; view 0 is the one for judging."""
        view, block = part
        rows = self._rows(block)
        # Views have no part in a run's seed: they are drawn once and kept.
        seeds = [seed_for(0, "view", view, row) for row in rows] if view else None
        pixels = self.clip.pixels(map(self.images.open, rows), seeds)
        if level == "pixels":
            return pixels
        encode = self.clip.encode_tokens if level == "tokens" else self.clip.encode_pixels
        return self._finite(encode(pixels), rows)

    def class_embeddings(self, prompts: list[str]) -> np.ndarray:
        """(1,) of a record: `prototypes`, (C, D) float32 unit rows, and `scale`, the logit scale."""
        class_embeddings = self.clip.encode_texts(prompts)
        if not np.isfinite(class_embeddings).all():
            raise InputError(f"{self._name} gives text features that are NaN or infinite; try other weights")
        kind = np.dtype([("prototypes", class_embeddings.dtype, class_embeddings.shape), ("scale", np.float64)])
        return np.array([(class_embeddings, self.clip.logit_scale)], kind)

    @property
    def _name(self) -> str:
        return f"backbone {self.weights.model} ({Path(self.weights.pretrained).name})"

    def _rows(self, block: int) -> range:
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self.images)))

    def _finite(self, features: np.ndarray, rows: range) -> np.ndarray:
        """The features of these images, if they are numbers.

        Raises:
            InputError: some are not, which would otherwise be noticed when clients are evaluated.
        """
        finite = np.isfinite(features).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            first = self.images.names[rows[int(finite.argmin())]]
            raise InputError(
                f"{self._name} gives features that half precision cannot hold (NaN, or above 65,504) for "
                f"{(~finite).sum()} of {len(rows)} images, the first of them {first}; try other weights"
            )
        return features


def feature_file(images: Images, weights: Weights, cache: Path, notice: Notice = lambda file: None) -> Path:
    """Where the features of these images under these weights are, or will be."""
    return cache / f"{digest(weights.key, images.fingerprint(cache, notice))}.npy"


def text_file(classes: Sequence[str], weights: Weights, prompt: str, cache: Path) -> Path:
    """Where the text features of these classes are, or will be."""
    return cache / f"{digest(weights.key, *(prompt.format(name) for name in classes))}.text.npy"


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
    """Features of all images and embeddings of all classes, from the cache where they are there and undamaged.

    Args:
        prompt: with `{}` where the class name goes.
        cache: a folder of this machine.
        level: of `clip.sites.IMAGE_LEVELS`: what clients read of an image, kept beside its features.
        augment: augmented views of each image that are kept at that level.

    Raises:
        InputError: an image is corrupt, or the weights are, or their features are not finite.
        Stopped: the disk of the cache is full, or files have been removed from it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    file = feature_file(images, weights, cache)
    with locked(file):  # the next process finds it done
        features = _encode(images, weights, prompt, file, sizing, progress)
        if level == "features" and not augment:
            return features
        kept = file.with_suffix(f".{level}-{augment}.npy")
        if read_array(kept, partial(_damaged, progress)) is None:
            _keep(images, weights, kept, level, augment, sizing, progress)
        for part in cache.glob(f"{file.stem}.{level}-*-*.npy"):  # of a killed run with more views
            part.unlink(missing_ok=True)
        return replace(features, augment=augment, kept={level: kept})


def keep(features: Features, cache: Path, notice: Notice) -> Features:
    """Custom features, written where actors can map them; again if that file is damaged."""
    x = features.x
    file = cache / f"{digest(f'{x.dtype} {x.shape}', x)}.npy"
    with locked(file):
        if read_array(file, notice) is None:
            write_array(file, len(x), [x])
    return _with_labels(features, file, features.class_embeddings, features.logit_scale)


class _Parts:
    """A file of the cache in the making: each block has a file of its own, so that an interruption loses little.

    Attributes:
        files: by what a worker is asked for, the file of that block; in the order in which they are joined.
        todo: blocks that are missing or damaged.
    """

    def __init__(self, whole: Path, rows: int, files: dict[Any, Path], stage: str, progress: Progress) -> None:
        self.whole, self.rows, self.files, self.stage, self.progress = whole, rows, files, stage, progress
        self.todo = [block for block, file in files.items() if self._read(file) is None]

    def write(self, blocks: Iterator[np.ndarray]) -> None:
        """Writes the blocks of `todo` as they come."""
        for done, (block, array) in enumerate(zip(self.todo, blocks, strict=True), 1):
            write_array(self.files[block], len(array), [array])
            ready = (len(self.files) - len(self.todo) + done) * BLOCK
            self.progress(Step(self.stage, min(ready, self.rows), self.rows))

    def join(self) -> None:
        write_array(self.whole, self.rows, map(self._written, self.files.values()))
        self.remove()

    def remove(self) -> None:
        # This process holds the lock: on this machine no other one is writing them.
        killed = self.whole.parent.glob(f"part-{os.uname().nodename}-*-{self.whole.name.partition('.')[0]}.*")
        for file in (*self.files.values(), *killed):
            file.unlink(missing_ok=True)

    def _read(self, file: Path) -> np.ndarray | None:
        return read_array(file, partial(_damaged, self.progress))

    def _written(self, file: Path) -> np.ndarray:
        array = self._read(file)
        if array is None:
            raise Stopped(f"{file} was removed or changed during the run; run the same command again")
        return array


def _keep(images: Images, weights: Weights, file: Path, level: str, augment: int, sizing: Sizing, progress) -> None:
    blocks = range(-(-len(images) // BLOCK))
    wanted = [(view, block) for view in range(1 + augment) for block in blocks]
    # Of their level: a run of another may have been killed, and its parts are here too.
    files = {(view, block): file.with_suffix(f".{level}-{view}-{block:06d}.npy") for view, block in wanted}
    parts = _Parts(file, len(images) * (1 + augment), files, f"keeping {level}", progress)
    if parts.todo:
        with open_pool(sizing, len(parts.todo)) as pool:
            parts.write(pool.workers(Encoder, images, weights).map("keep", parts.todo, level))
    _join(parts, images, weights)


def _encode(images: Images, weights: Weights, prompt: str, file: Path, sizing: Sizing, progress: Progress) -> Features:
    prompts = [prompt.format(name) for name in images.classes]
    texts_at = text_file(images.classes, weights, prompt, file.parent)
    x, texts = (read_array(each, partial(_damaged, progress)) for each in (file, texts_at))
    blocks = range(-(-len(images) // BLOCK)) if x is None else ()
    files = {block: file.with_suffix(f".{block:06d}.npy") for block in blocks}
    parts = _Parts(file, len(images), files, "encoding images", progress)
    if parts.todo or texts is None:
        with open_pool(sizing, len(parts.todo)) as pool:
            encoders = pool.workers(Encoder, images, weights)
            parts.write(encoders.map("encode", parts.todo))
            if texts is None:
                texts = next(encoders.map("class_embeddings", [prompts]))
                write_array(texts_at, 1, [texts])
    if x is None:
        _join(parts, images, weights)
    return _with_labels(images, file, texts[0]["prototypes"], float(texts[0]["scale"]), prompt)


def _join(parts: _Parts, images: Images, weights: Weights) -> None:
    if feature_file(images, weights, parts.whole.parent).stem != parts.whole.name.partition(".")[0]:
        parts.remove()
        raise Stopped("images were changed while they were encoded; run the same command again")
    parts.join()


def _with_labels(rows, file: Path, class_embeddings: np.ndarray, logit_scale: float, prompt: str = "{}") -> Features:
    return Features(
        y=rows.y,
        domain=rows.domain,
        classes=rows.classes,
        domains=rows.domains,
        split=rows.split,
        unseen_test=rows.unseen_test,
        notes=rows.notes,
        file=file,
        x=map_array(file),
        class_embeddings=class_embeddings,
        logit_scale=logit_scale,
        prompt=prompt,
    )


def _damaged(progress: Progress, file: Path) -> None:
    progress(Note(str(file), "damaged; it is computed again"))

"""Images to representations: once, by a pool of workers, resumable, into files that are memory-mapped.

A file is named by a key of everything that determines its content: the architecture, the bytes of the weights, the
preprocessing, the precision, and the bytes of the images in their order; of some rows of a data set, these rows too.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from fedsim.cache import Notice, locked, read_array, write_array
from fedsim.clip.checkpoints import Weights
from fedsim.clip.model import Clip
from fedsim.clip.texts import Templates, templates_for, texts_of
from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import open_pool
from fedsim.cluster.workers import Pool, Workers
from fedsim.datasets import Features, Images, Labels, vocabularies
from fedsim.errors import InputError, Stopped
from fedsim.events import Note, Progress, Step
from fedsim.files import digest
from fedsim.representations import ClassEmbeddings, Encoded, Representations, with_labels
from fedsim.rng import seed_for

BLOCK = 64  # images per call: fixed, because the sums in a tower may depend on the size of its batch
MOST_THREADS = 16  # that decode for one GPU
T = TypeVar("T")


class Encoder:
    """Encodes blocks of images, and class texts; loads CLIP when it is first needed."""

    def __init__(self, images: Images, weights: Weights, rows: np.ndarray | None, device: str) -> None:
        """
        Args:
            rows: (n,) the row of each image in its data set; None: these are all images of the data set.
        """
        self.images, self.weights, self.rows, self.device = images, weights, rows, device
        # A GPU encodes as fast as many CPUs decode. Without one, each CPU has an actor that decodes and encodes.
        self.threads = 0 if device == "cpu" else min(MOST_THREADS, os.cpu_count() or 1)
        self.loaded: Clip | None = None

    @property
    def clip(self) -> Clip:
        self.loaded = self.loaded or Clip(self.weights, self.device)
        return self.loaded

    def encode(self, block: int) -> np.ndarray:
        """(n, D) float16, the features of one block of images."""
        rows = self._rows(block)
        features = self.clip.encode_preprocessed(_ahead(self._preprocessed, self._filled(rows), self.threads))
        return self._finite(features[: len(rows)], rows)

    def encode_view(self, name: str, part: tuple[int, int]) -> np.ndarray:
        """(n, ...) a representation of one (view, block) of the images; view 0 is the one for evaluation."""
        view, block = part
        rows = self._rows(block)
        # Independent of a run's seed: views are drawn once and cached for all runs.
        numbers = rows if self.rows is None else self.rows[rows].tolist()
        seeds = [seed_for(0, "view", view, row) for row in self._filled(numbers)] if view else None
        pixels = self.clip.pixels(_ahead(self.images.open, self._filled(rows), self.threads), seeds)
        if name == "pixels":
            return pixels[: len(rows)]
        encode = self.clip.encode_tokens if name == "tokens" else self.clip.encode_pixels
        return self._finite(encode(pixels)[: len(rows)], rows)

    def encode_classes(self, texts: list[list[str]]) -> np.ndarray:
        """(1,) record: `prototypes`, the (C, D) float32 class embeddings, and `scale`, the logit scale."""
        embeddings = self.clip.encode_classes(texts)
        if not np.isfinite(embeddings).all():
            raise InputError(f"{self._name} gives text features that are NaN or infinite; {self._remedy}")
        kind = np.dtype([("prototypes", embeddings.dtype, embeddings.shape), ("scale", np.float64)])
        return np.array([(embeddings, self.clip.logit_scale)], kind)

    @property
    def _name(self) -> str:
        return f"backbone {self.weights.model} ({Path(self.weights.pretrained).name})"

    @property
    def _remedy(self) -> str:
        return "try other weights" + " or --precision fp32" * (self.weights.precision != "fp32")

    def _rows(self, block: int) -> range:
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self.images)))

    def _preprocessed(self, row: int) -> Tensor:
        return self.clip.preprocess(self.images.open(row))

    def _filled(self, rows: Sequence[int]) -> list[int]:
        """The rows of a block, filled up with its last one if these are some rows of a data set.

        The bits of an image must not depend on which others are encoded, and a short block might change them.
        """
        return [*rows, *[rows[-1]] * (BLOCK - len(rows) if self.rows is not None else 0)]

    def _finite(self, features: np.ndarray, rows: range) -> np.ndarray:
        """The features of these images.

        Raises:
            InputError: some are not finite, which would otherwise be noticed only when clients are evaluated.
        """
        finite = np.isfinite(features).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            first = self.images.names[rows[int(finite.argmin())]]
            raise InputError(
                f"{self._name} gives features that half precision cannot hold (NaN, or above 65,504) for "
                f"{(~finite).sum()} of {len(rows)} images, the first of them {first}; {self._remedy}"
            )
        return features


def _ahead(function: Callable[[int], T], rows: Sequence[int], threads: int) -> Iterator[T]:
    """`map(function, rows)`, computed in threads; there are never more results than threads, as photos are large."""
    if not threads:
        yield from map(function, rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        results: deque[Future[T]] = deque()
        for row in rows:
            if len(results) == threads:
                yield results.popleft().result()
            results.append(pool.submit(function, row))
        while results:
            yield results.popleft().result()


def feature_file(
    images: Images,
    weights: Weights,
    cache: Path,
    notice: Notice = lambda file: None,
    rows: np.ndarray | None = None,
) -> Path:
    """The file for the features of these images under these weights; it need not exist.

    Args:
        rows: (n,) ascending, of the images that are encoded; None: all.
    """
    return cache / f"{_key(images if rows is None else images.take(rows), weights, rows, cache, notice)}.npy"


def vocabularies_of(data: Labels, templates: Templates) -> list[tuple[list[str], Templates]]:
    """Classes that compete with each other, and their templates: of all, or of each data set of a suite.

    Each is encoded alone, so that a class of a suite has the same bits as in its own data set, and may have the same
    text as one of another.
    """
    groups = vocabularies(len(data.classes), data.class_domain)
    return [([data.classes[label] for label in group], templates_for(templates, group)) for group in groups]


def text_file(classes: Sequence[str], weights: Weights, templates: Templates, cache: Path) -> Path:
    """The file for the embeddings of these classes; it need not exist."""
    averaged = [f"mean of {len(templates)}"] if len(templates) > 1 else []
    texts = chain.from_iterable(texts_of(templates, classes))
    return cache / f"{digest(*averaged, weights.key, *texts)}.text.npy"


def encode(
    images: Images,
    weights: Weights,
    templates: Templates,
    cache: Path,
    sizing: Sizing,
    progress: Progress,
    names: Sequence[str] = ("features",),
    augment: int = 0,
    rows: np.ndarray | None = None,
) -> Encoded:
    """Encodes images and all classes, or reads what the cache holds undamaged.

    Args:
        templates: of the texts of the classes, as in `ClassEmbeddings`.
        cache: a folder on this machine.
        names: the representations that clients read, of `clip.sites.IMAGE_READS`. Features are always computed.
        augment: augmented views per image of these representations.
        rows: (n,) ascending, of the images that are encoded; None: all.

    Raises:
        InputError: an image or the weights are corrupt, or features are not finite.
        Stopped: the cache's disk is full, or files were removed from it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    file = feature_file(images, weights, cache, rows=rows)
    with locked(file):  # another process may have finished the file while this one waited
        work = _Work(images if rows is None else images.take(rows), weights, rows, sizing, progress)
        embeddings = _encode_features(work, templates, file)
        files = {"features": file}
        for name in names if augment else [name for name in names if name != "features"]:
            files[name] = file.with_suffix(f".{name}-{augment}.npy")
            if read_array(files[name], partial(_damaged, progress)) is None:
                _encode_views(work, files[name], name, augment)
            for part in cache.glob(f"{file.stem}.{name}-*-*.npy"):  # left by a killed run with more views
                part.unlink(missing_ok=True)
    positions = None
    if rows is not None:
        positions = np.full(len(images), -1)
        positions[rows] = np.arange(len(rows))
    count = len(images) if rows is None else len(rows)
    return with_labels(images, Representations(count, file.stem, files, {}, 1 + augment, positions), embeddings)


def from_features(features: Features) -> Encoded:
    """Features that were computed elsewhere, as clients read them. Nothing is written."""
    key = "made on demand" if features.rows_per_client else "not in a file"
    representations = Representations(len(features), key, arrays={"features": features.x})
    return with_labels(features, representations, ClassEmbeddings(features.class_embeddings, features.logit_scale))


def store(data: Encoded, cache: Path, notice: Notice) -> Encoded:
    """The same with its features in a file of the cache, for workers to map. A damaged file is written again."""
    x = data.representations.features
    file = cache / f"{digest(f'{x.dtype} {x.shape}', x)}.npy"
    with locked(file):
        if read_array(file, notice) is None:
            write_array(file, len(x), [x])
    return replace(data, representations=Representations(len(data), file.stem, {"features": file}))


class _Parts:
    """A file of the cache while it is computed: each block has its own file, so an interruption loses little.

    Attributes:
        files: the file of each block, in the order in which they are joined.
        todo: blocks that are missing or damaged.
    """

    def __init__(self, whole: Path, rows: int, files: dict[Any, Path], stage: str, progress: Progress) -> None:
        self.whole, self.rows, self.files, self.stage, self.progress = whole, rows, files, stage, progress
        self.todo = [block for block, file in files.items() if self._read(file) is None]

    def write(self, blocks: Iterator[np.ndarray]) -> None:
        """Writes the blocks of `todo` as they are computed."""
        for done, (block, array) in enumerate(zip(self.todo, blocks, strict=True), 1):
            write_array(self.files[block], len(array), [array])
            ready = (len(self.files) - len(self.todo) + done) * BLOCK
            self.progress(Step(self.stage, min(ready, self.rows), self.rows))

    def join(self) -> None:
        write_array(self.whole, self.rows, map(self._written, self.files.values()))
        self.remove()

    def remove(self) -> None:
        # Safe: this process holds the lock, so no other process on this machine is writing them.
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


@dataclass(frozen=True)
class _Work:
    """The images to encode, and with what.

    Attributes:
        rows: see `Encoder`.
    """

    images: Images
    weights: Weights
    rows: np.ndarray | None
    sizing: Sizing
    progress: Progress

    def key(self, cache: Path) -> str:
        return _key(self.images, self.weights, self.rows, cache)

    def blocks(self) -> range:
        return range(-(-len(self.images) // BLOCK))

    def encoders(self, pool: Pool) -> Workers:
        return pool.workers(Encoder, self.images, self.weights, self.rows)


def _encode_features(work: _Work, templates: Templates, file: Path) -> ClassEmbeddings:
    groups = vocabularies_of(work.images, templates)
    text_files = [text_file(classes, work.weights, own, file.parent) for classes, own in groups]
    x, *read = (read_array(each, partial(_damaged, work.progress)) for each in (file, *text_files))
    texts = {k: array for k, array in enumerate(read) if array is not None}
    missing = [k for k in range(len(groups)) if k not in texts]
    files = {block: file.with_suffix(f".{block:06d}.npy") for block in (work.blocks() if x is None else ())}
    parts = _Parts(file, len(work.images), files, "encoding images", work.progress)
    if parts.todo or missing:
        with open_pool(work.sizing, len(parts.todo)) as pool:
            encoders = work.encoders(pool)
            parts.write(encoders.map("encode", parts.todo))
            to_encode = [texts_of(own, classes) for classes, own in (groups[k] for k in missing)]
            for k, array in zip(missing, encoders.map("encode_classes", to_encode), strict=True):
                texts[k] = array
                write_array(text_files[k], 1, [array])
    if x is None:
        _join(parts, work)
    vectors = np.concatenate([texts[k][0]["prototypes"] for k in range(len(groups))])
    return ClassEmbeddings(vectors, float(texts[0][0]["scale"]), templates)


def _encode_views(work: _Work, file: Path, name: str, augment: int) -> None:
    # Named by the representation: the parts of a killed run of another one may be here too.
    files = {
        (view, block): file.with_suffix(f".{name}-{view}-{block:06d}.npy")
        for view in range(1 + augment)
        for block in work.blocks()
    }
    parts = _Parts(file, len(work.images) * (1 + augment), files, f"encoding {name}", work.progress)
    if parts.todo:
        with open_pool(work.sizing, len(parts.todo)) as pool:
            parts.write(work.encoders(pool).map("encode_view", parts.todo, name))
    _join(parts, work)


def _join(parts: _Parts, work: _Work) -> None:
    if work.key(parts.whole.parent) != parts.whole.name.partition(".")[0]:
        parts.remove()
        raise Stopped("images were changed while they were encoded; run the same command again")
    parts.join()


def _key(
    images: Images, weights: Weights, rows: np.ndarray | None, cache: Path, notice: Notice = lambda file: None
) -> str:
    # With the rows, because augmented views are drawn by them and short blocks are filled. For the same reason a file
    # of all images does not stand in for one of some rows: its last block is not filled, and may have other bits.
    return digest(weights.key, images.fingerprint(cache, notice), *([] if rows is None else [rows]))


def _damaged(progress: Progress, file: Path) -> None:
    progress(Note(str(file), "damaged; it is computed again"))

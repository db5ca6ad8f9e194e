"""The data of a run: loaded before anything starts, then encoded into what workers read."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedsim.cache import check_writable
from fedsim.clients import Population
from fedsim.clip.checkpoints import EMBEDDED, Weights, find_weights, width_of
from fedsim.clip.model import Clip, Frozen, check_texts
from fedsim.clip.texts import Templates, templates_of, texts_of
from fedsim.cluster.placement import Sizing
from fedsim.config import Config
from fedsim.datasets import Features, Images, Labels
from fedsim.datasets._check import unreadable
from fedsim.encoding import encode, feature_file, from_features, store, text_file, vocabularies_of
from fedsim.errors import InputError, counted, listing
from fedsim.events import Note, Progress
from fedsim.files import reason
from fedsim.methods import Method
from fedsim.representations import Encoded

MOST = 0.5  # of the rows: if more are in use, all are encoded, once for all partitions
# The fields of Config that decide what is loaded and encoded.
BACKBONE_FIELDS = "backbone", "pretrained", "precision"
DATA_FIELDS = "dataset", "data_dir", "skip_unreadable", *BACKBONE_FIELDS, "prompt", "augment", "cache_dir"


@dataclass(frozen=True)
class Data:
    """A data set as it was loaded, and the weights to encode it with.

    Attributes:
        source: without the images that cannot be read.
        skipped: names of those images.
        weights: of the backbone; None for features, whose encoder is not known.
        templates: of the texts of the classes, as in `ClassEmbeddings`.
        readable: (N,) bool, images that are known to be readable; set as they are checked, for all that share the data.
    """

    source: Images | Encoded
    skipped: list[str]
    weights: Weights | None
    templates: Templates
    readable: np.ndarray

    @property
    def width(self) -> int:
        """D of the features."""
        if isinstance(self.source, Encoded):
            return self.source.class_embeddings.vectors.shape[1]
        assert self.weights is not None, "images are loaded with weights"
        return width_of(self.weights)

    def assumptions(self) -> list[str]:
        """What is assumed about the data set and the weights, and what the data set itself left out."""
        return [*self.source.notes, *([self.weights.note] if self.weights and self.weights.note else [])]

    def clip(self) -> Clip | None:
        """CLIP itself, for methods that train through its towers; None for features."""
        return Clip(self.weights) if self.weights else None


@dataclass(frozen=True)
class EncodedData(Data):
    """Data as workers read them.

    Attributes:
        source: the representations that a method reads.
        frozen: CLIP in shared memory; None where no method trains through its towers.
    """

    source: Encoded
    frozen: Frozen | None

    def clip(self) -> Clip | None:
        return self.frozen.open() if self.frozen else super().clip()


def load_data(config: Config) -> Data:
    """The data set of a config, and the weights that encode it.

    Raises:
        InputError: files are missing, unreadable or invalid, or the backbone does not fit the data set.
    """
    try:
        source = config.dataset.load(config.data_dir)
    except OSError as error:  # a folder that this user may not read, for example
        raise InputError(f"--data-dir cannot be read: {reason(error)}") from None
    if not source.rows_per_client:  # rows that are generated on demand are never cached
        check_writable(config.cache_dir)
    if isinstance(source, Features):
        if config.backbone or config.pretrained or config.prompt or config.precision != "fp32":
            raise InputError(
                "the data set has features, which are encoded already; remove --backbone, --pretrained, --precision "
                "and --prompt"
            )
        data = from_features(source)
        return Data(data, [], None, data.class_embeddings.templates, np.empty(0, bool))
    templates = templates_of(config.prompt, source.template)
    weights, skipped = _find_weights(config).at(config.precision), []
    for classes, own in vocabularies_of(source, templates):
        if not text_file(classes, weights, own, config.cache_dir).exists():
            for texts in texts_of(own, classes):
                check_texts(weights, texts)
    # Images are left out before clients get them; otherwise only those that clients have need to be readable.
    if config.skip_unreadable and not feature_file(source, weights, config.cache_dir, _warn_of_damage).exists():
        source, skipped = _without_unreadable(source)
    return Data(source, skipped, weights, templates, np.full(len(source), config.skip_unreadable))


def rows_to_encode(source: Labels, clients: Population) -> np.ndarray | None:
    """(n,) ascending, the rows that the clients have; None for all rows, if clients have more than `MOST` of them."""
    if source.rows_per_client or (rows := clients.rows()) is None or len(rows) > MOST * len(source):
        return None
    return rows


def check_readable(data: Data, cache: Path, rows: np.ndarray | None) -> None:
    """Raises InputError if one of these images, or of all if `rows` is None, cannot be read."""
    if not isinstance(data.source, Images) or data.readable[slice(None) if rows is None else rows].all():
        return
    assert data.weights is not None, "images are loaded with weights"
    rows_or_all = np.arange(len(data.source)) if rows is None else rows
    if not feature_file(data.source, data.weights, cache, _warn_of_damage, rows).exists():
        unknown = rows_or_all[~data.readable[rows_or_all]]
        if bad := unreadable(data.source.take(unknown)):
            index, fault = bad[0]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            name = data.source.names[unknown[index]]
            raise InputError(f"{name}{more} cannot be read ({fault}); --skip-unreadable leaves them out")
    data.readable[rows_or_all] = True


def features_key(data: Data, cache: Path, rows: np.ndarray | None) -> str:
    """The key of the features of these rows, or of all if `rows` is None."""
    if isinstance(data.source, Encoded):
        return data.source.representations.key
    assert data.weights is not None, "images are loaded with weights"
    return feature_file(data.source, data.weights, cache, rows=rows).stem


def cached(data: Data, cache: Path) -> Data:
    """The same data with features in a file of the cache, which other processes can map."""
    if isinstance(data.source, Encoded) and not data.source.rows_per_client:
        return replace(data, source=store(data.source, cache, _warn_of_damage))
    return data


def encode_data(
    data: Data,
    config: Config,
    methods: Iterable[Method],
    sizing: Sizing,
    progress: Progress,
    rows: np.ndarray | None = None,
) -> EncodedData:
    """Computes every representation that one of the methods reads, or takes it from the cache.

    Args:
        rows: (n,) ascending, those whose images are encoded; None: all.
    """
    if notes := _notes(data):
        progress(Note("data", notes))
    reads = {method.reads for method in methods}
    source = data.source
    if isinstance(source, Images):
        assert data.weights is not None, "images are loaded with weights"
        arguments = data.templates, config.cache_dir, sizing, progress
        names = sorted({name for each in reads for name in each.representations})
        source = encode(source, data.weights, *arguments, names, config.augment, rows)
    towers = any(each.towers for each in reads)
    frozen = Clip(data.weights).frozen() if towers and data.weights else None
    return EncodedData(source, data.skipped, data.weights, data.templates, data.readable, frozen)


def _notes(data: Data) -> str:
    """What the user should know of the data: assumptions, and what was left out."""
    images = counted(len(data.skipped), "unreadable image")
    unread = [f"left out {images}: {listing(data.skipped, 4)}"] if data.skipped else []
    return "; ".join([*data.assumptions(), *unread])


def _warn_of_damage(file: Path) -> None:
    print(f"fedsim: {file} is damaged; it is written again", file=sys.stderr)  # nothing shows progress yet


def _find_weights(config: Config) -> Weights:
    if config.backbone is None and config.pretrained is None:
        return find_weights(*EMBEDDED)
    if config.backbone == EMBEDDED[0]:
        return find_weights(config.backbone, config.pretrained or EMBEDDED[1])
    if config.backbone is None:
        raise InputError(f"--pretrained {config.pretrained} needs a --backbone, such as ViT-B-32")
    return find_weights(config.backbone, config.pretrained or "")


def _without_unreadable(images: Images) -> tuple[Images, list[str]]:
    """The images that can be read, and the names of the others."""
    bad = unreadable(images)
    if not bad:
        return images, []
    readable = images.take(np.setdiff1d(np.arange(len(images)), [index for index, _ in bad]))
    remaining = set(zip(readable.domain.tolist(), readable.y.tolist(), strict=True))
    cells = dict.fromkeys((images.domain[index], images.y[index]) for index, _ in bad)
    if empty := [f"{images.domains[d]}/{images.classes[c]}" for d, c in cells if (d, c) not in remaining]:
        index, fault = bad[0]
        raise InputError(
            f"--skip-unreadable leaves no image in: {listing(empty)}; the first error: {images.names[index]}: {fault}"
        )
    return readable, [images.names[index] for index, _ in bad]

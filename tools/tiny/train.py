"""Makes tiny.safetensors from nothing: `uv run --group assets python tools/tiny/train.py`.

Every stage leaves a file in the cache, and a second run goes on after the last one that is there.
`--develop` holds out the development set and measures on it instead of writing the model.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import align
import captions
import corpus
import develop
import distil
import encode
import ship
import tower
from teacher import Teacher
from words import HELD_OUT_PHOTOS, HeldOut

CACHE = Path.home() / ".cache/fedsim/tiny"
# About half of the views: they place the texts, and the image head is fitted to all views later.
# A machine that is short of time can then distil while it encodes the rest.
_CHUNKS_TO_ALIGN = 24


@dataclass(frozen=True)
class Stages:
    """The stages of one training run, each made from the ones before it."""

    cache: Path
    developing: bool

    @property
    def downloads(self) -> Path:
        return self.cache / "downloads"

    @property
    def icons_file(self) -> Path:
        return self.cache / "icons.jsonl"

    @property
    def texts_file(self) -> Path:
        return self.cache / "texts.npy"

    @cached_property
    def icons(self) -> list[corpus.Icon]:
        return corpus.load(self.icons_file)

    @cached_property
    def texts(self) -> captions.Texts:
        return captions.read_texts(self.texts_file)

    @property
    def features(self) -> Path:
        return self.cache / "features"

    @cached_property
    def held_out(self) -> HeldOut:
        always = HeldOut.read(corpus.HELD_OUT)
        hidden = develop.unseen(self.icons).names if self.developing else frozenset()
        return HeldOut(always.names | hidden)

    def prepare(self) -> None:
        """Downloads, icons, their features, and the teacher's vectors."""
        _stage("fetch", None, lambda: corpus.fetch_all(self.downloads))
        _stage("corpus", self.icons_file, self._write_icons)
        marker = self.features / "complete"
        _stage("encode", marker, lambda: self._encode(marker))
        _stage("teacher", self.texts_file, self._write_texts)

    def _write_icons(self) -> None:
        found, counts = corpus.icons(self.downloads, HeldOut.read(corpus.HELD_OUT))
        for family, count in counts.items():
            print(f"  {family}: {dict(count)}")
        corpus.save(found, self.icons_file)

    def _write_texts(self) -> None:
        captions.write_texts(self.icons_file, self.downloads, self.texts_file)

    def _encode(self, marker: Path) -> None:
        encode.encode(self.icons_file, self.downloads, marker.parent)
        marker.touch()

    @cached_property
    def photos(self) -> list[captions.Thing]:
        return captions.of_photos(self.downloads)

    def material(self, chunks: int | None = None) -> align.Corpus:
        """What the heads are trained on, less the held-out concepts and families."""
        features, rows = encode.read(self.features, chunks)
        usable = torch.tensor([self._is_usable(icon) for icon in self.icons])[rows]
        shown = [i for i, photo in enumerate(self.photos) if not self._is_hidden(photo)]
        weights, grey = align.photo_statistics(tower.pretrained(self.downloads))
        return align.Corpus(
            features=features[usable],
            rows=rows[usable],
            things=captions.of_icons(self.icons) + self.photos,
            photos=torch.tensor(shown) + len(self.icons),
            weights=weights,
            grey=grey,
        )

    def _is_hidden(self, photo: captions.Thing) -> bool:
        return self.held_out.covers(photo.name) or photo.name in HELD_OUT_PHOTOS

    def _is_usable(self, icon: corpus.Icon) -> bool:
        hidden = icon.family in corpus.DEVELOPMENT or self.held_out.covers(icon.name)
        return not (self.developing and hidden)

    def heads(self) -> tuple[align.ImageHead, align.TextHead, torch.Tensor]:
        """The maps into the common space, and the logarithm of the scale."""
        file = self.cache / ("develop-heads.pt" if self.developing else "heads.pt")
        _stage("align", file, lambda: self._align(file))
        return torch.load(file, weights_only=False)

    def _align(self, file: Path) -> None:
        chunks = None if self.developing else _CHUNKS_TO_ALIGN
        torch.save(align.train(self.material(chunks), self.texts), file)

    def finish(self) -> torch.nn.Module:
        """The finished dual encoder."""
        image, text, scale = self.heads()
        clip, file = distil.model(), self.cache / "text.pt"
        _stage("distil", file, lambda: self._distil(clip, text, file))
        clip.load_state_dict(torch.load(file))
        towards = captions.Texts(self.texts.names, distil.embed(clip.eval(), self.texts))
        image, scale = align.refit(self.material(), towards, image, scale)
        ship.assemble(clip, tower.pretrained(self.downloads), image, scale)
        return clip

    def _distil(self, clip: torch.nn.Module, text: align.TextHead, file: Path) -> None:
        things = captions.of_icons(self.icons) + self.photos
        distil.train(clip.train(), text, self.texts, things)
        torch.save(clip.state_dict(), file)

    def measure(self) -> None:
        """Prints accuracies on the development set, with the teacher in the text tower's place."""
        image, text, _ = self.heads()
        teacher = Teacher(self.downloads)
        hidden = develop.unseen(self.icons)
        samples = [develop.drawings(self.icons, *encode.read(self.features), hidden)]
        with torch.inference_mode():
            for sample in [*samples, *develop.photographs(self.downloads)]:
                print(sample.accuracy(image, lambda names: text(teacher(names))))


def _stage(name: str, file: Path | None, work: Callable[[], None]) -> None:
    if file and file.exists():
        print(f"{name}: done before", flush=True)
        return
    print(f"{name} ...", flush=True)
    began = time.monotonic()
    work()
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    parser.add_argument("--develop", action="store_true", help="measure, write no model")
    parser.add_argument("--out", type=Path, default=ship.MODEL, help="default: %(default)s")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    stages = Stages(options.cache, options.develop)
    stages.prepare()
    if options.develop:
        stages.measure()
    else:
        ship.write(stages.finish(), options.out)


if __name__ == "__main__":
    main()

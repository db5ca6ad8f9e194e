"""ImageNet, and its variants V2, Sketch, A and R as domains: photos, sketches and art of 1,000 things.

Source: Deng et al. 2009, "ImageNet: a large-scale hierarchical image database", CVPR; layouts, class names and splits
as in DATASETS.md and datasets/ of the code of CoOp, KaiyangZhou/CoOp, commit 0f24bd6.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedsim.datasets import TEST, TRAIN, FixedDataset, Images
from fedsim.datasets._classes import read_names
from fedsim.datasets._tree import Part, checked, list_tree
from fedsim.datasets.coop import DEFAULT_TEMPLATE
from fedsim.errors import InputError, listing
from fedsim.registry import component

DOMAIN = "imagenet"
# The folder of class folders of each variant, next to ImageNet's.
VARIANTS = {
    "imagenet-v2": "imagenetv2/imagenetv2-matched-frequency-format-val",
    "imagenet-sketch": "imagenet-sketch/images",
    "imagenet-a": "imagenet-adversarial/imagenet-a",
    "imagenet-r": "imagenet-rendition/imagenet-r",
}


@component
class ImageNet(FixedDataset):
    """`--data-dir` is ImageNet's folder, with `train` and `val` (perhaps in `images`) and `classnames.txt`.

    Or it holds that folder as `imagenet`, and next to it those of the variants `imagenetv2`, `imagenet-sketch`,
    `imagenet-adversarial` and `imagenet-rendition`, each of which becomes a domain. As in CoOp, the folder `val` and
    all images of the variants are test rows, so the variants need to be held out; classes have the order of their
    folders, and names from `classnames.txt` unless `class_names` gives another file.
    """

    absent_classes: bool = True  # ImageNet-A and ImageNet-R have 200 of the classes

    def read(self, root: Path | None) -> Images:
        root = checked(root, "imagenet")
        place = _place(root)
        images = place / "images" if (place / "images").is_dir() else place
        parts = [Part(DOMAIN, images / name, code) for name, code in (("train", TRAIN), ("val", TEST))]
        parts += [Part(name, root / path, TEST) for name, path in VARIANTS.items() if (root / path).is_dir()]
        # The folders of V2 are the numbers of the classes.
        numbers = {str(number): name for number, name in enumerate(self._names(root))}
        tree = list_tree(root, parts, numbers, layout="train/n01440764/file and val/n01440764/file")
        return replace(tree, template=DEFAULT_TEMPLATE)

    def prompt_names(self, root: Path | None, classes: tuple[str, ...]) -> Mapping[str, str]:
        return self._names(checked(root, "imagenet"))

    def _names(self, root: Path) -> Mapping[str, str]:
        """The names for the prompt by the names of the folders, in the order of the classes; perhaps of others too."""
        file = self.class_names or _place(root) / "classnames.txt"
        if not self.class_names and not file.is_file():
            raise InputError(
                f"data set imagenet needs {file}, with a line such as 'n01440764 tench' for each class; or "
                "--dataset.class-names FILE"
            )
        return read_names(file)


def _place(root: Path) -> Path:
    """ImageNet's own folder."""
    for place in (root, root / "imagenet"):
        for images in (place / "images", place):
            if (images / "train").is_dir() and (images / "val").is_dir():
                return place
    has = listing(sorted(entry.name for entry in root.iterdir())) or "nothing"
    raise InputError(
        f"expected the folders train and val, or images/train and images/val, in {root} or in a folder imagenet there; "
        f"there are: {has}"
    )

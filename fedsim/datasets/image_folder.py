"""A folder of images without visual domains, `class/file`, or `train/class/file` and so on.

Source: the layout of torchvision's ImageFolder.
"""

from pathlib import Path

from fedsim.datasets import TEST, TRAIN, VAL, FixedDataset, Images
from fedsim.datasets._tree import JUDGE_FOLDERS, SPLIT_FOLDERS, TRAIN_FOLDERS, Part, checked, list_tree
from fedsim.datasets._walk import folders
from fedsim.errors import InputError, listing
from fedsim.registry import component

DOMAIN = "images"
TEST_FOLDERS = {"test", "testing"}


@component
class ImageFolder(FixedDataset):
    """`--data-dir` holds class folders, or split folders (train, val, test) that hold class folders.

    Without split folders, the partition's seed splits the rows. If there is no val folder, validation rows are drawn
    from the train rows; if there is no test folder, clients have no test rows. There is one domain, so only new classes
    can be held out.
    """

    def read(self, root: Path | None) -> Images:
        root = checked(root, "image_folder")
        level = folders(root)
        splits = [folder for folder in level if folder.name.lower() in SPLIT_FOLDERS]
        if not splits:
            return list_tree(root, [Part(DOMAIN, root)], layout="class/file")
        if others := [folder.name for folder in level if folder not in splits]:
            raise InputError(
                f"{root} holds splits, {listing(folder.name for folder in splits)}, and other folders: "
                f"{listing(others)}; move them elsewhere, or rename a class that is called like a split"
            )
        codes = [_code(folder.name.lower()) for folder in splits]
        if TRAIN not in codes or len(set(codes)) < len(codes):
            raise InputError(
                f"expected the folders train, val and test in {root}, of which val and test may be absent; "
                f"there are: {listing(folder.name for folder in splits)}"
            )
        parts = [Part(DOMAIN, folder, code) for folder, code in zip(splits, codes, strict=True)]
        return list_tree(root, parts, layout="split/class/file")


def _code(name: str) -> int:
    if name in TRAIN_FOLDERS:
        return TRAIN
    assert name in JUDGE_FOLDERS
    return TEST if name in TEST_FOLDERS else VAL

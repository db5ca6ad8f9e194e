"""Any folder of images laid out as `domain/class/file`.

Source: torchvision's ImageFolder conventions, one level deeper.
"""

from pathlib import Path

from fedsim.datasets import FixedDataset, Images
from fedsim.datasets._tree import SPLIT_FOLDERS, Part, checked, list_tree
from fedsim.datasets._walk import folders
from fedsim.errors import InputError, listing
from fedsim.registry import component


@component
class Folder(FixedDataset):
    """Your images: `--data-dir` holds domain folders, and these hold class folders.

    A class has the name of its folder, with underscores, as in FedCLIP's code. A single folder between each domain and
    its classes, such as `images` in Office-31, is skipped.
    """

    def read(self, root: Path | None) -> Images:
        root = checked(root, "folder")
        parts = [Part(folder.name, folder) for folder in folders(root)]
        if not parts:
            raise InputError(f"expected domain/class/file in {root}; there are no folders")
        if splits := [part.domain for part in parts if part.domain.lower() in SPLIT_FOLDERS]:
            raise InputError(
                f"expected domain/class/file in {root}; {listing(splits)} are splits and not visual domains: "
                "join them, since fedsim splits each domain itself, or rename these folders"
            )
        return list_tree(root, parts)

"""Any folder of images laid out as `domain/class/file`.

Source: torchvision's ImageFolder conventions, one level deeper.
"""

from pathlib import Path

from fedsim.datasets import Dataset, Images
from fedsim.datasets._tree import Part, checked, folders, list_tree
from fedsim.errors import InputError
from fedsim.registry import component


@component
class Folder(Dataset):
    """Images in folders of your own: `--data-dir` holds domain folders, these hold class folders.

    A class is called what its folder is called, underscores and all, as in FedCLIP's code.
    """

    def load(self, root: Path | None) -> Images:
        root = checked(root, "folder")
        parts = [Part(folder.name, folder) for folder in folders(root)]
        if not parts:
            raise InputError(f"wanted domain/class/file in {root}; there are no folders")
        return list_tree(root, parts)

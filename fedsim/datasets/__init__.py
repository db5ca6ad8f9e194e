"""Data sets: labelled images, or ready-made features.

A data set defines `load(root)`, which lists images without decoding them; one with a fixed number of rows defines
`read(root)`, and its classes can be chosen and renamed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from fedsim.datasets._classes import arrange_classes, at_least_two, read_names
from fedsim.datasets._labels import TEST, TRAIN, UNASSIGNED, VAL, Features, Images, Labels, vocabularies
from fedsim.errors import InputError
from fedsim.fields import AbsolutePath, Names
from fedsim.registry import component

__all__ = [
    "TEST",
    "TRAIN",
    "UNASSIGNED",
    "VAL",
    "Dataset",
    "Features",
    "FixedDataset",
    "Images",
    "Labels",
    "vocabularies",
]


class Dataset(ABC):
    """A source of images or features. Subclasses are components: frozen dataclasses of their options."""

    @abstractmethod
    def load(self, root: Path | None) -> Images | Features:
        """Lists the images below `root` (`--data-dir`) without decoding them, or reads features.

        Raises:
            InputError: a folder, a domain or a class is missing or empty.
        """


@component
class FixedDataset(Dataset):
    """A data set with a fixed number of rows, whose classes can be chosen and renamed."""

    classes: Annotated[Names, AfterValidator(at_least_two)] | None = Field(
        None, description="use only these classes, comma-separated (default: all)"
    )
    class_names: AbsolutePath = Field(
        None, description="file with a name in the prompt for each class, as text or YAML (default: the set's names)"
    )
    spaces: bool = Field(False, description="write the underscores of class names as spaces")
    absent_classes: bool = Field(False, description="accept domains without a row of some class")
    domain_groups: bool = Field(
        False, description="the domains are also the groups of a sensitive attribute, by which fairness is measured"
    )

    @abstractmethod
    def read(self, root: Path | None) -> Images | Features:
        """All rows of the data set, with the set's own names of classes; see `load`."""

    def load(self, root: Path | None) -> Images | Features:
        """The rows of the chosen classes, with the names for the prompt. Classes keep the order of the set."""
        data = self.read(root)
        names = self.prompt_names(root, data.classes)
        if self.spaces:
            names = {name: text.replace("_", " ") for name, text in names.items()}
        if self.domain_groups:
            if data.groups:
                raise InputError("the rows of this data set have groups already; leave out dataset.domain_groups")
            data = replace(data, group=data.domain, groups=data.domains)
        return arrange_classes(data, names, self.classes, self.absent_classes)

    def prompt_names(self, root: Path | None, classes: tuple[str, ...]) -> Mapping[str, str]:
        """The name in the prompt of each class of the data set."""
        return read_names(self.class_names, classes) if self.class_names else {name: name for name in classes}

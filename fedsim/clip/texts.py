"""The texts of the classes: one template with `{}` for the name, or several, whose text features are averaged.

In a suite of data sets, each class has the template of its set.
"""

from collections.abc import Sequence
from typing import Any

from fedsim.clip.architectures import import_open_clip
from fedsim.errors import InputError, listing, shortened

DEFAULT = "a picture of a {}"
NAMED = {"openai80": "OPENAI_IMAGENET_TEMPLATES"}  # open_clip's names of lists of templates

Prompt = str | tuple[str, ...] | None
Templates = tuple[str | tuple[str, ...], ...]  # each of all classes, or C of them, one for each class


def checked_prompt(value: Any) -> Prompt:
    """A prompt as a user gives it: None, a template, a name of `NAMED`, or a list of templates.

    Raises:
        InputError: it is nothing of these.
    """
    if value is None or (isinstance(value, str) and value in NAMED):
        return value
    templates = [value] if isinstance(value, str) else value
    if not isinstance(templates, list | tuple) or not templates or not all(isinstance(each, str) for each in templates):
        raise InputError(
            f"prompt needs to be a template, a list of templates, or {', '.join(NAMED)}, not {shortened(repr(value))}"
        )
    for template in templates:
        _check(template)
    return templates[0] if len(templates) == 1 else tuple(templates)


def templates_of(prompt: Prompt, of_data_set: str | tuple[str | None, ...] | None = None) -> Templates:
    """The templates that a prompt stands for.

    Args:
        of_data_set: the template that belongs to the data set, or to each of its classes, for a prompt of None.
    """
    if prompt is None and isinstance(of_data_set, tuple):
        checked = {template: templates_of(None, template)[0] for template in set(of_data_set)}
        return (tuple(str(checked[template]) for template in of_data_set),)
    templates = checked_prompt(prompt or of_data_set or DEFAULT)
    if isinstance(templates, str) and templates in NAMED:
        return tuple(template("{}") for template in getattr(import_open_clip(), NAMED[templates]))
    return (templates,) if isinstance(templates, str) else templates or ()


def texts_of(templates: Templates, classes: Sequence[str]) -> list[list[str]]:
    """For each template, the texts of all classes."""
    by_class = [[each] * len(classes) if isinstance(each, str) else each for each in templates]
    return [[template.format(name) for template, name in zip(each, classes, strict=True)] for each in by_class]


def templates_for(templates: Templates, classes: Sequence[int]) -> Templates:
    """The templates of some of the classes."""
    return tuple(each if isinstance(each, str) else tuple(each[label] for label in classes) for each in templates)


def describe(templates: Templates) -> str:
    """The templates in words."""
    words = [each if isinstance(each, str) else listing(map(repr, dict.fromkeys(each)), 40) for each in templates]
    return words[0] if len(words) == 1 else f"normalized mean of: {listing(words)}"


def _check(template: str) -> None:
    # Calling `format` would accept {:.3}, which cuts names, {!r}, which quotes them, and {{}}, which drops them.
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise InputError(f"prompt needs {{}} once, where the class name goes, and no other braces, not {template!r}")
    if not template.isprintable():
        raise InputError(f"prompt needs to be one line of text, not {template!r}")

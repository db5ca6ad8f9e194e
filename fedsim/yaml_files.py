"""YAML files whose values mean the same as on the command line."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fedsim.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML whose values mean the same as on the command line.

    YAML 1.1 reads `no` as false, 010 as eight and 1:30 as ninety. Here only true, false, null, and numbers in plain
    decimal notation have a type; anything else is text, which the field then reads as if it came from a flag. A
    repeated key is refused.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


for _type, _form, _first in (
    ("bool", "true|false", "tf"),
    ("null", "null|~|", ["n", "~", ""]),
    ("int", "0|-?[1-9][0-9]*", "-0123456789"),
    ("float", r"-?(0|[1-9][0-9]*)\.[0-9]*([eE][-+][0-9]+)?|-?\.inf|\.nan", "-.0123456789"),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_form})$"), _first)


def read_mapping(file: Path, of: str) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Args:
        of: what is mapped, for the message.

    Raises:
        InputError: it is not a YAML mapping, or gives a key twice.
    """
    try:
        fields = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{file}, line {line}, is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file} must be a mapping of {of}, got {type(fields).__name__}")
    return fields

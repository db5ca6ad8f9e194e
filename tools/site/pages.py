"""Pages that are made while the site is built: one per component, from the registry; benchmarks and changes.

MkDocs calls `on_config` and `on_files` (https://www.mkdocs.org/user-guide/plugins/#events).
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fedsim.cli.help import flag, limits_of
from fedsim.registry import FOLDERS, KINDS, available, find
from fedsim.search_space import search_of

sys.path.insert(0, str(Path(__file__).parent))
from sizes import Size, sizes

PROJECT = Path(__file__).parents[2]
TITLES = {kind: f"{kind.capitalize()}s" for kind in KINDS} | {"dataset": "Data sets", "server": "Server rules"}
TITLES |= {"privacy": "Privacy"}
COPIES = {"benchmarks.md": "benchmarks/README.md", "changes.md": "CHANGELOG.md"}
CITING = "docs/citing.md"
LEADS = {  # what a reader of an overview has to know
    "method": "What clients train, and with which hyperparameters: `--method NAME`, `--method.FIELD VALUE`. Trained "
    "parameters, and bytes that a client receives and sends in a round with `fedavg`, are those of ViT-B-32 and 15 "
    "classes. [Methods at a glance](../reads.md) says what each of them computes.",
    "server": "How the server combines what clients send: `--server NAME`, `--server.FIELD VALUE`. "
    "[Server rules at a glance](../reads.md#server-rules) has them in groups.",
    "codec": "In how many bytes updates and parameters travel: `--codec NAME`, `--codec.FIELD VALUE`.",
    "attack": "What malicious clients do: `--attack NAME`, `--attack.FIELD VALUE`; see "
    "[Attacks](../privacy.md#attacks).",
    "privacy": "What is clipped and noised: `--privacy NAME`, `--privacy.FIELD VALUE`; see [Privacy](../privacy.md).",
    "partition": "Which client holds which rows: `--partition NAME`, `--partition.FIELD VALUE`.",
    "dataset": "Images or features, with labels and domains: `--dataset NAME`, `--dataset.FIELD VALUE`; see "
    "[Data](../data.md).",
    "fleet": "How fast clients' devices train and send, and when they respond: `--fleet NAME`, `--fleet.FIELD VALUE`; "
    "see [Many clients, slow devices](../clients.md).",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in the navigation under Components."""
    for entry in config.nav or ():
        if isinstance(entry, dict) and "Components" in entry:
            entry["Components"] = [
                {
                    TITLES[kind]: [
                        f"{FOLDERS[kind]}/index.md",
                        *({name: f"{FOLDERS[kind]}/{name}.md"} for name in available(kind)),
                    ]
                }
                for kind in KINDS
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    measured = sizes()
    for kind in KINDS:
        files.append(File.generated(config, f"{FOLDERS[kind]}/index.md", content=overview(kind, measured)))
        for name in available(kind):
            page = component_page(kind, name, measured if kind == "method" else {})
            files.append(File.generated(config, f"{FOLDERS[kind]}/{name}.md", content=page))
    # Its links are to files of the repository, for readers there.
    links = re.sub(r"\(\.\./fedsim/(\w+)/(\w+)\.py\)", r"(\1/\2.md)", (PROJECT / CITING).read_text(encoding="utf-8"))
    files.append(File.generated(config, "citing.md", content=without_files(links)))
    for page, source in COPIES.items():
        files.append(File.generated(config, page, content=copied(PROJECT / source)))
    return files


def overview(kind: str, measured: dict[str, Size]) -> str:
    """All components of a kind, a row each."""
    columns = ["name", "what it is", *(["reads", "trained", "received", "sent"] if kind == "method" else [])]
    rows = []
    for name in available(kind):
        row = [f"[`{name}`]({name}.md)", in_markdown(first_line(find(kind, name)))]
        if kind == "method":
            size = measured[name]
            row += [size.reads, *(f"{number:,}" for number in (size.trained, size.received, size.sent))]
        rows.append(row)
    lead = LEADS.get(kind, f"`--{kind} NAME`, `--{kind}.FIELD VALUE`.")
    return "\n".join(["---", "hide: [toc]", "---", f"# {TITLES[kind]}", "", lead, "", *table(columns, rows), ""])


def component_page(kind: str, name: str, measured: dict[str, Size]) -> str:
    """What `fedsim help NAME` says; what a method sends; the source code."""
    component = find(kind, name)
    module = sys.modules[component.__module__]
    lines = [f"# {name}", ""]
    for text in (module.__doc__, component.__doc__):
        for paragraph in (text or "").split("\n\n"):
            lines += [*paragraphs(" ".join(paragraph.split())), ""]
    lines += [f"    --{kind} {name}", ""]
    if name in measured:
        lines += ["## What travels", "", *measured[name].in_words(), ""]
    if fields := component.__pydantic_fields__:
        columns = ["flag", "default", "limits", "searched", "meaning"]
        lines += ["## Fields", "", *table(columns, [field_row(kind, component, field) for field in fields]), ""]
    code = inspect.getsource(module).splitlines()
    path = Path(module.__file__ or "").relative_to(PROJECT).as_posix()
    lines += ["## Source code", "", f'??? note "{path}, {len(code)} lines"', ""]
    lines += ["    ```python", *(f"    {line}".rstrip() for line in code), "    ```", ""]
    return "\n".join(lines)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; columns of numbers are aligned to the right."""
    numeric = [all(re.fullmatch(r"[\d,]+", row[place]) for row in rows) for place in range(len(columns))]
    cells = [columns, ["---:" if number else "---" for number in numeric], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def field_row(kind: str, component: type, name: str) -> list[str]:
    field, search = component.__pydantic_fields__[name], search_of(component, name)
    text, _, described = (field.description or "").partition(" (default: ")  # as of a field whose default is None
    default = described.removesuffix(")") or ("" if field.default in (None, ()) else f"`{str(field.default).lower()}`")
    choices = [str(choice) for choice in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    limits = ", ".join([*choices, *limits_of(component, name)])
    return [f"`{flag(f'{kind}.{name}')}`", default, limits, f"`{search}`" if search else "", in_markdown(text)]


def paragraphs(text: str) -> list[str]:
    """A paragraph of a docstring; each of its `Differs:` and `Unread:` becomes a paragraph with a heading in bold."""
    parts = re.split(r"(?:^|(?<= ))(?=(?:Source|Differs|Unread): )", text)
    marked = (re.sub(r"^(Source|Differs|Unread): ", r"**\1:** ", in_markdown(part.strip())) for part in parts if part)
    return [line for part in marked for line in (part, "")][:-1]


def in_markdown(text: str) -> str:
    """Text as it stands, outside backticks: nothing in it is emphasis; arXiv numbers are links."""
    pieces = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([*_<>\[\]])", r"\\\1", piece) for piece in pieces[::2]]
    pieces[::2] = [re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", piece) for piece in plain]
    return "".join(pieces)


def first_line(component: type) -> str:
    return (sys.modules[component.__module__].__doc__ or "").partition("\n")[0]


def copied(path: Path) -> str:
    """A page of the repository; its links to other files become their names, because they are not in the site."""
    return without_files(path.read_text(encoding="utf-8"), r"[^)#][^)]*")


def without_files(text: str, path: str = r"\.\./[^)]*") -> str:
    """The text with the names of links in place of links to such paths."""
    return re.sub(rf"\[([^\]]+)\]\((?!https?:){path}\)", r"\1", text)

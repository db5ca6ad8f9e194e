"""What the scripts share that train many runs: their flags, and how numbers over seeds are written."""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the docstring of a script."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_data(parser: argparse.ArgumentParser, dataset: str = "glyphs", about: str | None = None) -> None:
    """Adds the flags that say which data are used, and what encodes them."""
    parser.add_argument("--dataset", default=dataset, help=about)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--backbone")
    parser.add_argument("--pretrained")


def data_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a config that those flags give; pages of hundreds of runs would take longer than some of them."""
    data = {"dataset": {"name": args.dataset}, "data_dir": args.data_dir, "page": False}
    return data | {"backbone": args.backbone, "pretrained": args.pretrained}


def parsed(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The command line, with `quick` as defaults where it says --quick; a flag that is given as well still counts."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it all run?")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def save_svg(figure: Figure, file: Path) -> None:
    """Writes a figure, and closes it; the same numbers give the same file."""
    with plt.rc_context({"svg.hashsalt": file.stem}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def save_curves(figure: Figure, file: Path, x: str, y: str) -> None:
    """Writes a figure of one plot whose x axis is logarithmic, its legend to the right, as `save_svg` does."""
    (axis,) = figure.axes
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    save_svg(figure, file)


def spread(values: pd.Series) -> str:
    """Mean ± deviation; the mean alone of a single value."""
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")

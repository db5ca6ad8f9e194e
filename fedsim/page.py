"""One self-contained HTML page per run."""

from pathlib import Path

from fedsim.report import Report, write_text


def write_page(report: Report, file: Path) -> None:
    write_text(file, str(report.summary()))

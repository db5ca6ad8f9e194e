"""The curves of a run as an event file, for TensorBoard.

The file follows from the report alone, so it is written again when a run is resumed: no round is in it twice, and none
is missing, even if an earlier part of the run was without it.
"""

from __future__ import annotations

import time
from math import isnan
from pathlib import Path
from shutil import rmtree
from types import TracebackType

import numpy as np

from fedsim.counts import Counts
from fedsim.reporting.metrics import curves
from fedsim.reporting.report import Report
from fedsim.reporting.tables import COLUMNS, TRAINED, ZERO_SHOT, score_table

FOLDER = "tensorboard"  # in that of the run
COSTS = "loss", "bytes_up", "bytes_down", "seconds", "clock_s"  # columns of `Tables.rounds`


class EventFile:
    """Writes the rounds of a report to an event file as they are added.

    Tags: `accuracy/generalization`, `accuracy/personalization`, `accuracy/validation` and, if there are new classes,
    `accuracy/new`, in [0, 1]; the same below `zero_shot`, in round 0; and `round/` with each of `COSTS`.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # not SummaryWriter: its thread would lose errors

        rmtree(folder / FOLDER, ignore_errors=True)
        (folder / FOLDER).mkdir()
        self.writer = EventsWriter(str(folder / FOLDER / "events"))
        self.round = 0  # of the last costs that were written
        self.evaluated = -1
        self._write(0, self._accuracies("zero_shot", ZERO_SHOT, 0, report.zero_shot, report))
        self.update(report)

    def update(self, report: Report) -> None:
        """Writes the rounds that were added since."""
        for round in range(self.round + 1, len(report.rounds) + 1):
            self._write(round, _costs(report.rounds[round - 1]))
        for round in (round for round in report.counts if round > self.evaluated):
            self._write(round, self._accuracies("accuracy", TRAINED, round, report.counts[round], report))
        self.round, self.evaluated = len(report.rounds), report.last_round
        self.writer.flush()

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.writer.close()

    def _accuracies(self, tag: str, model: str, round: int, counts: Counts, report: Report) -> dict[str, float]:
        lines = curves(score_table([(model, round, counts)], report.domains), report.held_out)
        return {f"{tag}/{name}": float(lines[name].iloc[0]) for name in lines}

    def _write(self, round: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] - is generated
        from tensorboardX.summary import scalar

        for tag, value in values.items():
            if not isnan(value):
                self.writer.write_event(Event(wall_time=time.time(), step=round, summary=scalar(tag, value)))


def _costs(row: np.ndarray) -> dict[str, float]:
    return {f"round/{name}": float(row[COLUMNS["rounds"].index(name)]) for name in COSTS}

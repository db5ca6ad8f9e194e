"""A sweep's side of Ray Tune: who asks for trials, who does them, and who says which of them stop."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import Pool, open_pool
from fedsim.errors import InputError
from fedsim.files import reason
from fedsim.simulate import Experiment, staff
from fedsim.sweep.trial import Trial, experiments_of

if TYPE_CHECKING:
    from fedsim.sweep.study import Study  # Optuna is none of a trial's process

MEASURES = ("validation", "worst_tenth", "bytes", "clock_s", "flops", "chosen_round", "rounds")


class Asking(Searcher):
    """Trials out of a study, which is told how they end.

    Attributes:
        faults: by Tune's name of a trial, why its process has failed, time after time.
        stuck: why some trials could not go on though nothing is wrong with them: they are left unfinished.
    """

    def __init__(self, study: "Study", suggest: Callable, ended: Callable[[int], None]) -> None:
        super().__init__()
        self.study, self._suggest, self._ended = study, suggest, ended
        self.stuck: list[str] = []
        self.numbers: dict[str, int] = {}
        self.faults: dict[str, list[str]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        asked = self.study.ask(self._suggest)
        self.numbers[trial_id] = asked.number
        return {"number": asked.number, "fields": asked.fields}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number, faults = self.numbers[trial_id], self.faults.get(trial_id, [])
        if number not in self.study.live:  # it was pruned
            pass
        elif error and faults[-1].startswith("Stopped: "):
            return self.stuck.append(faults[-1].removeprefix("Stopped: "))
        elif error:
            times = "once" if len(faults) == 1 else f"{len(faults)} times"
            self.study.fail(number, f"its process failed {times}: {faults[-1]}", False, attempts=len(faults))
        elif result is None:  # the sweep itself is ending
            return None
        elif "stuck" in result:
            return self.stuck.append(result["stuck"])
        elif "failed" in result:
            self.study.fail(number, result["failed"], True, **self.about(trial_id, result))
        else:
            self.study.finish(number, result["rounds"], measures_of(result), **self.about(trial_id, result))
        self._ended(number)

    def about(self, trial_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """What else is remembered of a trial."""
        attempts = 1 + len(self.faults.get(trial_id, []))
        return {"seconds": result["time_total_s"], "node": result["hostname"], "attempts": attempts}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: all state is the study's."""

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


class Judging(FIFOScheduler):
    """First come, first served; a trial stops when the study says so."""

    def __init__(self, asking: Asking) -> None:
        super().__init__()
        self.asking = asking

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        about = self.asking.about(trial.trial_id, result)
        stop = self.asking.study.report(trial.config["number"], result["rounds"], measures_of(result), **about)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        # Before the searcher hears of it, which is not told why; and before Tune begins the trial again, if it does.
        self.asking.faults.setdefault(trial.trial_id, []).append(_fault(trial))


class Doing(ray.tune.Trainable):
    """The process of a trial, which the next one takes over, and with it the actors of its pool."""

    def setup(self, config: dict[str, Any], base: Experiment, seeds: Sequence[int], folder: Path, sizing: Sizing):
        """Args: those of `experiments_of`, and of `open_pool`."""
        self.base, self.seeds, self.folder, self.sizing = base, seeds, folder, sizing
        self.pool: Pool | None = None
        self.trial: Trial | None = None
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Begins another trial: its `number`, and its `fields`."""
        self._let_go()
        self.refused: dict[str, str] = {}
        try:
            experiments = experiments_of(self.base, config["fields"], self.seeds, self.folder, config["number"])
            self.pool = self.pool or open_pool(self.sizing, len(experiments[0].clients), *staff(experiments[0]))
            self.trial = Trial(experiments, self.pool)
        except (InputError, OSError) as error:  # told at the first step: what is raised here, Tune would try again
            self.refused = _told(error)
        return True

    def step(self) -> dict[str, Any]:
        try:
            if not self.refused:
                return self.trial.advance() | {"done": self.trial.done}
        except (InputError, OSError) as error:  # it has diverged, say, or a disk is full; and would again
            self.refused = _told(error)
        return self.refused | {"done": True}

    def cleanup(self) -> None:
        self._let_go()
        if self.pool:
            self.pool.close()

    def _let_go(self) -> None:
        if self.trial:
            self.trial.close()
        self.trial = None


def _told(error: InputError | OSError) -> dict[str, str]:
    """Whether a trial has failed, by its parameters, or is stuck, by its machine; and why."""
    if isinstance(error, InputError):
        return {"failed": str(error)}
    return {"stuck": reason(error)}


def measures_of(result: dict[str, Any]) -> dict[str, float]:
    return {name: result[name] for name in MEASURES if name in result}


def _fault(trial: Any) -> str:
    """Why the process of a trial has failed this time, from what Tune has written of it."""
    said = (
        Path(trial.error_file).read_text(encoding="utf-8", errors="replace").rpartition("Failure # ")[2].splitlines()
        if trial.error_file
        else []
    )
    if any("low on memory" in line for line in said):
        return "its machine ran out of memory"
    # Where a traceback ends; what Ray says of a process that was killed has none, and is not for its reader.
    ends = [k for k, line in enumerate(said) if re.match(r"[\w.]+(Error|Exception|Stopped)\b", line)]
    return " ".join(said[ends[-1] :]).removeprefix("fedsim.errors.").strip() if ends else "it was killed"

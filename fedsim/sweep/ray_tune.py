"""A sweep's side of Ray Tune: the searcher, the scheduler, and the actor that runs trials."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from fedsim.cluster.placement import Sizing
from fedsim.cluster.pool import Pool, open_pool
from fedsim.errors import Diverged, InputError
from fedsim.files import reason
from fedsim.memory import collect_seldom
from fedsim.prepare import Experiment
from fedsim.sweep.trial import Trial, experiments_of

if TYPE_CHECKING:
    from fedsim.sweep.study import Study  # a trial's process does not need Optuna

MEASURES = ("validation", "worst_tenth", "bytes", "clock_s", "flops", "chosen_round", "rounds")


class StudySearcher(Searcher):
    """Proposes the trials of a study, and writes to it how they end.

    Attributes:
        blocked: why some trials could not continue although nothing is wrong with them; they stay unfinished.
        failures: by Tune's id of a trial, why its process has died, once per attempt.
    """

    def __init__(self, study: "Study", suggest: Callable, on_end: Callable[[int], None]) -> None:
        super().__init__()
        self.study, self._suggest, self._on_end = study, suggest, on_end
        self.blocked: list[str] = []
        self.failures: dict[str, list[str]] = {}
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        proposal = self.study.ask(self._suggest)
        self._numbers[trial_id] = proposal.number
        return {"number": proposal.number, "fields": proposal.fields}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number, failures = self._numbers[trial_id], self.failures.get(trial_id, [])
        if number not in self.study.live:  # it was pruned
            pass
        elif error and failures[-1].startswith("Stopped: "):
            return self.blocked.append(failures[-1].removeprefix("Stopped: "))
        elif error:
            times = "once" if len(failures) == 1 else f"{len(failures)} times"
            sentence = f"its process failed {times}: {failures[-1]}"
            self.study.fail(number, sentence, invalid=False, attempts=len(failures))
        elif result is None:  # the sweep itself is ending
            return None
        elif "blocked" in result:
            return self.blocked.append(result["blocked"])
        elif "failed" in result:
            self.study.fail(number, result["failed"], invalid=True, **self.attributes(trial_id, result))
        else:
            self.study.finish(number, result["rounds"], measures_of(result), **self.attributes(trial_id, result))
        self._on_end(number)

    def attributes(self, trial_id: str, result: dict[str, Any]) -> dict[str, Any]:
        """What is stored with a trial besides its measures."""
        attempts = 1 + len(self.failures.get(trial_id, []))
        return {"seconds": result["time_total_s"], "node": result["hostname"], "attempts": attempts}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Does nothing: all state is in the study."""

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


class StudyScheduler(FIFOScheduler):
    """First in, first out; stops a trial when the study prunes it."""

    def __init__(self, searcher: StudySearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        attributes = self.searcher.attributes(trial.trial_id, result)
        number, rounds = trial.config["number"], result["rounds"]
        pruned = self.searcher.study.report(number, rounds, measures_of(result), **attributes)
        return TrialScheduler.STOP if pruned else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        # Tune calls the searcher later and without the cause, and may have restarted the trial by then.
        self.searcher.failures.setdefault(trial.trial_id, []).append(_cause_of_failure(trial))


class TrialActor(ray.tune.Trainable):
    """The process of a trial; the next trial reuses it, with the actors of its pool."""

    def setup(self, config: dict[str, Any], base: Experiment, seeds: Sequence[int], folder: Path, sizing: Sizing):
        """Args: those of `experiments_of` and `open_pool`."""
        collect_seldom()
        self.base, self.seeds, self.folder, self.sizing = base, seeds, folder, sizing
        self.pool: Pool | None = None
        self.trial: Trial | None = None
        self.reset_config(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Starts another trial, given its `number` and its `fields`."""
        self._close_trial()
        self.refusal: dict[str, str] = {}
        try:
            experiments = experiments_of(self.base, config["fields"], self.seeds, self.folder, config["number"])
            self.pool = self.pool or open_pool(self.sizing, len(experiments[0].clients))
            self.trial = Trial(experiments, self.pool)
        except (InputError, OSError) as error:  # reported at the first step: if raised here, Tune would try again
            self.refusal = _refusal(error)
        return True

    def step(self) -> dict[str, Any]:
        try:
            if self.trial and not self.refusal:
                return self.trial.advance() | {"done": self.trial.done}
        except (InputError, Diverged, OSError) as error:
            # An OSError, such as a full disk, too: a retry would end the same way.
            self.refusal = _refusal(error)
        return self.refusal | {"done": True}

    def cleanup(self) -> None:
        self._close_trial()
        if self.pool:
            self.pool.close()

    def _close_trial(self) -> None:
        if self.trial:
            self.trial.close()
        self.trial = None


def measures_of(result: dict[str, Any]) -> dict[str, float]:
    return {name: result[name] for name in MEASURES if name in result}


def _refusal(error: InputError | Diverged | OSError) -> dict[str, str]:
    """The cause, by whether the trial has failed by its parameters, or is blocked by its machine."""
    if isinstance(error, InputError | Diverged):
        return {"failed": str(error)}
    return {"blocked": reason(error)}


def _cause_of_failure(trial: Any) -> str:
    """Why the process of a trial died this time, from the error file that Tune writes."""
    lines = (
        Path(trial.error_file).read_text(encoding="utf-8", errors="replace").rpartition("Failure # ")[2].splitlines()
        if trial.error_file
        else []
    )
    if any("low on memory" in line for line in lines):
        return "its machine ran out of memory"
    # The last line of a traceback. Ray's own text on a killed process has none, and does not help a user.
    ends = [index for index, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Stopped)\b", line)]
    return " ".join(lines[ends[-1] :]).removeprefix("fedsim.errors.").strip() if ends else "it was killed"

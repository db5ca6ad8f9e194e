"""The accuracies that a finished run shows at once: in the terminal, and as a report in a notebook."""

from math import nan

import pandas as pd

from fedsim.errors import listing
from fedsim.formats import difference, number, percent
from fedsim.reporting.tables import TUNED, ZERO_SHOT, Tables


def accuracies(tables: Tables) -> dict[str, pd.DataFrame]:
    """By title, tables of text: a row per model, the gain over zero-shot CLIP, and the number of test rows."""
    experiment, tested = tables.experiment, rows_tested(tables)
    trained = f"{experiment['method']['name']}, {experiment['server']['name']}"
    models = {"zero-shot CLIP": tables.summary(ZERO_SHOT), trained: tables.summary()}
    tuned = {"tuned models": tables.summary(TUNED)} if tables.tuned else {}
    zero_shot, ours = models.values()
    made = {}
    for title, heads in _heads(tables, [*models.values(), *tuned.values()]).items():
        rows = {name: [percent(means.get(key, nan)) for key in heads] for name, means in models.items()}
        rows["gain, points"] = [difference(zero_shot.get(key, nan), ours.get(key, nan)) for key in heads]
        rows |= {name: [percent(means.get(key, nan)) for key in heads] for name, means in tuned.items()}
        if tested.keys() & heads.keys():
            rows["test rows"] = [number(tested[key]) if key in tested else "" for key in heads]
        made[title] = pd.DataFrame.from_dict(rows, orient="index", columns=list(heads.values()))
    return made


def rows_tested(tables: Tables) -> dict[str, int]:
    """Test rows behind an accuracy of `summarize`; a row that several models are tested on counts once."""
    scores = tables.zero_shot.scores
    scores = scores[scores.split == "test"]
    held = scores.domain.isin(tables.held_out)
    return {"generalization": int(scores.total[held].sum()), "personalization": int(scores.total[~held].sum())}


def _heads(tables: Tables, means: list[dict[str, float]]) -> dict[str, dict[str, str]]:
    """By title of a printed table, the measures in it and their column heads."""
    heads = {"generalization": f"held-out domain ({listing(tables.held_out)})"} if tables.held_out else {}
    heads |= {"personalization": "clients' own test rows", "worst_tenth": "worst tenth of clients"}
    if any(abs(model["personalization_own"] - model["personalization"]) > 0 for model in means):
        heads["personalization_own"] = "own test rows among own classes"
    if "neighbor" in means[0]:
        heads["neighbor"] = "other clients' test rows"
    if any("attack_success" in model for model in means):
        heads["attack_success"] = "attack success"
    titles = {f"accuracy in percent, round {tables.chosen_round} of {tables.last_round}": heads}
    if tables.new_classes:
        titles["base and new classes, and harmonic means"] = {
            "local": "local",
            "base": "base",
            "new": "new",
            "harmonic_2": "harmonic mean (base, new)",
            "harmonic_3": "harmonic mean (local, base, new)",
        }
    if "head" in means[0]:
        titles["own test rows by class, from frequent to rare"] = {part: part for part in ("head", "medium", "tail")}
    return titles

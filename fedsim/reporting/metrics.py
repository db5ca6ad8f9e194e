"""Every mean that a run reports, derived from counts; and the round that validation rows choose.

Arguments are rows of the tables in `tables.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedsim.class_tasks import task_in
from fedsim.counts import GROUPS
from fedsim.shares import part

TRAVELLED = "bytes up and down since the start"
CLOCK = "simulated seconds since the start"


def summarize(
    scores: pd.DataFrame,
    labels: pd.DataFrame,
    calibration: pd.DataFrame,
    held_out: Sequence[str],
    suite: bool = False,
) -> dict[str, float]:
    """The means of one evaluation, of one model in one round; nan where it has no such rows.

    All trained classes compete for a row unless stated otherwise.

    generalization: test accuracy on held-out domains, mean over domains.
    personalization: accuracy of clients on their own test rows, mean over clients.
    worst_tenth: the same, mean over the worst tenth of the clients.
    validation: accuracy of clients on their own validation rows, mean over clients.
    spread: standard deviation of the accuracies that personalization is the mean of.
    pooled: accuracy on the own test rows of all clients together, so that a client weighs as its rows do.
    balanced: balanced accuracy on the same rows, mean over the classes that they show.
    personalization_own: as personalization, but only a client's own classes compete for its rows.
    macro_f1, ece: of the own test rows of all clients together; see `macro_f1` and `calibration_error`.
    generalization_f1, generalization_ece: of the test rows of all held-out domains together.

    neighbor: where clients have `neighbors`, accuracy of each client's model on the test rows of these together, mean
        over clients; with all others for neighbors as in DP-FPL's code (linhhtran/DP-FPL, commit 7769f01,
        Dassl/dassl/data/data_manager.py).

    Where clients are malicious, none of these are theirs; and where the attack aims at classes, also these:

    attack_success: share of the own test rows of all clients together, of those that are attacked, that are predicted
        as the attack intends.
    generalization_attack_success: the same of held-out domains, mean over domains.

    Where there are rows of new classes, also these, as papers that train on base classes call them:

    local: personalization_own.
    base: accuracy on the own test rows of all clients together.
    new: accuracy on test rows of new classes, for which only new classes compete.
    harmonic_2: harmonic mean of base and new (CoCoOp, Zhou et al. 2022, arXiv 2203.05557).
    harmonic_3: harmonic mean of local, base and new (FedTPG, Qiu et al. 2024, arXiv 2310.06123).

    Args:
        suite: domains are data sets with classes of their own; local, base and new are then means over the data sets,
            as in FedTPG's code (boschresearch/FedTPG, commit f141c29, federated/server.py).
    """
    held = scores.domain.isin(held_out)
    test, new = scores.split == "test", scores.split == "new"
    own = accuracy_per_client(scores[test & ~held])
    among_own = accuracy_per_client(scores[test & ~held].assign(correct=scores.correct_own))
    groups = {group: (labels[labels.group == group], calibration[calibration.group == group]) for group in GROUPS}
    means = {
        "generalization": float(accuracy_per_domain(scores[test & held]).mean()),
        "personalization": float(own.mean()),
        "worst_tenth": tail_mean(own) if len(own) else float("nan"),
        "validation": validation_of(scores),
        "pooled": pooled_accuracy(scores[test & ~held]),
        "balanced": balanced_accuracy(groups["own"][0]),
        "spread": float(own.std(ddof=0)),
        "personalization_own": float(among_own.mean()),
    }
    for group, f1, ece in (("own", "macro_f1", "ece"), ("held_out", "generalization_f1", "generalization_ece")):
        means |= {f1: macro_f1(groups[group][0]), ece: calibration_error(groups[group][1])}
    if (neighbor := scores.split == "neighbor").any():
        means["neighbor"] = float(accuracy_per_client(scores[neighbor]).mean())
    if (attacked := scores.split == "attacked").any():
        means["attack_success"] = pooled_accuracy(scores[attacked & ~held])
        if (attacked & held).any():
            means["generalization_attack_success"] = float(accuracy_per_domain(scores[attacked & held]).mean())
    if not new.any():
        return means
    if suite:
        local = _mean_over_domains(scores[test & ~held].assign(correct=scores.correct_own))
        base, unseen = (float(accuracy_per_domain(scores[rows]).mean()) for rows in (test & ~held, new))
    else:
        local = means["personalization_own"]
        base, unseen = (pooled_accuracy(scores[rows]) for rows in (test & ~held, new))
    means |= {"local": local, "base": base, "new": unseen}
    return means | {"harmonic_2": harmonic_mean(base, unseen), "harmonic_3": harmonic_mean(local, base, unseen)}


# The chosen round ------------------------------------------------------------------------------------------


def validation_of(scores: pd.DataFrame) -> float:
    """Accuracy of clients on their own validation rows in one round, mean over clients; nan without such rows."""
    return float(accuracy_per_client(scores[scores.split == "val"]).mean())


def best_round(validation: Mapping[int, float]) -> int:
    """The round of the highest mean validation accuracy over clients, the first on a tie, and never round 0.

    Without validation rows, the last round. It is never chosen on test rows.
    """
    trained = {round: mean for round, mean in validation.items() if round and not np.isnan(mean)}
    return max(trained, key=lambda round: trained[round]) if trained else max(validation, default=0)


def of_last_task(validation: Mapping[int, float], experiment: Mapping[str, Any]) -> dict[int, float]:
    """The rounds of the same class task as the last one; those of earlier tasks are evaluated on fewer classes."""
    tasks = {round: task_in(round, experiment.get("tasks", 1), experiment.get("rounds", 0)) for round in validation}
    return {round: mean for round, mean in validation.items() if tasks[round] == max(tasks.values())}


# Classes that arrive in tasks ------------------------------------------------------------------------------


def task_accuracies(labels: pd.DataFrame, tasks: Sequence[Sequence[str]], ends: Sequence[int]) -> pd.DataFrame:
    """Accuracy in [0, 1] at the end of each task, on the clients' own test rows of each task so far.

    Args:
        labels: rows of `Tables.labels`, of one model.
        tasks: the names of the classes of each task.
        ends: the rounds with which the first tasks end.

    Returns:
        By round: a column for each task, 1, 2, ..., with nan before it begins, and `seen` of all rows so far together.
    """
    task_of = {name: number for number, names in enumerate(tasks, 1) for name in names}
    own = labels[(labels.group == "own") & labels["round"].isin(ends)]
    own = own.assign(task=own.label.map(task_of))
    by_task = own.groupby(["round", "task"])[["correct", "support"]].sum()
    seen = own.groupby("round")[["correct", "support"]].sum()
    table = (by_task.correct / by_task.support).unstack("task").reindex(index=list(ends))
    return table.reindex(columns=range(1, len(tasks) + 1)).assign(seen=seen.correct / seen.support)


def continual(by_task: pd.DataFrame) -> dict[str, float]:
    """The measures of class-incremental learning, from what `task_accuracies` returns.

    average_accuracy: accuracy on the rows of all classes so far, mean over the ends of the tasks (the average
        incremental accuracy of iCaRL, Rebuffi et al. 2017, arXiv 1611.07725).
    last_accuracy: the same at the end of the last task.
    forgetting: of each task but the last, the best accuracy on its rows at the end of an earlier task minus that at the
        end of the last, mean over these tasks (Chaudhry et al. 2018, arXiv 1801.10112).
    """
    tasks = by_task.drop(columns="seen")
    forgotten = (tasks[:-1].max() - tasks.iloc[-1]).dropna()
    average, last = float(by_task.seen.mean()), float(by_task.seen.iloc[-1])
    return {"average_accuracy": average, "last_accuracy": last, "forgetting": float(forgotten.mean())}


# Fairness between groups -----------------------------------------------------------------------------------


def group_name(group: str) -> str:
    """The name in column `group` of `Tables.labels` of clients' own test rows in a group of a sensitive attribute."""
    return f"own, {group}"


def group_accuracies(labels: pd.DataFrame, groups: Sequence[str]) -> pd.Series:
    """Accuracy in [0, 1] on clients' own test rows in each group, from rows of `Tables.labels` of one evaluation."""
    counts = labels.groupby("group")[["correct", "support"]].sum().reindex(list(map(group_name, groups)))
    return (counts.correct / counts.support).set_axis(pd.Index(groups, name="group"))


def fairness(labels: pd.DataFrame, groups: Sequence[str]) -> dict[str, float]:
    """Differences between groups of a sensitive attribute, on clients' own test rows, all together.

    With more than two groups, a difference is between the highest and the lowest; groups without rows to take a share
    of are left out, and with fewer than two it is nan. With more than two classes, it is the largest of those of each
    class against all others; with two, both classes give the same.

    worst_group: accuracy on the rows of the group where it is lowest.
    demographic_parity: difference in the share of rows that are predicted as a class.
    equalized_odds: difference in the share of the rows of a class, or of those of all others, that are predicted as
        that class, whichever is larger (Hardt et al. 2016, arXiv 1610.02413).

    Source: both as in Agarwal et al. 2018, arXiv 1803.02453, and as `demographic_parity_difference` and
    `equalized_odds_difference` of fairlearn report them. The code of FF-DVP (huiminzeng/FF-DVP, commit 56a3523,
    src/eval_metrics.py) adds the two shares of equalized odds.

    Args:
        labels: rows of `Tables.labels` of one evaluation.
        groups: as `Labels.groups`.
    """
    names = list(map(group_name, groups))
    counts = labels[labels.group.isin(names)].groupby(["label", "group"])[["correct", "predicted", "support"]].sum()
    correct, predicted, support = (counts[name].unstack(fill_value=0) for name in ("correct", "predicted", "support"))
    rows = support.sum()
    with_class, without = support.where(support > 0), (rows - support).where(rows > support)
    odds = _gap(correct / with_class), _gap((predicted - correct) / without)
    return {
        "worst_group": float(group_accuracies(labels, groups).min()),
        "demographic_parity": float(_gap(predicted / rows.where(rows > 0)).max()),
        "equalized_odds": float(np.fmax(*odds).max()) if len(support) else float("nan"),
    }


def _gap(shares: pd.DataFrame) -> pd.Series:
    """By class (row), the largest difference between two groups (columns); nan where fewer than two have a share."""
    return (shares.max(axis=1) - shares.min(axis=1)).where(shares.notna().sum(axis=1) > 1)


# Accuracies ------------------------------------------------------------------------------------------------


def accuracy_per_client(scores: pd.DataFrame) -> pd.Series:
    """Accuracy in [0, 1] by (round, client), over all domains and splits of the given rows."""
    counts = scores.groupby(["round", "client"])[["correct", "total"]].sum()
    return (counts.correct / counts.total).dropna()


def accuracy_per_domain(scores: pd.DataFrame) -> pd.Series:
    """Accuracy in [0, 1] by (round, domain), over all clients and splits of the given rows."""
    counts = scores.groupby(["round", "domain"])[["correct", "total"]].sum()
    return (counts.correct / counts.total).dropna()


def accuracy_per_round(scores: pd.DataFrame) -> pd.Series:
    """Accuracy in [0, 1] by round, over all of the given rows together."""
    counts = scores.groupby("round")[["correct", "total"]].sum()
    return (counts.correct / counts.total).dropna()


def _mean_over_domains(scores: pd.DataFrame) -> float:
    """Mean over domains of the mean accuracy over clients of the domain."""
    domains = [accuracy_per_client(rows).mean() for _, rows in scores.groupby("domain")]
    return float(np.mean(domains)) if domains else float("nan")


def pooled_accuracy(scores: pd.DataFrame) -> float:
    """Accuracy in [0, 1] over all of the given rows together; nan without rows."""
    return float(scores.correct.sum() / scores.total.sum()) if scores.total.sum() else float("nan")


def balanced_accuracy(labels: pd.DataFrame) -> float:
    """Accuracy in [0, 1] on the rows of a class, from rows of `Tables.labels`, mean over classes with rows."""
    counts = labels.groupby("label")[["correct", "support"]].sum()
    counts = counts[counts.support > 0]
    return float((counts.correct / counts.support).mean())


def parts_by_rows(rows: pd.Series) -> dict[str, str]:
    """Whether a class belongs to the head, the medium or the tail, by class; empty unless there is a long tail.

    In the order of their train rows, classes with which at most 75 % of all rows are reached are the head, those up to
    95 % the medium, and the others the tail, as in CAPT's code (2373604131/clientLT, commit 24045d2,
    federated_main.py). A long tail is one whose largest class has ten times the rows of the smallest, or more.

    Args:
        rows: train rows of all clients, by class with any.
    """
    if rows.empty or rows.max() < 10 * rows.min():
        return {}
    ordered = rows.sort_values(ascending=False, kind="stable")
    # In whole numbers: of 100 rows, 75 are exactly 75 %.
    reached = 100 * ordered.cumsum() / ordered.sum()
    return {str(label): "head" if at <= 75 else "medium" if at <= 95 else "tail" for label, at in reached.items()}


def tail_of(clients: int) -> int:
    """How many of this number of clients are the worst tenth: rounded down, but at least one."""
    return max(1, part(clients, 0.1))


def tail_mean(accuracy: pd.Series) -> float:
    """Mean of the worst tenth of the clients, which the mean over all hides; see `tail_of`."""
    return float(accuracy.sort_values().iloc[: tail_of(len(accuracy))].mean())


def macro_f1(labels: pd.DataFrame) -> float:
    """F1 in [0, 1] of rows of `Tables.labels`, mean over classes with rows or predictions."""
    counts = labels.groupby("label")[["correct", "predicted", "support"]].sum()
    return float((2 * counts.correct / (counts.predicted + counts.support)).mean())


def calibration_error(bins: pd.DataFrame) -> float:
    """Distance of confidence from accuracy, from rows of `Tables.calibration`: mean over bins, weighted by rows.

    Source: the expected calibration error of Guo et al. 2017, arXiv 1706.04599.
    """
    counts = bins.groupby("bin")[["rows", "correct", "confidence"]].sum()
    return float((counts.correct - counts.confidence).abs().sum() / counts.rows.sum()) if len(counts) else float("nan")


def harmonic_mean(*accuracies: float) -> float:
    """0 if one of them is 0; nan if one is nan."""
    if 0.0 in accuracies:
        return float("nan") if np.isnan(accuracies).any() else 0.0
    return len(accuracies) / sum(1 / accuracy for accuracy in accuracies)


# Curves ----------------------------------------------------------------------------------------------------


def curves(scores: pd.DataFrame, held_out: Sequence[str]) -> pd.DataFrame:
    """Means of `summarize` by round, of one model: nan where a round has no such rows."""
    held = scores.domain.isin(held_out)
    test, val = scores.split == "test", scores.split == "val"
    accuracies = {
        "personalization": accuracy_per_client(scores[test & ~held]),
        "generalization": accuracy_per_domain(scores[test & held]),
        "validation": accuracy_per_client(scores[val]),
    }
    if (new := scores.split == "new").any():
        accuracies["new"] = accuracy_per_client(scores[new])
    if (neighbor := scores.split == "neighbor").any():
        accuracies["neighbor"] = accuracy_per_client(scores[neighbor])
    if (attacked := (scores.split == "attacked") & ~held).any():
        accuracies["attack_success"] = accuracy_per_round(scores[attacked])
    rounds = pd.Index(sorted(scores["round"].unique()), name="round")
    return pd.DataFrame({name: values.groupby("round").mean() for name, values in accuracies.items()}, index=rounds)


def against_cost(lines: pd.DataFrame, costs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Curves by round as curves by cost since the start: bytes of all clients together, and simulated time."""
    spent = {TRAVELLED: (costs.bytes_up + costs.bytes_down).cumsum(), CLOCK: costs.clock_s}
    return {cost: lines.set_axis(np.concatenate([[0], total])[lines.index]) for cost, total in spent.items()}

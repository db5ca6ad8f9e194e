"""The page of a run: the accuracies, the plots, and what the run was made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.errors import listing
from fedsim.files import write_text
from fedsim.formats import difference, number, percent
from fedsim.reporting.accuracies import rows_tested
from fedsim.reporting.canvas import Plot
from fedsim.reporting.facts import to_yaml
from fedsim.reporting.html import LONGEST, Section, portable, render
from fedsim.reporting.metrics import (
    CLOCK,
    accuracy_per_client,
    accuracy_per_domain,
    against_cost,
    balanced_accuracy,
    calibration_error,
    curves,
    fairness,
    group_accuracies,
    macro_f1,
    tail_mean,
    tail_of,
)
from fedsim.reporting.plots import Line, Panel, plot_bars, plot_heat, plot_lines
from fedsim.reporting.remarks import message, remarks_of_page
from fedsim.reporting.tables import TUNED, ZERO_SHOT, Tables

MEASURES = {
    "generalization": "held-out domains",
    "personalization": "own test rows, mean over clients",
    "worst_tenth": "own test rows, worst tenth of the clients",
    "spread": "own test rows, standard deviation over clients",
    "personalization_own": "own test rows, only a client's own classes competing, mean over clients",
    "neighbor": "test rows of other clients, mean over clients",
    "attack_success": "attacked test rows predicted as the attack intends",
    "generalization_attack_success": "the same of held-out domains",
    "dual": "dual: harmonic mean of the last round's model on own test rows of all clients, and of the tuned models",
    "validation": "validation rows, mean over clients",
}
# Of runs whose clients train on some of the classes only; `local` is personalization_own by another name.
NEW_MEASURES = {
    "base": "base: own test rows of all clients together",
    "new": "new: rows of new classes, only these competing",
    "harmonic_2": "harmonic mean of base and new",
    "harmonic_3": "harmonic mean of local (a client's own classes), base and new",
}
# Of runs whose classes have a long tail of train rows; means over classes.
TAIL_MEASURES = {
    "head": "head: own test rows of the most frequent classes",
    "medium": "medium: of the classes between",
    "tail": "tail: of the rarest classes, with the last 5 % of train rows",
}
FAIRNESS = {
    "demographic_parity": "demographic parity difference (0: the same predictions in all groups)",
    "equalized_odds": "equalized odds difference (0: the same errors in all groups)",
}
MOST_CURVES = 28  # that look different: seven colours, four kinds of dashes
BEFORE, AFTER, AT_END = "zero-shot CLIP", "chosen round", "tuned models"


def write_page(tables: Tables, file: Path) -> None:
    """Writes the page of a run; the same tables give the same bytes."""
    config = portable(tables.experiment)
    data = config["dataset"]["name"] + (f" ({config['data_dir']})" if config["data_dir"] else "")
    held_out = ", ".join(tables.held_out) or "no domain"
    title = f"{config['method']['name']} with {config['server']['name']} on {data}, {held_out} held out"
    sections = [
        Section(
            "",
            [message(tables), remarks_of_page(tables)],
            tables=_summary(tables) | _by_group(tables) | _fairness(tables),
        ),
        _by_round(tables),
        *([_by_task(tables)] if len(tables.by_task) else []),
        _by_domain(tables),
        _by_client(tables),
        Section("Who holds what", plots=[_partition(tables)]),
        Section("What was run", tables=_facts(tables), code=to_yaml(config)),
    ]
    write_text(file, render(title, sections))


def _summary(tables: Tables) -> dict[str, pd.DataFrame]:
    means = {BEFORE: tables.summary(ZERO_SHOT), AFTER: tables.summary()}
    means |= {AT_END: tables.summary(TUNED)} if tables.tuned else {}
    tested = rows_tested(tables)
    labels = {
        key: f"{label} ({number(tested[key])} rows)" if tested.get(key) else label
        for key, label in (MEASURES | NEW_MEASURES | TAIL_MEASURES).items()
        if any(key in summary for summary in means.values())
    }
    table = pd.DataFrame(means).loc[list(labels)]
    caption = (
        f"Top-1 accuracy in percent, round {tables.chosen_round}; the difference from zero-shot CLIP in percentage "
        f"points. Unless other classes are named, {_trained_classes(tables)} compete"
    )
    if tables.class_domain and tables.new_classes:
        caption += "; local, base and new are means over the data sets"
    return {caption: _in_percent(table.rename(index=labels).rename_axis("accuracy"))}


def _by_group(tables: Tables) -> dict[str, pd.DataFrame]:
    """All rows of a kind together; each cell has zero-shot CLIP's value and that of the chosen round."""
    groups = {
        "own": ("own test rows", _trained_classes(tables)),
        "held_out": ("held-out domains", _trained_classes(tables)),
        "new": ("new classes", _competing(tables, "new", len(tables.new_classes))),
    }
    rows = {}
    for group, (name, competing) in groups.items():
        labels = [table[table.group == group] for table in (tables.zero_shot.labels, tables.chosen.labels)]
        bins = [table[table.group == group] for table in (tables.zero_shot.calibration, tables.chosen.calibration)]
        if not len(labels[1]):
            continue
        pairs = {
            "accuracy": [table.correct.sum() / table.support.sum() for table in labels],
            "balanced accuracy": [balanced_accuracy(table) for table in labels],
            "macro-F1": [macro_f1(table) for table in labels],
            "calibration error": [calibration_error(table) for table in bins],
        }
        rows[name] = {"among": competing} | {key: " → ".join(map(percent, pair)) for key, pair in pairs.items()}
    caption = f"All rows of a kind together, in percent: {BEFORE} → round {tables.chosen_round}"
    return {caption: pd.DataFrame(rows).T.rename_axis("rows")} if rows else {}


def _fairness(tables: Tables) -> dict[str, pd.DataFrame]:
    """Accuracy by group of a sensitive attribute, and the differences between groups."""
    groups = tables.facts.get("groups")
    if not groups:
        return {}
    columns = {}
    for name, evaluation in {BEFORE: tables.zero_shot, AFTER: tables.chosen}.items():
        means = fairness(evaluation.labels, groups)
        differences = {FAIRNESS[key]: means[key] for key in FAIRNESS}
        columns[name] = {**group_accuracies(evaluation.labels, groups), **differences}
    table = pd.DataFrame(columns).rename_axis("own test rows of group")
    return {"Accuracy by group, and differences between groups, in percent": _in_percent(table)}


def _trained_classes(tables: Tables) -> str:
    count = len(tables.classes) - len(tables.new_classes)
    return _competing(tables, "trained" if tables.new_classes else "", count)


def _competing(tables: Tables, kind: str, count: int) -> str:
    """`the 8 trained classes`, or in a suite those of one data set."""
    if tables.class_domain:
        return f"the {f'{kind} classes'.strip()} of the row's data set ({count} in all)"
    return f"the {count} {kind} classes" if kind else f"all {count} classes"


def _in_percent(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracies as they are shown, and the difference of those shown before and after."""
    gains = list(map(difference, table[BEFORE], table[AFTER]))
    accuracies = {name: table[name].map(percent) for name in (BEFORE, AFTER, AT_END) if name in table}
    shown = table.drop(columns=AT_END, errors="ignore").assign(difference=gains)
    return shown.assign(**accuracies)


# Sections --------------------------------------------------------------------------------------------------


def _by_round(tables: Tables) -> Section:
    costs, by_round = tables.rounds, curves(tables.trained.scores, tables.held_out)
    by_cost = against_cost(by_round, costs)
    if not by_cost[CLOCK].index.max():
        del by_cost[CLOCK]  # on an ideal fleet, time stands still
    loss = Line("training loss, mean over clients", 6, costs.set_index("round").loss)
    panels = [
        Panel("round", "accuracy (%)", _lines(tables, by_round)),
        *(Panel(cost, "accuracy (%)", _lines(tables, by) if by.index.max() else []) for cost, by in by_cost.items()),
        Panel("round", "training loss (nats)", [loss] if loss.y.notna().any() else []),
    ]
    caption = f"Dashed: zero-shot CLIP on the same rows. Large dots: the chosen round, {tables.chosen_round}."
    return Section("Round by round", plots=[plot_lines(caption, panels)])


def _lines(tables: Tables, curves: pd.DataFrame) -> list[Line]:
    zero_shot = tables.summary(ZERO_SHOT)
    dot = sorted(tables.trained.scores["round"].unique()).index(tables.chosen_round)
    return [
        Line((MEASURES | NEW_MEASURES)[key], index, 100 * curves[key], zero_shot=100 * zero_shot[key], dot=dot)
        for index, key in enumerate(curves.dropna(axis=1, how="all").columns.astype(str))
    ]


def _by_task(tables: Tables) -> Section:
    names = {number: f"task {number}" for number in range(1, tables.experiment["tasks"] + 1)} | {"seen": "all so far"}
    table = tables.by_task.rename(columns=names).map(lambda share: "" if np.isnan(share) else percent(share))
    classes = pd.DataFrame({"classes": [listing(task, LONGEST) for task in tables.facts["class_tasks"]]})
    classes.index = pd.Index(list(names.values())[:-1], name="task")
    caption = "Accuracy in percent on the own test rows of all clients together, at the end of each task"
    return Section("Task by task", tables={caption: table, "Classes of each task": classes})


def _broken_down(tables: Tables, by: str, domains: Sequence[str]) -> pd.DataFrame:
    """Rows of each split, and accuracy on test rows before and after, by domain or by client."""
    partition = tables.partition
    counts = partition[partition.domain.isin(domains) & (partition.split != "new")].pivot_table(
        index=by, columns="split", values="rows", aggfunc="sum"
    )
    splits = {"train": "train rows", "val": "validation", "test": "test"}
    table = counts.reindex(columns=list(splits)).fillna(0).astype(int).rename(columns=splits)
    accuracy = {"domain": accuracy_per_domain, "client": accuracy_per_client}[by]
    evaluations = {BEFORE: tables.zero_shot, AFTER: tables.chosen} | ({AT_END: tables.tuned} if tables.tuned else {})
    for name, scores in ((name, evaluation.scores) for name, evaluation in evaluations.items()):
        rows = scores[(scores.split == "test") & scores.domain.isin(domains)]
        table[name] = accuracy(rows).droplevel("round")
    return table


def _by_domain(tables: Tables) -> Section:
    table = _broken_down(tables, "domain", tables.domains)
    names, held = table.index, table.index.isin(tables.held_out)
    table.index = (table.index + np.where(held, " (held out)", "")).rename("domain")
    kinds = {"trained on": ~held, "held out": held}
    caption = f"Accuracy by domain: zero-shot CLIP, and round {tables.chosen_round}."
    plot = plot_bars(caption, "domain", *(100 * table[name].set_axis(names) for name in (BEFORE, AFTER)), kinds)
    caption = "Rows by domain, and accuracy in percent on its test rows"
    return Section("By domain", plots=[plot, *_domain_curves(tables)], tables={caption: _in_percent(table)})


def _domain_curves(tables: Tables) -> list[Plot]:
    if not tables.last_round or len(tables.domains) > MOST_CURVES:
        return []
    rows = tables.trained.scores[tables.trained.scores.split == "test"]
    by_round = 100 * accuracy_per_domain(rows).unstack("domain")
    dot = list(by_round.index).index(tables.chosen_round)
    lines = [Line(str(name), place, by_round[name], dot=dot) for place, name in enumerate(by_round)]
    caption = f"The same by round. Large dots: the chosen round, {tables.chosen_round}."
    return [plot_lines(caption, [Panel("round", "accuracy on test rows (%)", lines)])]


def _by_client(tables: Tables) -> Section:
    trained = [name for name in tables.domains if name not in tables.held_out]
    table = _broken_down(tables, "client", trained).sort_values(AFTER, kind="stable")
    domains = tables.partition.groupby("client").domain.agg(lambda names: listing(names.unique(), 3))
    shown = _in_percent(table[:LONGEST]).assign(domains=domains)
    caption = "Rows by client, and accuracy in percent on its own test rows: "
    section = {f"{caption}{len(shown)} of {len(table)} clients, lowest first": shown}
    table = table.dropna(subset=AFTER)
    if table.empty:
        return Section("By client", ["No client has test rows of its own."], tables=section)
    worst = tail_of(len(table))
    tail = np.arange(len(table)) < worst
    caption = (
        f"Accuracy by client on its own test rows, round {tables.chosen_round}. "
        f"Worst tenth: {worst} of {len(table)} clients, mean {percent(tail_mean(table[AFTER]))}%."
    )
    kinds = {"all other clients": ~tail, "worst tenth": tail}
    plot = plot_bars(caption, "client, lowest accuracy first", 100 * table[BEFORE], 100 * table[AFTER], kinds)
    return Section("By client", plots=[plot], tables=section)


def _partition(tables: Tables) -> Plot:
    train = tables.partition[tables.partition.split == "train"].rename(columns={"label": "class"})
    domains, classes = (
        train.pivot_table(index=by, columns="client", values="rows", aggfunc="sum", fill_value=0)
        for by in ("domain", "class")
    )
    classes = classes.reindex(pd.Index(tables.classes, name="class"), fill_value=0)
    grouped = domains.columns[np.lexsort((-domains.sum(), domains.to_numpy().argmax(axis=0)))]
    caption = "Train rows of each client, by domain and by class; clients are grouped by the domain of most rows."
    return plot_heat(caption, "client", [domains[grouped], classes[grouped]])


def _facts(tables: Tables) -> dict[str, pd.DataFrame]:
    costs, facts = tables.rounds, portable(tables.facts)
    versions, skipped = facts.pop("versions", {}), facts.pop("skipped", [])
    # In the teraflops below, in `remarks`, and in which measures there are.
    elsewhere = {
        "flops_per_step",
        "flops_per_row",
        "flops_of_devices",
        "unseen_test",
        "personal",
        "class_tasks",
        "groups",
    }
    facts = {name.replace("_", " "): _fact(value) for name, value in facts.items() if name not in elsewhere}
    if malicious := facts.pop("malicious", []):
        facts["malicious clients"] = f"{len(malicious)}: {listing(malicious)}"
    train = tables.partition[tables.partition.split == "train"]
    facts |= {
        "domains": f"{len(tables.domains)}: {listing(tables.domains)}",
        "held-out domains": listing(tables.held_out) or "none",
        "classes": f"{len(tables.classes)}: {listing(tables.classes)}",
        "training clients whose rows were evaluated": number(train.client.nunique()),
        "megabytes up, all rounds": number(costs.bytes_up.sum() / 1e6),
        "megabytes down, all rounds": number(costs.bytes_down.sum() / 1e6),
        "local steps, all clients and rounds": number(int(costs.steps.sum())),
        "seconds of training": number(costs.seconds.sum()),
        "simulated seconds of training": number(costs.clock_s.max() if len(costs) else 0.0),
    }
    if costs.flops.notna().any():
        facts["teraflops of training, all rounds"] = number(costs.flops.sum() / 1e12)
    if tables.new_classes:
        facts["new classes"] = f"{len(tables.new_classes)}: {listing(tables.new_classes)}"
    shown = {
        "Data and cost": pd.DataFrame({"value": pd.Series(facts, dtype=object)}),
        "Versions": pd.DataFrame({"version": pd.Series(versions, dtype=object)}),
    }
    if skipped:
        images = pd.Index(skipped[:LONGEST], name="image")
        shown[f"Unreadable images that were left out, {len(skipped)} in all"] = pd.DataFrame(index=images)
    return shown


def _fact(value: Any) -> Any:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

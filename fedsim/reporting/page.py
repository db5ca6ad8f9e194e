"""One self-contained HTML page per run: the numbers, the plots, and all that the run was made of.

A page is data, sections of words, plots and tables; `page.html.j2` is the only place that knows HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.errors import listing
from fedsim.files import write_text
from fedsim.formats import difference, number, percent
from fedsim.reporting.plots import Line, Panel, Plot, plot_bars, plot_heat, plot_lines
from fedsim.reporting.report import (
    Report,
    accuracy_per_client,
    accuracy_per_domain,
    calibration_error,
    macro_f1,
    tail_mean,
    tail_of,
    to_yaml,
)

LONGEST = 1000  # rows of a table: a page of 10 000 clients would otherwise be over a megabyte
MEASURES = {
    "generalization": "held-out domains",
    "personalization": "own test rows, mean over clients",
    "worst_tenth": "own test rows, worst tenth of the clients",
    "spread": "own test rows, standard deviation over clients",
    "personalization_own": "own test rows, only a client's own classes competing, mean over clients",
    "validation": "validation rows, mean over clients",
}
# Of runs whose clients train on some of the classes only; `local` is personalization_own by another name.
NEW_MEASURES = {
    "base": "base: own test rows of all clients together",
    "new": "new: rows of new classes, only these competing",
    "harmonic_2": "harmonic mean of base and new",
    "harmonic_3": "harmonic mean of local (a client's own classes), base and new",
}
BEFORE, AFTER = "zero-shot CLIP", "chosen round"
TRAVELLED = "bytes up and down since the start"
CLOCK = "simulated seconds since the start"
NEVER = "Test rows never choose; test curves are here to be looked at, not to choose a round from."


@dataclass(frozen=True)
class Section:
    """What is said under one heading; tables by caption, their cells as they are shown."""

    heading: str
    words: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    code: str = ""


def write_page(report: Report, file: Path) -> None:
    """The page of a run; the same report gives the same bytes."""
    shown = portable(report.experiment)
    data = shown["dataset"]["name"] + (f" ({shown['data_dir']})" if shown["data_dir"] else "")
    held_out = ", ".join(report.held_out) or "no domain"
    title = f"{shown['method']['name']} with {shown['server']['name']} on {data}, {held_out} held out"
    sections = [
        Section("", _how_chosen(report), tables=_summary(report)),
        _by_round(report),
        _by_domain(report),
        _by_client(report),
        Section("Who holds what", plots=[_partition(report)]),
        Section("What was run", tables=_facts(report), code=to_yaml(shown)),
    ]
    write_text(file, render(title, sections))


def render(title: str, sections: Sequence[Section]) -> str:
    """The HTML of a page, which loads nothing from anywhere."""
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, keep_trailing_newline=True)
    return pages.get_template("page.html.j2").render(title=title, sections=sections)


def curves(scores: pd.DataFrame, held_out: Sequence[str]) -> pd.DataFrame:
    """The means of `summarize` by round, but the worst tenth: nan where a round has no such rows."""
    away = scores.domain.isin(held_out)
    test, val = scores.split == "test", scores.split == "val"
    accuracies = {
        "personalization": accuracy_per_client(scores[test & ~away]),
        "generalization": accuracy_per_domain(scores[test & away]),
        "validation": accuracy_per_client(scores[val]),
    }
    if (new := scores.split == "new").any():
        accuracies["new"] = accuracy_per_client(scores[new])
    rounds = pd.Index(sorted(scores["round"].unique()), name="round")
    return pd.DataFrame({name: values.groupby("round").mean() for name, values in accuracies.items()}, index=rounds)


def over(lines: pd.DataFrame, costs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The same curves by what was spent since the start: bytes of all clients together, and simulated time."""
    spent = {TRAVELLED: (costs.bytes_up + costs.bytes_down).cumsum(), CLOCK: costs.clock_s}
    return {what: lines.set_axis(np.concatenate([[0], total])[lines.index]) for what, total in spent.items()}


def portable(value: Any) -> Any:
    """The same without the machine in it: of a file's or folder's absolute path, its name."""
    if isinstance(value, dict):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [portable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _written(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracies before and after as they are shown, and the difference of what is shown."""
    accuracies = {name: table[name].map(percent) for name in (BEFORE, AFTER)}
    return table.assign(**accuracies, difference=list(map(difference, table[BEFORE], table[AFTER])))


# Sections --------------------------------------------------------------------------------------------------


def remarks(report: Report) -> list[str]:
    """What a reader must know before the numbers: how the round was chosen, and what was not trained or evaluated."""
    chosen, last, means = report.chosen_round, report.last_round, report.summary()
    if last == 0:
        said = ["No round was run: the numbers are those of the parameters that training would start from."]
    elif np.isnan(means["validation"]):
        said = [f"Round {chosen} is reported because it is the last: no client has validation rows."]
    else:
        said = [f"Round {chosen} of {last} is reported: the first of the best mean accuracy on validation rows."]
    if last and report.facts.get("trained_parameters") and not report.round_table().steps.sum():
        said.insert(0, "No client took a local step in any round: the numbers are those of untrained parameters.")
    if np.isnan(means["personalization"]):
        said.append("No client has test rows of its own.")
    elif report.facts.get("unseen_test"):
        said.append(
            "Test rows show concepts that no training or validation row shows, in any domain, so test accuracy is "
            "expected to be lower than validation accuracy."
        )
    return said + [f"No client trains on a class of held-out domain {name}." for name in _foreign(report)]


def _foreign(report: Report) -> list[str]:
    """Held-out domains without a class that a client trains on; none where only some clients' rows are known."""
    held = report.holding_table()
    trained = set(held.label[held.split == "train"])
    known = [] if report.experiment.get("eval_clients") else report.held_out
    return [name for name in known if trained.isdisjoint(held.label[(held.domain == name) & (held.split == "test")])]


def rows_tested(report: Report) -> dict[str, int]:
    """Test rows of an accuracy, by the names of `summarize`; a row that several models are tested on counts once."""
    table = report.zero_shot_table()
    table = table[table.split == "test"]
    away = table.domain.isin(report.held_out)
    return {"generalization": int(table.total[away].sum()), "personalization": int(table.total[~away].sum())}


def _how_chosen(report: Report) -> list[str]:
    how = " ".join([*remarks(report), *[NEVER] * bool(report.last_round)])
    scores = report.score_table()
    new = report.new_classes
    judges = scores[scores.domain.isin(report.held_out) | (scores.split == "new")].client.nunique()
    if judges > len(report.held_out) + bool(new):
        what = "accuracy on held-out domains and new classes" if new else "held-out accuracy"
        how += f" Each of {judges} clients has a model of its own: {what} is the mean over their models."
    if new:
        how += (
            f" Nobody trains on the {len(new)} new classes, the last in alphabetical order: rows of theirs in held-out "
            "domains judge nothing."
        )
    if skipped := report.facts.get("skipped"):
        how += f" Unreadable images that were left out: {len(skipped)}, listed at the end."
    return [how]


def _summary(report: Report) -> dict[str, pd.DataFrame]:
    before, after = report.zero_shot_summary(), report.summary()
    counts = rows_tested(report)
    shown = {
        key: f"{words} ({number(counts[key])} rows)" if counts.get(key) else words
        for key, words in (MEASURES | NEW_MEASURES).items()
        if key in after
    }
    table = pd.DataFrame({BEFORE: before, AFTER: after}).loc[list(shown)]
    caption = (
        f"Top-1 accuracy in percent, round {report.chosen_round}; the difference of the two in percentage points. "
        f"Where no other classes are named, {_trained(report)} compete"
    )
    return {caption: _written(table.rename(index=shown).rename_axis("accuracy"))} | _by_group(report)


def _by_group(report: Report) -> dict[str, pd.DataFrame]:
    """All rows of a kind together, whoever's they are: each cell is zero-shot CLIP's, and the chosen round's."""
    spaces = {
        "own": ("own test rows", _trained(report)),
        "held_out": ("held-out domains", _trained(report)),
        "new": ("new classes", f"the {len(report.new_classes)} new classes"),
    }
    before = report.zero_shot_label_table(), report.zero_shot_calibration_table()
    after = [
        table[table["round"] == report.chosen_round] for table in (report.label_table(), report.calibration_table())
    ]
    shown = {}
    for group, (name, space) in spaces.items():
        sides = [[table[table.group == group] for table in tables] for tables in (before, after)]
        if not len(sides[1][0]):
            continue
        found = {
            "accuracy": [labels.correct.sum() / labels.support.sum() for labels, _ in sides],
            "macro-F1": [macro_f1(labels) for labels, _ in sides],
            "calibration error": [calibration_error(bins) for _, bins in sides],
        }
        shown[name] = {"among": space} | {what: " → ".join(map(percent, pair)) for what, pair in found.items()}
    caption = f"All rows of a kind together, in percent: {BEFORE} → round {report.chosen_round}"
    return {caption: pd.DataFrame(shown).T.rename_axis("rows")} if shown else {}


def _trained(report: Report) -> str:
    count = len(report.classes) - len(report.new_classes)
    return f"the {count} trained classes" if report.new_classes else f"all {count} classes"


def _by_round(report: Report) -> Section:
    costs, lines = report.round_table(), curves(report.score_table(), report.held_out)
    spent = {what: _lines(report, some) if some.index.max() else [] for what, some in over(lines, costs).items()}
    if not spent[CLOCK]:
        del spent[CLOCK]  # on an ideal fleet, time stands still
    loss = Line("training loss, mean over clients", 6, costs.set_index("round").loss)
    panels = [
        Panel("round", "accuracy (%)", _lines(report, lines)),
        *(Panel(what, "accuracy (%)", some) for what, some in spent.items()),
        Panel("round", "training loss (nats)", [loss] if loss.y.notna().any() else []),
    ]
    caption = f"Dashed: zero-shot CLIP on the same rows. Large dots: the chosen round, {report.chosen_round}."
    return Section("Round by round", plots=[plot_lines(caption, panels)])


def _lines(report: Report, lines: pd.DataFrame) -> list[Line]:
    zero, dot = report.zero_shot_summary(), list(report.parts).index(report.chosen_round)
    return [
        Line((MEASURES | NEW_MEASURES)[key], place, 100 * lines[key], zero_shot=100 * zero[key], dot=dot)
        for place, key in enumerate(lines.dropna(axis=1, how="all").columns.astype(str))
    ]


def _broken_down(report: Report, by: str, domains: Sequence[str]) -> pd.DataFrame:
    """Rows of each split, and accuracy on test rows before and after, by domain or by client."""
    held, scores = report.holding_table(), report.score_table()
    held = held[held.domain.isin(domains) & (held.split != "new")].pivot_table(
        index=by, columns="split", values="rows", aggfunc="sum"
    )
    splits = {"train": "train rows", "val": "validation", "test": "test"}
    table = held.reindex(columns=list(splits)).fillna(0).astype(int).rename(columns=splits)
    accuracy = {"domain": accuracy_per_domain, "client": accuracy_per_client}[by]
    judged = {BEFORE: report.zero_shot_table(), AFTER: scores[scores["round"] == report.chosen_round]}
    for name, rows in judged.items():
        table[name] = accuracy(rows[(rows.split == "test") & rows.domain.isin(domains)]).droplevel("round")
    return table


def _by_domain(report: Report) -> Section:
    table = _broken_down(report, "domain", report.domains)
    away = table.index.isin(report.held_out)
    table.index = (table.index + np.where(away, " (held out)", "")).rename("domain")
    kinds = {"trained on": ~away, "held out": away}
    caption = f"Accuracy by domain: zero-shot CLIP, and round {report.chosen_round}."
    plot = plot_bars(caption, "domain", 100 * table[BEFORE], 100 * table[AFTER], kinds)
    tables = {"Rows by domain, and accuracy in percent on its test rows": _written(table)}
    return Section("By domain", plots=[plot], tables=tables)


def _by_client(report: Report) -> Section:
    own = [name for name in report.domains if name not in report.held_out]
    table = _broken_down(report, "client", own).sort_values(AFTER, kind="stable")
    domains = report.holding_table().groupby("client").domain.agg(lambda held: listing(held.unique(), 3))
    shown = _written(table[:LONGEST]).assign(domains=domains)
    caption = "Rows by client, and accuracy in percent on its own test rows: "
    tables = {f"{caption}{len(shown)} of {len(table)} clients, lowest first": shown}
    table = table.dropna(subset=AFTER)
    if table.empty:
        return Section("By client", ["No client has test rows of its own."], tables=tables)
    worst = tail_of(len(table))
    tail = np.arange(len(table)) < worst
    caption = (
        f"Accuracy by client on its own test rows, round {report.chosen_round}. "
        f"Worst tenth: {worst} of {len(table)} clients, mean {percent(tail_mean(table[AFTER]))}%."
    )
    kinds = {"all other clients": ~tail, "worst tenth": tail}
    plot = plot_bars(caption, "client, lowest accuracy first", 100 * table[BEFORE], 100 * table[AFTER], kinds)
    return Section("By client", plots=[plot], tables=tables)


def _partition(report: Report) -> Plot:
    held = report.holding_table().query("split == 'train'").rename(columns={"label": "class"})
    domains, classes = (
        held.pivot_table(index=by, columns="client", values="rows", aggfunc="sum", fill_value=0)
        for by in ("domain", "class")
    )
    classes = classes.reindex(pd.Index(report.classes, name="class"), fill_value=0)
    grouped = domains.columns[np.lexsort((-domains.sum(), domains.to_numpy().argmax(axis=0)))]
    caption = "Train rows of each client, by domain and by class; clients are grouped by the domain of most rows."
    return plot_heat(caption, "client", [domains[grouped], classes[grouped]])


def _facts(report: Report) -> dict[str, pd.DataFrame]:
    costs, facts = report.round_table(), portable(report.facts)
    versions, skipped = facts.pop("versions", {}), facts.pop("skipped", [])
    told = {"flops_per_step", "flops_per_row", "unseen_test"}  # by the teraflops below, and by `remarks`
    facts = {name.replace("_", " "): _fact(value) for name, value in facts.items() if name not in told}
    facts |= {
        "domains": f"{len(report.domains)}: {listing(report.domains)}",
        "held-out domains": listing(report.held_out) or "none",
        "classes": f"{len(report.classes)}: {listing(report.classes)}",
        "training clients whose rows were judged": number(
            report.holding_table().query("split == 'train'").client.nunique()
        ),
        "megabytes up, all rounds": number(costs.bytes_up.sum() / 1e6),
        "megabytes down, all rounds": number(costs.bytes_down.sum() / 1e6),
        "local steps, all clients and rounds": number(int(costs.steps.sum())),
        "seconds of training": number(costs.seconds.sum()),
        "simulated seconds of training": number(costs.clock_s.max() if len(costs) else 0.0),
    }
    if costs.flops.notna().any():
        facts["teraflops of training, all rounds"] = number(costs.flops.sum() / 1e12)
    if report.new_classes:
        facts["new classes"] = f"{len(report.new_classes)}: {listing(report.new_classes)}"
    tables = {
        "Data and cost": pd.DataFrame({"value": pd.Series(facts, dtype=object)}),
        "Versions": pd.DataFrame({"version": pd.Series(versions, dtype=object)}),
    }
    if skipped:
        images = pd.Index(skipped[:LONGEST], name="image")
        tables[f"Unreadable images that were left out, {len(skipped)} in all"] = pd.DataFrame(index=images)
    return tables


def _fact(value: Any) -> Any:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

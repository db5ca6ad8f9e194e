"""One self-contained HTML page per run: the numbers, the plots, and all that the run was made of.

A page is data, sections of words, plots and tables; `page.html.j2` is the only place that knows HTML.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsim.errors import listing
from fedsim.report import Report, accuracy_per_client, accuracy_per_domain, tail_mean, to_yaml, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
GREY = "#767676"
TAIL = PALETTE[4]
# What a line shows: its column in `curves`, colour and name.
SHOWN = {
    "personalization": (PALETTE[0], "own test rows, mean over clients"),
    "generalization": (PALETTE[1], "held-out domain"),
    "validation": (PALETTE[2], "validation rows, mean over clients"),
}
FOLD = 20  # rows of a table that are shown without being asked for
LONGEST = 1000  # rows of a table: a page of 10 000 clients would otherwise be over a megabyte
BARS = 40  # clients that get a bar each
DOTS = 600  # of half a kilobyte each


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]  # the first cell of a row is its heading
    folded: bool = False
    text: bool = False  # words, not numbers


@dataclass(frozen=True)
class Plot:
    caption: str
    alt: str
    svg: Any  # markupsafe.Markup
    wide: bool = False


@dataclass(frozen=True)
class Section:
    heading: str
    words: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    code: str = ""


def write_page(report: Report, file: Path) -> None:
    """The page of a run; the same report gives the same bytes."""
    write_text(file, render(title_of(report.experiment), sections_of(report)))


def render(title: str, sections: Sequence[Section]) -> str:
    """The HTML of a page, which loads nothing from anywhere."""
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, keep_trailing_newline=True)
    return pages.get_template("page.html.j2").render(title=title, sections=sections)


def title_of(experiment: dict[str, Any]) -> str:
    held_out = ", ".join(experiment["held_out"])
    away = f"{held_out} held out" if held_out else "no domain held out"
    return f"{experiment['method']['name']} with {experiment['server']['name']} on {_data_of(experiment)}, {away}"


def sections_of(report: Report) -> list[Section]:
    """What the page of a run says, top to bottom."""
    lines = curves(report.score_table(), report.held_out)
    return [
        Section("", _how_chosen(report), tables=[_summary(report)]),
        Section("Round by round", *_by_round(report, lines)),
        Section("By domain", plots=[_domains(report)], tables=[_domain_table(report)]),
        Section("By client", *_by_client(report), tables=[_client_table(report)]),
        Section("Who holds what", plots=[_partition(report)]),
        Section("What was run", tables=_facts(report), code=to_yaml(portable(report.experiment))),
    ]


# Means and how they are written ----------------------------------------------------------------------------


def curves(scores: pd.DataFrame, held_out: Sequence[str]) -> pd.DataFrame:
    """The means of `summarize` by round, but the worst tenth: nan where a round has no such rows."""
    away = scores.domain.isin(held_out)
    test, val = scores.split == "test", scores.split == "val"
    accuracies = {
        "personalization": accuracy_per_client(scores[test & ~away]),
        "generalization": accuracy_per_domain(scores[test & away]),
        "validation": accuracy_per_client(scores[val]),
    }
    rounds = pd.Index(sorted(scores["round"].unique()), name="round")
    return pd.DataFrame({name: values.groupby("round").mean() for name, values in accuracies.items()}, index=rounds)


def percent(accuracy: float) -> str:
    """An accuracy in [0, 1] as percent with one decimal; nan as a dash."""
    return "-" if np.isnan(accuracy) else f"{100 * accuracy:.1f}"


def points(difference: float) -> str:
    """A difference of accuracies in percentage points, always with its sign; nan as a dash."""
    return "-" if np.isnan(difference) else f"{round(100 * difference, 1) + 0.0:+.1f}"


def unit_of(most: float) -> tuple[float, str]:
    """The unit in which a number of bytes reads well, and how many bytes it has."""
    units = (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")
    return next((pair for pair in units if most >= pair[0]), (1.0, "B"))


def size(count: float) -> str:
    """Bytes for people: three digits and a unit."""
    scale, unit = unit_of(count)
    value = count / scale
    return f"{value:.{0 if scale == 1 else max(0, 3 - len(str(int(value))))}f} {unit}"


def short(name: str, most: int = 28) -> str:
    """A name that fits beside a plot."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def portable(value: Any) -> Any:
    """The same without the machine in it: of a file's or folder's absolute path, its name."""
    if isinstance(value, dict):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [portable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _data_of(experiment: dict[str, Any]) -> str:
    folder = portable(experiment["data_dir"])
    return experiment["dataset"]["name"] + (f" ({folder})" if folder else "")


# Sections --------------------------------------------------------------------------------------------------


def _how_chosen(report: Report) -> list[str]:
    chosen, last = report.chosen_round, report.last_round
    if last == 0:
        how = "No round was run: the numbers below are those of the parameters that training would start from."
    elif np.isnan(report.summary()["validation"]):
        how = (
            f"Round {chosen} is reported because it is the last: no client has validation rows to choose a round with. "
            "Test rows never choose; test curves are here to be looked at, not to choose a round from."
        )
    else:
        how = (
            f"Round {chosen} of {last} is reported: the first of the best mean validation accuracy over clients. "
            "Test rows never choose; test curves are here to be looked at, not to choose a round from."
        )
    scores = report.score_table()
    judges = scores[scores.domain.isin(report.held_out)].client.nunique()
    if judges > len(report.held_out):
        how += f" Each of {judges} clients has a model of its own: held-out accuracy is the mean over their models."
    skipped = report.facts.get("skipped") or []
    images = f"{len(skipped)} unreadable image{'s were' if len(skipped) > 1 else ' was'} left out, listed at the end."
    return [how, *([images] if skipped else [])]


def _summary(report: Report) -> Table:
    before, after = report.zero_shot_summary(), report.summary()
    held_out = listing(report.held_out)
    rows = {
        "generalization": f"generalization: held-out domain {held_out}"
        if held_out
        else "generalization: none held out",
        "personalization": "personalization: own test rows, mean over clients",
        "worst_tenth": "worst tenth of the clients on their own test rows",
        "validation": "validation rows, mean over clients",
    }
    return Table(
        f"Top-1 accuracy in percent, round {report.chosen_round}; the difference in percentage points",
        ("accuracy", "zero-shot CLIP", _model(report), "difference"),
        [
            (name, percent(before[key]), percent(after[key]), points(after[key] - before[key]))
            for key, name in rows.items()
        ],
    )


def _model(report: Report) -> str:
    return f"{report.experiment['method']['name']}, {report.experiment['server']['name']}"


def _by_round(report: Report, lines: pd.DataFrame) -> tuple[list[str], list[Plot]]:
    """Words in place of those plots that would be empty, and the others."""
    if report.last_round == 0:
        return ["No round was run, so there is nothing to show by round."], []
    costs = report.round_table()
    words, plots = [], [_rounds(report, lines)]
    if (costs.bytes_up + costs.bytes_down).sum():
        plots.append(_bytes(report, lines, costs))
    else:
        words.append("Nothing travels between clients and server, so there is no accuracy against bytes.")
    if costs.loss.notna().any():
        plots.append(_loss(costs))
    else:
        words.append("Nothing is trained, so there is no training loss.")
    return words, plots


def _domain_table(report: Report) -> Table:
    held = report.holding_table().pivot_table(index="domain", columns="split", values="rows", aggfunc="sum")
    held = held.reindex(index=report.domains, columns=["train", "val", "test"]).fillna(0).astype(int)
    before, after = _domain_accuracies(report)
    rows = []
    for domain in report.domains:
        accuracies = before.get(domain, np.nan), after.get(domain, np.nan)
        name = f"{domain} (held out)" if domain in report.held_out else domain
        rows.append((name, *_numbers(held.loc[domain], *accuracies)))
    return _folding("Rows by domain, and accuracy in percent on its test rows", "domain", rows)


def _by_client(report: Report) -> tuple[list[str], list[Plot]]:
    if _client_accuracies(report)[1].empty:
        return ["No client has test rows of its own."], []
    return [], [_clients(report)]


def _client_table(report: Report) -> Table:
    table = report.holding_table()
    held = table.pivot_table(index="client", columns="split", values="rows", aggfunc="sum")
    held = held.reindex(columns=["train", "val", "test"]).fillna(0).astype(int)
    held = held[held.train > 0]
    homes = _homes(report)
    before, after = _client_accuracies(report)
    caption = "Rows by client, and accuracy in percent on its own test rows"
    order = list(held.index)
    if len(order) > LONGEST:
        order = sorted(after.sort_values(kind="stable").index[:LONGEST])
        caption += f"; the lowest {LONGEST} of {len(held)} clients, all of them in scores.parquet"
    rows = [
        (str(c), *_numbers(held.loc[c], before.get(c, np.nan), after.get(c, np.nan)), listing(homes[c], 3))
        for c in order
    ]
    return _folding(caption, "client", rows, "domains, most rows first")


def _homes(report: Report) -> dict[int, list[str]]:
    """Each client's domains, most rows first."""
    held = report.holding_table().groupby(["client", "domain"]).rows.sum().sort_values(ascending=False, kind="stable")
    return {client: [domain for _, domain in group.index] for client, group in held.groupby("client", sort=False)}


def _numbers(held: pd.Series, before: float, after: float) -> list[str]:
    return [*(str(count) for count in held), percent(before), percent(after), points(after - before)]


def _folding(caption: str, of: str, rows: list[tuple[str, ...]], *more: str) -> Table:
    head = of, "train rows", "validation", "test", "zero-shot CLIP", "chosen round", "difference", *more
    return Table(caption, head, rows, folded=len(rows) > FOLD)


def _facts(report: Report) -> list[Table]:
    costs, clients = report.round_table(), np.unique(report.holdings[report.holdings[:, 3] == 0, 0])
    known = {
        "domains": f"{len(report.domains)}: {listing(report.domains)}",
        "held-out domains": listing(report.held_out) or "none",
        "classes": f"{len(report.classes)}: {listing(report.classes)}",
        "training clients": len(clients),
        "rounds": len(costs),
        "bytes up, all rounds": size(costs.bytes_up.sum()),
        "bytes down, all rounds": size(costs.bytes_down.sum()),
        "seconds of training": f"{costs.seconds.sum():.1f}",
    }
    told = portable({name: fact for name, fact in report.facts.items() if name not in ("versions", "skipped")})
    skipped = portable(report.facts.get("skipped") or [])
    tables = [Table("Data and cost", ("", "value"), [(n, str(v)) for n, v in (told | known).items()], text=True)]
    versions = [(name, str(number)) for name, number in report.facts.get("versions", {}).items()]
    tables.append(Table("Versions", ("", "version"), versions, text=True))
    if skipped:
        caption = "Unreadable images that were left out" + (
            f"; the first {LONGEST} of {len(skipped)}" if len(skipped) > LONGEST else ""
        )
        rows = [(name,) for name in skipped[:LONGEST]]
        tables.append(Table(caption, ("image",), rows, folded=len(rows) > FOLD, text=True))
    return tables


def _domain_accuracies(report: Report) -> tuple[pd.Series, pd.Series]:
    """Accuracy by domain on test rows: zero-shot CLIP, and the chosen round."""
    return tuple(accuracy_per_domain(table[table.split == "test"]).droplevel("round") for table in _judged(report))


def _client_accuracies(report: Report) -> tuple[pd.Series, pd.Series]:
    """Accuracy by client on its own test rows: zero-shot CLIP, and the chosen round."""
    return tuple(
        accuracy_per_client(table[(table.split == "test") & ~table.domain.isin(report.held_out)]).droplevel("round")
        for table in _judged(report)
    )


def _judged(report: Report) -> tuple[pd.DataFrame, pd.DataFrame]:
    scores = report.score_table()
    return report.zero_shot_table(), scores[scores["round"] == report.chosen_round]


# Plots -----------------------------------------------------------------------------------------------------


def draw(
    name: str,
    caption: str,
    alt: str,
    paint: Callable[["Figure"], None],
    inches: tuple[float, float] = (5.8, 3.9),
    wide: bool = False,
) -> Plot:
    """A plot as inline SVG, the same bytes each time.

    Args:
        name: sets the ids of this plot apart from those of the others on the page.
        paint: fills an empty figure.
    """
    # Here, since matplotlib takes longer to import than all of fedsim's own files, and actors draw nothing.
    from markupsafe import Markup
    from matplotlib import style
    from matplotlib.figure import Figure

    looks = {
        "svg.hashsalt": "fedsim",
        "svg.fonttype": "none",  # text stays text: a tenth of the bytes, and it can be searched
        "font.sans-serif": ["DejaVu Sans"],
        "text.parse_math": False,  # a class may be called "a$b$"
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
    }
    # For as long as it draws: rcParams are the only way to matplotlib's salt, and a user's own must not count.
    with style.context(["default", looks]):
        figure = Figure(figsize=inches, layout="constrained")
        paint(figure)
        text = StringIO()
        figure.savefig(text, format="svg", dpi=150, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(' id="', f' id="{name}-')
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return Plot(caption, alt, Markup(svg), wide)


def legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], columns: int = 2) -> None:
    """Above the plot, where it covers nothing."""
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize="small")


def whole_ticks(axes: "Axes") -> None:
    """No round 2.5."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def _rounds(report: Report, lines: pd.DataFrame) -> Plot:
    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot(xlabel="round", ylabel="accuracy (%)")
        _accuracies(report, lines, figure, axes, np.asarray(lines.index))
        whole_ticks(axes)

    chosen = report.chosen_round
    caption = f"Accuracy by round. Dashed: zero-shot CLIP on the same rows. Dotted: the chosen round, {chosen}."
    return draw("rounds", caption, _ends("Accuracy by round", lines), paint)


def _bytes(report: Report, lines: pd.DataFrame, costs: pd.DataFrame) -> Plot:
    travelled = np.concatenate([[0], (costs.bytes_up + costs.bytes_down).cumsum()])
    scale, unit = unit_of(travelled[-1])

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot(xlabel=f"bytes up and down since the start ({unit})", ylabel="accuracy (%)")
        _accuracies(report, lines, figure, axes, travelled / scale)

    caption = "Accuracy against all bytes that travelled so far, up and down, of all clients together."
    return draw("bytes", caption, f"{_ends('Accuracy against bytes', lines)}; {size(travelled[-1])} in all", paint)


def _accuracies(report: Report, lines: pd.DataFrame, figure: "Figure", axes: "Axes", x: np.ndarray) -> None:
    """The three means against x, zero-shot CLIP dashed, the chosen round dotted."""
    zero, handles, labels = report.zero_shot_summary(), [], []
    marker = "o" if len(x) <= 12 else None
    for key, (colour, name) in SHOWN.items():
        if lines[key].notna().any():
            handles += axes.plot(x, 100 * lines[key], color=colour, marker=marker, markersize=3)
            labels.append(short(f"{name}: {', '.join(report.held_out)}", 44) if key == "generalization" else name)
            axes.axhline(100 * zero[key], color=colour, linestyle="--", linewidth=1)
    at = x[list(lines.index).index(report.chosen_round)]
    chosen = axes.axvline(at, color="black", linestyle=":", linewidth=1.2)
    dashed = axes.plot([], [], color=GREY, linestyle="--", linewidth=1)
    legend(figure, [*handles, *dashed, chosen], [*labels, "zero-shot CLIP", f"chosen round: {report.chosen_round}"])


def _ends(what: str, lines: pd.DataFrame) -> str:
    """For those who hear the page: where each line starts and ends."""
    ends = [
        f"{key} from {percent(lines[key].iloc[0])} to {percent(lines[key].iloc[-1])} percent"
        for key in SHOWN
        if lines[key].notna().all()
    ]
    return f"{what}: {', '.join(ends)}"


def _loss(costs: pd.DataFrame) -> Plot:
    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot(xlabel="round", ylabel="training loss (nats)")
        axes.plot(costs["round"], costs.loss, color=PALETTE[0], marker="o" if len(costs) <= 12 else None, markersize=3)
        whole_ticks(axes)

    known = costs.loss.dropna()
    alt = f"Training loss by round: from {known.iloc[0]:.3f} to {known.iloc[-1]:.3f} nats"
    return draw("loss", "Training loss by round, mean over the clients that trained.", alt, paint)


def _domains(report: Report) -> Plot:
    before, after = (table.reindex(report.domains) for table in _domain_accuracies(report))
    count = len(report.domains)
    names = [f"{short(name)}\n(held out)" if name in report.held_out else short(name) for name in report.domains]

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot(xlabel="accuracy on test rows (%)", xlim=(0, 100))
        y = np.arange(count)
        away = [name in report.held_out for name in report.domains]
        # Drawn from above, as they are read: zero-shot first.
        first = axes.barh(y - 0.2, 100 * before.fillna(0), 0.38, color="#b8b8b8")
        colours = [SHOWN["generalization" if out else "personalization"][0] for out in away]
        second = axes.barh(y + 0.2, 100 * after.fillna(0), 0.38, color=colours)
        for bars, values in ((first, before), (second, after)):
            axes.bar_label(bars, [percent(value) for value in values], padding=3, fontsize="small")
        axes.set_yticks(y, names)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        shown = [(second[away.index(out)], label) for out, label in _SIDES if out in away]
        handles, labels = zip((first[0], "zero-shot CLIP"), *shown, strict=True)
        legend(figure, handles, labels, 3)

    told = ", ".join(f"{n} {percent(before[n])} to {percent(after[n])}" for n in report.domains[:12])
    caption = f"Accuracy by domain: zero-shot CLIP, and round {report.chosen_round}."
    return draw(
        "domains", caption, f"Accuracy by domain in percent: {told}", paint, (11.6, 1.4 + 0.6 * count), wide=True
    )


_SIDES = (False, "chosen round, trained on"), (True, "chosen round, held out")


def _clients(report: Report) -> Plot:
    before, after = _client_accuracies(report)
    after = after.sort_values(kind="stable")
    worst = max(1, int(0.1 * len(after)))  # as `tail_mean` has it
    home = {client: domains[0] for client, domains in _homes(report).items()}

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot(ylabel="accuracy on own test rows (%)", ylim=(0, 102))
        paint_bars(figure, axes) if len(after) <= BARS else paint_strip(figure, axes)
        axes.grid(False, axis="x")

    def paint_bars(figure: "Figure", axes: "Axes") -> None:
        x = np.arange(len(after))
        bars = axes.bar(x, 100 * after, color=[TAIL if place < worst else PALETTE[0] for place in x])
        dots = axes.plot(
            x, 100 * before.reindex(after.index), "D", color="black", markersize=5, markerfacecolor="white"
        )
        labels = [f"{client}\n{short(home[client], 18)}" if len(after) <= 8 else str(client) for client in after.index]
        axes.set_xticks(x, labels, fontsize="small")
        axes.set_xlabel("client, lowest accuracy first")
        spare = max(0, 8 - len(after)) / 2  # three bars are not walls
        axes.set_xlim(-0.7 - spare, len(after) - 0.3 + spare)
        handles, labels = [bars[0], dots[0]], ["worst tenth", "zero-shot CLIP"]
        if len(after) > worst:
            handles, labels = [bars[worst], *handles], ["chosen round", *labels]
        legend(figure, handles, labels, 3)

    def paint_strip(figure: "Figure", axes: "Axes") -> None:
        edges, values = np.arange(len(after) + 1), 100 * after.to_numpy()
        axes.axvspan(0, worst, color=TAIL, alpha=0.2, linewidth=0)  # seen even where the tail is all zero
        rest = axes.stairs(values, edges, fill=True, color=PALETTE[0], alpha=0.85)
        tail = axes.stairs(values[:worst], edges[: worst + 1], fill=True, color=TAIL)
        zero = axes.stairs(100 * before.sort_values().to_numpy(), baseline=None, color="black", linewidth=1.3)
        axes.set(xlabel="number of clients, lowest accuracy first", xlim=(0, len(after)))
        labels = "chosen round", "worst tenth", "zero-shot CLIP, clients sorted anew"
        legend(figure, (rest, tail, zero), labels, 3)

    caption = (
        f"Accuracy by client on its own test rows, round {report.chosen_round}. Worst tenth: "
        f"{worst} of {len(after)} clients, mean {percent(tail_mean(after))}%."
    )
    alt = f"Accuracy by client from {percent(after.min())} to {percent(after.max())} percent, median "
    return draw("clients", caption, alt + percent(after.median()), paint, (11.6, 3.8), wide=True)


def _partition(report: Report) -> Plot:
    """Who trains on what: dots while each can be seen, a heat map beyond."""
    held = report.holdings[report.holdings[:, 3] == 0]
    clients, column = np.unique(held[:, 0], return_inverse=True)
    rows = np.zeros((len(report.domains), len(report.classes), len(clients)), np.int64)
    np.add.at(rows, (held[:, 1], held[:, 2], column), held[:, 4])
    few = len(clients) <= 30 and len(report.classes) <= 40 and np.count_nonzero(rows) <= DOTS
    alt = (
        f"Train rows of {len(clients)} clients by class and domain: {rows.sum()} in all, "
        f"{rows.sum((0, 1)).min()} to {rows.sum((0, 1)).max()} a client"
    )
    return (_dots if few else _heat)(report, clients, rows, alt)


def _dots(report: Report, clients: np.ndarray, rows: np.ndarray, alt: str) -> Plot:
    """A dot per client, class and domain.

    Args:
        rows: (domains, C, K) train rows.
    """
    holds = rows.any(axis=1)  # (domains, K)
    most = int(holds.sum(0).max())
    height = 1.5 + 0.36 * len(report.classes)

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot(xlabel="client", ylabel="class", xlim=(-0.5, len(clients) - 0.5))
        # Points across: the narrower of a class's height and a domain's share of a client's width.
        across = min(0.36 * 72, 10 * 72 / len(clients) / most) * 0.95
        for d in range(len(report.domains)):
            label, client = np.nonzero(rows[d])
            if len(label):
                place = holds[:d].sum(0) - (holds.sum(0) - 1) / 2
                area = across**2 * rows[d][label, client] / rows.max()
                x = client + place[client] * 0.9 / most
                axes.scatter(x, label, area, color=_colour(d), edgecolors="none")
        axes.set_xticks(range(len(clients)), [str(client) for client in clients])
        axes.set_xticks(np.arange(1, len(clients)) - 0.5, minor=True)
        axes.grid(False)
        axes.grid(True, axis="y")
        axes.grid(True, axis="x", which="minor", color="#b0b0b0")
        axes.tick_params(which="minor", length=0)
        axes.set_yticks(range(len(report.classes)), [short(name) for name in report.classes])
        axes.set_ylim(len(report.classes) - 0.4, -0.6)
        _domain_legend(report, figure, rows)

    caption = f"Train rows by client, class and domain: a dot's area; the largest is {rows.max()} rows."
    return draw("partition", caption, alt, paint, (11.6, height), wide=True)


def _heat(report: Report, clients: np.ndarray, rows: np.ndarray, alt: str) -> Plot:
    """A cell per client and class, below a strip of each client's domains; clients are grouped by their main one."""
    by_domain = rows.sum(1)
    order = np.lexsort((-by_domain.sum(0), by_domain.argmax(0)))
    cells, stacked = rows.sum(0)[:, order], by_domain[:, order].cumsum(0)
    named = len(report.classes) <= 40

    def paint(figure: "Figure") -> None:
        from matplotlib.colors import PowerNorm
        from matplotlib.ticker import MaxNLocator

        top, heat = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        edges = np.arange(len(clients) + 1) - 0.5
        for d, held in enumerate(by_domain[:, order]):
            strip = top.stairs(stacked[d], edges, baseline=stacked[d] - held, fill=True, color=_colour(d))
            strip.set_rasterized(len(clients) > 300)  # as a path, half the page at 1000 clients
        top.set(ylabel="train rows")
        top.grid(False, axis="x")
        # A square root, or the many small cells of a skewed partition would all be white.
        image = heat.imshow(cells, cmap="Blues", norm=PowerNorm(0.5, 0), aspect="auto", interpolation="none")
        heat.grid(False)
        heat.set(xlabel="clients, grouped by the domain of most rows", ylabel="class" if named else "class, by number")
        heat.set_xticks([])
        if named:
            heat.set_yticks(range(len(report.classes)), [short(name) for name in report.classes], fontsize="small")
        bar = figure.colorbar(image, ax=heat, label="train rows", pad=0.01, ticks=MaxNLocator(integer=True))
        bar.solids.set_rasterized(True)  # one small picture in place of 256 paths
        _domain_legend(report, figure, rows)

    caption = f"Train rows by client: domains stacked above, classes below; the fullest cell has {cells.max()} rows."
    height = 3.2 + (0.2 * len(report.classes) if named else 5)
    return draw("partition", caption, alt, paint, (11.6, height), wide=True)


def _domain_legend(report: Report, figure: "Figure", rows: np.ndarray) -> None:
    # Squares, since a dot of one size in the legend would say something untrue of the others.
    from matplotlib.patches import Patch

    there = [d for d in range(len(report.domains)) if rows[d].any()]
    names = [short(report.domains[d]) for d in there]
    legend(figure, [Patch(color=_colour(d)) for d in there], names, 5)


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]

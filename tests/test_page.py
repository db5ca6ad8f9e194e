"""The page of a run says what its report says, in every shape a run can have, and loads nothing."""

from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from browser import explore

from fedsim import Config, run
from fedsim.checkpoint import load_checkpoint
from fedsim.counts import Counts
from fedsim.formats import difference, number, percent
from fedsim.prepare import prepare
from fedsim.reporting.html import portable
from fedsim.reporting.metrics import curves
from fedsim.reporting.page import write_page
from fedsim.reporting.parquet import read_tables
from fedsim.reporting.report import Report
from fedsim.reporting.tables import COLUMNS


class Page(HTMLParser):
    """Tables by caption as rows of cells, attributes that could load something, and the words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.links, self.alts, self.ids, self.words = {}, [], [], [], ""
        self.headings, self.details, self._open = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href", "xlink:href", "data", "action") if name in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.alts += [attrs["aria-label"]] if attrs.get("role") == "img" else []
        self.details += tag == "details"
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        self.words += data
        here = self._open[-1] if self._open else ""
        if here in ("td", "th"):
            self._rows[-1][-1] += data
        elif here == "caption":
            self._caption += data
        elif here in ("h1", "h2"):
            self.headings.append(data)

    def table(self, start: str) -> list[list[str]]:
        return next(rows for caption, rows in self.tables.items() if caption.startswith(start))


SHAPES = {
    "plain": {},
    "no held-out domain": {"held_out": ()},
    "two held-out domains": {"held_out": ("ink", "oil"), "partition": "iid", "clients": 3},
    "no round": {"rounds": 0},
    "one round": {"rounds": 1},
    "zero-shot": {"method": "zero_shot"},
    "everyone alone": {"server": "local_only"},
    "everyone alone, nothing held out": {"server": "local_only", "held_out": ()},
    "no validation rows": {"partition": "iid", "clients": 40, "train_share": 0.7},
    "many clients": {"partition": "iid", "clients": 48},
}
NEW = {"base to new": {"new_classes": 0.5}}


@pytest.fixture(scope="module")
def shown(features_dir, tmp_path_factory):
    """Report, page and folder of a shape, run once for all tests."""
    fast = {"name": "fedclip", "lr": 1e-2}  # by the paper's rate three rounds change nothing
    quick = {
        "method": fast,
        "dataset": "features",
        "data_dir": features_dir,
        "held_out": ("ink",),
        "rounds": 3,
        "actors": 0,
    }

    @cache
    def show(shape: str) -> tuple[Report, Page, Config]:
        config = Config(**quick | {"out": tmp_path_factory.mktemp("run") / "run"} | (SHAPES | NEW)[shape])
        report = run(config)
        return report, Page((config.folder() / "report.html").read_text()), config

    return show


@pytest.mark.parametrize("shape", SHAPES)
def test_the_summary_is_the_report_s_and_nothing_is_loaded(shape, shown):
    report, page, _ = shown(shape)
    before, after = report.summary("zero_shot"), report.summary()
    rows = page.table("Top-1 accuracy")
    assert [row[1:] for row in rows[1:]] == [
        [percent(before[key]), percent(after[key]), difference(before[key], after[key])]
        for key in ("generalization", "personalization", "worst_tenth", "spread", "personalization_own", "validation")
    ]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert page.headings[1:] == ["Round by round", "By domain", "By client", "Who holds what", "What was run"]
    assert {len(row) for rows in page.tables.values() for row in rows} <= {2, 4, 6, 7, 8}
    assert all(len(alt) > 20 for alt in page.alts)


def test_what_a_shape_has_not_is_left_empty(shown):
    for shape in ("plain", "no round", "zero-shot", "everyone alone"):
        report, page, _ = shown(shape)
        starts = ["accuracy (%)", "Accuracy by domain", "Accuracy by client", "Rows by client"]
        if report.last_round:
            starts.insert(2, "accuracy on test rows (%): ink by round from ")
        assert all(alt.startswith(start) for alt, start in zip(page.alts, starts, strict=True))
        trained = shape in ("plain", "everyone alone")
        assert ("training loss" in page.alts[0]) == trained
        assert page.words.count("nothing to show") == {"plain": 0, "everyone alone": 1}.get(shape, 2)
        assert ("held-out domains by round" in page.alts[0]) and "validation rows" in page.alts[0]


def test_the_page_says_how_the_round_was_chosen(shown):
    report, page, _ = shown("plain")
    assert (
        f"Round {report.chosen_round} of 3 is reported: the first with the highest mean validation accuracy"
        in page.words
    )
    report, page, _ = shown("no validation rows")
    assert np.isnan(report.summary()["validation"])
    assert "Round 3 is reported because it is the last: no client has validation rows" in page.words
    assert "No round was run" in shown("no round")[1].words
    for shape in SHAPES:
        own = "Each of 2 clients has its own model" in shown(shape)[1].words
        assert own == (shape == "everyone alone")


def test_kinds_of_rows_have_their_f1_and_calibration_before_and_after(shown):
    report, page, _ = shown("plain")
    before, after = report.summary("zero_shot"), report.summary()
    head, own, away = page.table("All rows of a kind together, in percent: zero-shot CLIP → round")
    assert head == ["rows", "among", "accuracy", "balanced accuracy", "macro-F1", "calibration error"]
    for row, name, f1, ece in (
        (own, "own test rows", "macro_f1", "ece"),
        (away, "held-out domains", "generalization_f1", "generalization_ece"),
    ):
        assert row[:2] == [name, "all 4 classes"]
        assert row[4:] == [f"{percent(before[key])} → {percent(after[key])}" for key in (f1, ece)]
    assert own[3] == f"{percent(before['balanced'])} → {percent(after['balanced'])}"
    assert own[2].split(" → ")[1] == percent(after["personalization"])  # two clients of 24 test rows each
    assert away[2].split(" → ")[1] == percent(after["generalization"])  # one domain
    assert not any("harmonic" in words for rows in page.tables.values() for row in rows for words in row)


def test_new_classes_are_told_apart_and_their_harmonic_means_shown(shown):
    report, page, _ = shown("base to new")
    summary = report.summary()
    rows = {row[0]: row[2] for row in page.table("Top-1 accuracy")[1:]}
    for start, key in (
        ("base:", "base"),
        ("new:", "new"),
        ("harmonic mean of base and new", "harmonic_2"),
        ("harmonic mean of local", "harmonic_3"),
    ):
        assert [value for name, value in rows.items() if name.startswith(start)] == [percent(summary[key])]
    kinds = {row[0]: row[1] for row in page.table("All rows of a kind")[1:]}
    assert kinds == {
        "own test rows": "the 2 trained classes",
        "held-out domains": "the 2 trained classes",
        "new classes": "the 2 new classes",
    }
    assert "No client trains on the 2 new classes" in page.words
    # 2 of 4 classes of 30 rows: a domain has 60 left, cut 36, 12, 12; rows of new classes are in no client's.
    assert {row[0]: row[1:4] for row in page.table("Rows by client")[1:]} == {
        "0": ["36", "12", "12"],
        "1": ["36", "12", "12"],
    }
    assert {row[0]: row[3] for row in page.table("Rows by domain")[1:]}["ink (held out)"] == "60"
    assert dict(page.table("Data and cost")[1:])["new classes"] == "2: owl, pig"


def test_tables_by_domain_and_client_count_rows_and_accuracy(shown):
    report, page, _ = shown("plain")
    scores, zero = report.tables().trained.scores, report.tables().zero_shot.scores
    scores = scores[(scores["round"] == report.chosen_round) & (scores.split == "test")]
    zero = zero[zero.split == "test"]
    # 4 classes of 30 rows: a domain has 120, cut 72, 24, 24; the held-out one is all test rows.
    held = {"ink (held out)": ["0", "0", "120"], "oil": ["72", "24", "24"], "photo": ["72", "24", "24"]}
    rows = {row[0]: row[1:] for row in page.table("Rows by domain")[1:]}
    assert {name: cells[:3] for name, cells in rows.items()} == held
    clients = {row[0]: row[1:] for row in page.table("Rows by client")[1:]}
    assert {client: cells[-1] for client, cells in clients.items()} == {"0": "oil", "1": "photo"}
    for domain, name, client in (("ink", "ink (held out)", None), ("oil", "oil", "0"), ("photo", "photo", "1")):
        of = [table[table.domain == domain] for table in (zero, scores)]
        accuracies = [float(table.correct.sum() / table.total.sum()) for table in of]
        assert rows[name][3:5] == [percent(accuracy) for accuracy in accuracies]
        assert rows[name][5] == difference(*accuracies)
        assert accuracies[0] != accuracies[1]
        assert client is None or clients[client][3:6] == rows[name][3:]


def test_a_page_has_the_same_bytes_from_the_report_a_checkpoint_and_parquet(shown, tmp_path):
    report, _, ours = shown("plain")
    bytes_of = (ours.folder() / "report.html").read_bytes()
    restored = load_checkpoint(ours.folder(), ours.experiment())[1]
    write_page(restored.tables(), tmp_path / "restored.html")
    assert (tmp_path / "restored.html").read_bytes() == bytes_of
    write_page(read_tables(ours.folder()), tmp_path / "read.html")
    assert (tmp_path / "read.html").read_bytes() == bytes_of
    again = run(ours.model_copy(update={"out": tmp_path / "again"}))
    for theirs, ours in zip(again.rounds, report.rounds, strict=True):
        theirs[7] = ours[7]  # seconds
    write_page(again.tables(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == bytes_of


def test_nothing_of_the_machine_is_on_the_page(shown, features_dir):
    _, _, ours = shown("plain")
    text = (ours.folder() / "report.html").read_text()
    assert str(ours.folder().parent) not in text and str(features_dir.parent) not in text
    assert f"data_dir: {features_dir.name}" in text
    assert portable({"a": ["/x/y.pt", "z"], "b": 1}) == {"a": ["y.pt", "z"], "b": 1}


def test_a_run_without_a_page_is_finished_and_may_be_given_one(config):
    ours = config(rounds=1)
    run(ours)
    page = ours.folder() / "report.html"
    scores = (ours.folder() / "scores.parquet").read_bytes()
    assert prepare(ours).done and not page.exists()
    run(ours.model_copy(update={"page": True}))
    assert page.exists() and (ours.folder() / "scores.parquet").read_bytes() == scores


def test_names_are_text_and_never_markup(features_dir, config, tmp_path):
    odd = {"oil": "<script>alert(1)</script>", "photo": "a$b$ & _c"}
    for file in ("features", "classes"):
        table = pd.read_parquet(features_dir / f"{file}.parquet")
        (tmp_path / "odd").mkdir(exist_ok=True)
        table.replace({"domain": odd}).to_parquet(tmp_path / "odd" / f"{file}.parquet")
    run(config(data_dir=tmp_path / "odd", rounds=1, page=True))
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page(text)
    assert "<script>alert" not in text and text.count("<script>") == 1
    assert [row[0] for row in page.table("Rows by domain")[1:]] == [
        "<script>alert(1)</script>",
        "a$b$ & _c",
        "ink (held out)",
    ]


def test_skipped_images_are_listed(shown, tmp_path):
    report = shown("no round")[0]
    skipped = {"skipped": ["ink/cat/3.png", "/home/me/oil/dog/1.png"]}
    write_page(replace(report.tables(), facts=report.facts | skipped), tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert page.table("Unreadable images")[1:] == [["ink/cat/3.png"], ["1.png"]]
    assert "Unreadable images that were left out: 2" in page.words


def test_the_first_words_say_what_is_compared_the_gain_and_the_cost(shown):
    report, page, _ = shown("plain")
    before, after = report.summary("zero_shot"), report.summary()
    ink, own = (
        f"{difference(before[key], after[key])} points on {rows} ({percent(before[key])}% to {percent(after[key])}%)"
        for key, rows in (("generalization", "held-out domains"), ("personalization", "own test rows"))
    )
    costs = report.tables().rounds
    megabytes = number((costs.bytes_up + costs.bytes_down).sum() / 1e6)
    compared = f"fedclip with fedavg in round {report.chosen_round} is compared with zero-shot CLIP on 120 test rows"
    assert f"{compared} of held-out ink and on 48 test rows of 2 clients. Difference: {ink} and {own}." in page.words
    assert f"Cost: {megabytes} megabytes up and down and " in page.words
    assert "points on held-out domains" not in shown("no held-out domain")[1].words


def test_a_reader_points_at_hides_and_zooms_curves_and_sorts_tables(shown):
    report, _, config = shown("two held-out domains")
    told = explore(
        config.folder() / "report.html",
        """
        const [rounds] = all(".panel"), [, top, , bottom] = told(rounds).box, { x } = told(rounds).series[0];
        const middle = (top + bottom) / 2;
        const ticks = () => all(".ticks text", rounds).map((tick) => tick.textContent);
        const before = point(rounds, x[2], middle);
        document.querySelector(".legend input").click();
        const drawn = all(".series-0", rounds).map(shown);
        const after = point(rounds, x[2], middle), next = press(rounds, "ArrowRight");
        point(rounds, x[1], middle, "pointerdown");
        point(rounds, x[3], middle, "pointermove", { buttons: 1 });
        point(rounds, x[3], middle, "pointerup");
        const zoomed = ticks(), third = point(rounds, told(rounds).box[2], middle)[0];
        press(rounds, "Escape");
        const table = all("table").find((table) => table.caption.textContent.startsWith("Rows by domain"));
        const head = table.tHead.rows[0].cells[3].querySelector("button");
        const sorted = () => rows(table).map((row) => row[3]);
        head.click();
        const down = sorted();
        head.click();
        const [heat] = all(".panel").slice(-1), { box } = told(heat).maps[0];
        const cell = point(heat, box[0] + 1, box[1] + 1);
        return { before, drawn, after, next, zoomed, third, whole: ticks(), down, up: sorted(), cell };
        """,
    )
    keys = {"generalization": "held-out domains", "validation": "validation rows, mean over clients"}
    keys = {"personalization": "own test rows, mean over clients"} | keys
    zero = report.summary("zero_shot")

    def pointed(round):
        means = report.summary(round=round)
        lines = {key: f"{percent(means[key])} ({difference(zero[key], means[key])})" for key in keys}
        return [f"round {round}", *(f"{keys[key]}: {line}" for key, line in lines.items())]

    assert told["before"] == pointed(2)
    assert told["after"] == pointed(2)[:1] + pointed(2)[2:] and told["next"] == pointed(3)[:1] + pointed(3)[2:]
    assert len(told["drawn"]) >= 3 and not any(told["drawn"])  # the curve, its dot and its zero-shot line
    assert told["zoomed"] == ["1", "2", "3"] and told["third"] == "round 3" and told["whole"] == []
    assert told["down"] == ["120", "120", "24"] and told["up"] == ["24", "120", "120"]
    assert told["cell"] == ["client 0", "domain photo", "24 rows"]  # 72 train rows of photo, to three clients


def test_a_page_is_no_wider_than_a_phone(shown):
    script = "const [{ width }] = all('.panel svg').map((svg) => svg.getBoundingClientRect());"
    script += "return [width, document.documentElement.scrollWidth <= innerWidth];"
    width, fits = explore(shown("two held-out domains")[2].folder() / "report.html", script, 500)
    assert width > 350 and fits  # panels 346 points wide: letters are no smaller than drawn


def crowd(clients: int, classes: int = 60, domains: int = 5) -> Report:
    """A report of many clients, of which each tenth is right on 1 of 4 test rows and the others on 3."""
    ids = np.arange(clients)
    domain = ids % domains
    cells = [np.column_stack([ids, domain, (ids * 7 + k) % classes, 0 * ids, 1 + k + 0 * ids]) for k in range(4)]
    tests = np.column_stack([ids, domain, ids % classes, 2 + 0 * ids, 4 + 0 * ids])
    right = np.where(ids % 10, 3, 1)
    counts = Counts(np.column_stack([ids, domain, 1 + 0 * ids, right, 4 + 0 * ids, right]).astype(np.int32))
    config = {
        "dataset": {"name": "glyphs"},
        "data_dir": None,
        "held_out": [],
        "method": {"name": "probe"},
        "server": {"name": "fedavg"},
    }
    names = [[f"{what} {k}" for k in range(count)] for what, count in (("domain", domains), ("class", classes))]
    report = Report(config, *names, [], {"versions": {"fedsim": "1"}, "skipped": []})
    report.holdings = np.concatenate([*cells, tests]).astype(np.int64)
    report.add_zero_shot(counts)
    for round in (0, 1):
        report.add_scores(round, counts)
    costs = [1, clients, clients, 0, 0, 4e6, 4e6, 0.5, 0.0, 1.25, clients]
    report.rounds = [np.array(costs + [np.nan] * (len(COLUMNS["rounds"]) - len(costs)))]
    return report


def test_a_thousand_clients_fit_in_one_light_page(tmp_path):
    write_page(crowd(1000).tables(), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert len(text) < 1_000_000
    assert page.details == 1
    rows = page.table("Rows by client")[1:]
    assert [row[:6] for row in rows[:2]] == [
        ["0", "10", "0", "4", "25.0", "25.0"],
        ["10", "10", "0", "4", "25.0", "25.0"],
    ]
    assert len(rows) == 1000
    assert "Worst tenth: 100 of 1000 clients, mean 25.0%." in page.words
    assert "Rows by client: 10000 in all, 10 to 10 each of 1000" in page.alts


def test_more_clients_than_fit_are_cut_to_the_lowest(tmp_path):
    write_page(crowd(3000).tables(), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    rows = Page(text).table("Rows by client")[1:]
    assert len(text) < 1_000_000 and len(rows) == 1000
    assert sum(row[5] == "25.0" for row in rows) == 300  # each tenth of 3000 clients is among the lowest 1000


def test_curves_are_the_summaries_of_each_round(shown):
    report = shown("two held-out domains")[0]
    lines = curves(report.tables().trained.scores, report.held_out)
    assert list(lines.index) == [0, 1, 2, 3]
    for round in lines.index:
        summary = report.summary(round=round)
        assert lines.loc[round].to_dict() == pytest.approx({key: summary[key] for key in lines.columns}, abs=1e-12)


def test_held_out_domains_count_alike_whatever_their_rows():
    columns = ["round", "client", "domain", "split", "correct", "total"]
    rows = [(1, client, *rest) for client in (0, 1) for rest in (("ink", "test", 1, 1), ("oil", "test", client, 4))]
    lines = curves(pd.DataFrame(rows, columns=columns), ["ink", "oil"])
    assert lines.generalization[1] == 0.5625  # ink 2 of 2, oil 1 of 8; by client 1 of 5 and 2 of 5
    assert lines.personalization.isna().all() and lines.validation.isna().all()

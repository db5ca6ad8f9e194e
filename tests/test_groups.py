"""Groups of a sensitive attribute: which rows have which, and how far accuracies and errors differ between them."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES
from torch.nn.functional import cross_entropy, normalize

from fedsim import InputError, component, run
from fedsim.methods.probe import Probe
from fedsim.prepare import prepare
from fedsim.registry import parse
from fedsim.reporting.metrics import fairness, group_accuracies
from fedsim.reporting.parquet import read_tables
from fedsim.reporting.remarks import remarks


@pytest.fixture(scope="module")
def grouped(features_dir, tmp_path_factory):
    """The features with a group: `a` has most of the cats, `b` most of the pigs, and `c` three rows."""
    folder = tmp_path_factory.mktemp("grouped")
    rows, rng = pd.read_parquet(features_dir / "features.parquet"), np.random.default_rng(3)
    likely = rows.label.map({"cat": 0.8, "dog": 0.5, "owl": 0.5, "pig": 0.2})
    rows["group"] = np.where(rng.random(len(rows)) < likely, "a", "b")
    rows.loc[rng.choice(len(rows), 3, replace=False), "group"] = "c"
    rows.to_parquet(folder / "features.parquet")
    (folder / "classes.parquet").write_bytes((features_dir / "classes.parquet").read_bytes())
    return folder


def counted(group, true, predicted):
    """Rows of `Tables.labels`, from a row for each of n predictions."""
    classes = sorted({*true, *predicted})
    rows = pd.DataFrame({"group": [f"own, {name}" for name in group], "true": true, "predicted": predicted})
    cells = [(each, label) for each in rows.group.unique() for label in classes]
    table = pd.DataFrame(cells, columns=["group", "label"])
    for name, kept in {"correct": rows.true == rows.predicted, "predicted": rows.true == rows.true}.items():
        table[name] = [((rows.group == g) & (rows.predicted == c) & kept).sum() for g, c in cells]
    table["support"] = [((rows.group == g) & (rows.true == c)).sum() for g, c in cells]
    return table[(table.predicted > 0) | (table.support > 0)]  # as the table leaves out empty cells


def test_two_classes_and_two_groups_give_the_differences_of_the_binary_definitions():
    group = list("aaaaaaaabbbb")
    true = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    predicted = [1, 1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    means = fairness(counted(group, true, predicted), ["a", "b"])
    assert means["demographic_parity"] == pytest.approx(4 / 8 - 1 / 4)
    assert means["equalized_odds"] == pytest.approx(max(3 / 4 - 1 / 2, 1 / 4 - 0 / 2))
    assert means["worst_group"] == pytest.approx(min(6 / 8, 3 / 4))


def test_more_classes_and_groups_give_the_largest_difference_of_a_class_against_the_others():
    rng = np.random.default_rng(0)
    group, true, predicted = (rng.integers(0, size, 400) for size in (3, 4, 4))
    predicted = np.where(rng.random(400) < 0.3 + 0.2 * group, true, predicted)
    names = [f"g{number}" for number in range(3)]
    means = fairness(counted([names[g] for g in group], true.tolist(), predicted.tolist()), names)

    def gap(share):
        return max(np.ptp([share(group == g, c) for g in range(3)]) for c in range(4))

    assert means["demographic_parity"] == pytest.approx(gap(lambda rows, c: (predicted[rows] == c).mean()))
    true_positive = gap(lambda rows, c: (predicted[rows & (true == c)] == c).mean())
    false_positive = gap(lambda rows, c: (predicted[rows & (true != c)] == c).mean())
    assert means["equalized_odds"] == pytest.approx(max(true_positive, false_positive))


def test_a_group_without_rows_of_a_class_takes_no_part_and_one_group_alone_has_no_difference():
    two = fairness(counted(list("aabb"), [0, 1, 0, 0], [0, 0, 0, 1]), ["a", "b", "c"])
    # Of class 1 only `a` has rows, so only the rows of class 0 are compared: 1 / 1 against 1 / 2.
    assert two["equalized_odds"] == pytest.approx(0.5) and two["worst_group"] == 0.5
    alone = fairness(counted(list("aa"), [0, 1], [0, 0]), ["a"])
    assert np.isnan([alone["demographic_parity"], alone["equalized_odds"]]).all() and alone["worst_group"] == 0.5


def test_a_run_counts_the_own_test_rows_of_each_group_whatever_the_method(grouped, config):
    ours = config(data_dir=grouped, page=True, clients=4, partition="dirichlet", method="probe", dtype="float64")
    report, experiment = run(ours), prepare(ours)
    data = experiment.data.source
    rows = np.concatenate([experiment.clients[client].test for client in range(4)])
    x = normalize(torch.tensor(data.representations.features).double(), dim=1)
    predicted = (x[rows] @ report.adapter["weight"].T).argmax(dim=1).numpy()
    tables = read_tables(ours.folder())
    table = counted([data.groups[k] for k in data.group[rows]], data.y[rows].tolist(), predicted.tolist())
    expected = table.assign(label=[CLASSES[label] for label in table.label]).set_index(["group", "label"]).sort_index()
    written = tables.chosen.labels[tables.chosen.labels.group.str.startswith("own, ")].set_index(["group", "label"])
    pd.testing.assert_frame_equal(
        written[["correct", "predicted", "support"]].sort_index(), expected, check_dtype=False, check_index_type=False
    )
    means = tables.summary()
    assert means["worst_group"] == group_accuracies(table, data.groups).min()
    assert {"demographic_parity", "equalized_odds"} <= tables.summary("zero_shot").keys()
    pooled = written.sum()
    assert pooled.correct / pooled.support == pytest.approx(means["pooled"])
    assert "equalized odds" in " ".join(remarks(tables))
    assert "Accuracy by group" in (ours.folder() / "report.html").read_text(encoding="utf-8")
    assert run(ours).tables().labels.equals(tables.labels)  # as the checkpoint has them


def test_without_groups_nothing_is_said_of_fairness_and_all_else_is_the_same(grouped, features_dir, config, tmp_path):
    with_groups, without = run(config(data_dir=grouped)), run(config(data_dir=features_dir, out=tmp_path / "without"))
    assert with_groups.tables().scores.equals(without.tables().scores)
    same = {key: value for key, value in with_groups.summary().items() if key in without.summary()}
    assert same == pytest.approx(without.summary(), nan_ok=True) and "equalized_odds" not in without.summary()


@component
class ByGroup(Probe):
    """Weights rows by the number of their group."""

    reads_group = True

    def loss(self, module, batch):
        losses = cross_entropy(module(batch.x, batch.classes), batch.y, reduction="none")
        return (losses * (1 + batch.group)).mean()


def test_a_loss_gets_the_group_of_each_row_on_both_engines(grouped, config, tmp_path):
    fields = {"data_dir": grouped, "method": ByGroup(), "clients": 6, "partition": "dirichlet", "dtype": "float64"}
    ours, single = (run(config(**fields, engine=engine, out=tmp_path / engine)) for engine in ("stacked", "reference"))
    torch.testing.assert_close(ours.adapter, single.adapter, rtol=1e-9, atol=1e-12)
    losses = ours.tables().rounds.loss.iloc[0]
    plain = (
        run(config(**fields | {"method": Probe(), "rounds": 1}, out=tmp_path / "plain")).tables().rounds.loss.iloc[0]
    )
    assert plain < losses < 3 * plain
    with pytest.raises(InputError, match=r"two or more groups \(a sensitive attribute\), and the data set has none"):
        run(config(method=ByGroup(), out=tmp_path / "refused"))


def test_domains_can_be_the_groups_unless_rows_have_others(grouped, features_dir):
    dataset = parse("dataset", {"name": "features", "domain_groups": True})
    data = dataset.load(features_dir)
    assert data.groups == data.domains and data.group.tolist() == data.domain.tolist()
    with pytest.raises(InputError, match=r"have groups already; leave out dataset\.domain_groups"):
        dataset.load(grouped)


def test_a_group_is_text_or_an_integer_in_every_row(grouped, tmp_path):
    rows = pd.read_parquet(grouped / "features.parquet")
    rows.loc[2, "group"] = None
    rows.to_parquet(tmp_path / "features.parquet")
    (tmp_path / "classes.parquet").write_bytes((grouped / "classes.parquet").read_bytes())
    with pytest.raises(InputError, match=r"group is null in 1 row \(2\)"):
        parse("dataset", "features").load(tmp_path)

"""Classes that arrive in tasks over the rounds (`--tasks`): who trains on what, what is evaluated, and the measures."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_until
from torch.nn.functional import cross_entropy, normalize

from fedsim import InputError, run
from fedsim.class_tasks import last_rounds, split_classes, task_in
from fedsim.prepare import prepare
from fedsim.reporting.metrics import continual, task_accuracies
from fedsim.reporting.parquet import read_tables
from fedsim.reporting.remarks import remarks

PROBE = {"name": "probe", "optimizer": "sgd", "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 999}
FIELDS = {"method": PROBE, "clients": 3, "partition": "iid", "rounds": 4, "tasks": 2, "dtype": "float64"}


def test_each_task_has_an_equal_share_of_the_rounds_and_of_the_classes():
    for rounds in range(1, 25):
        for tasks in range(1, rounds + 1):
            which = [task_in(round, tasks, rounds) for round in range(1, rounds + 1)]
            sizes = np.bincount(which, minlength=tasks)
            assert which == sorted(which) and len(sizes) == tasks and np.ptp(sizes) <= 1
            assert last_rounds(tasks, rounds) == np.cumsum(sizes).tolist()
    split = split_classes([0, 1, 2, 3, 4, 6], 4, 8, seed=1)
    assert sorted(label for task in split.classes for label in task) == [0, 1, 2, 3, 4, 6]
    assert [len(task) for task in split.classes] == [2, 2, 1, 1] and split != split_classes([0, 1, 2, 3, 4, 6], 4, 8, 2)
    assert split.current(4) == list(split.classes[1]) and split.seen(4) == sorted(split.classes[0] + split.classes[1])
    assert split.seen(0) == list(split.classes[0]) and len(split.seen(9)) == 6


def test_rounds_and_counts_are_those_of_a_plain_loop_over_the_tasks(config):
    ours = config(**FIELDS)
    report, experiment = run(ours), prepare(ours)
    data, clients = experiment.data.source, experiment.clients
    x = normalize(torch.tensor(data.representations.features).double(), dim=1)
    y, scale = torch.tensor(data.y), data.class_embeddings.logit_scale
    weight = torch.tensor(data.class_embeddings.vectors).double()
    counts = {}
    for round in range(1, 5):
        now = clients.class_tasks.classes[(round - 1) // 2]
        seen = [*clients.class_tasks.classes[0], *(now if round > 2 else ())]
        others = [label for label in range(4) if label not in seen]
        locals_ = []
        for client in range(3):
            rows = [row for row in clients[client].train.tolist() if y[row] in now]
            own = weight.clone().requires_grad_()
            logits = scale * x[rows] @ own.T
            logits[:, others] = -torch.inf
            (gradient,) = torch.autograd.grad(cross_entropy(logits, y[rows]), [own])
            locals_.append(weight - 0.5 * gradient)
        weight = torch.stack(locals_).mean(dim=0)
        test = [row for client in range(3) for row in clients[client].test.tolist() if y[row] in seen]
        logits = x[test] @ weight.T
        logits[:, others] = -torch.inf
        right = logits.argmax(dim=1) == y[test]
        counts[round] = [int(right.sum()), len(test), *(int(right[y[test] == label].sum()) for label in range(4))]
    scores, labels = report.tables().trained.scores, report.tables().trained.labels
    for round, (right, rows, *by_label) in counts.items():
        own = scores[(scores["round"] == round) & (scores.split == "test") & (scores.domain != "ink")]
        assert [own.correct.sum(), own.total.sum()] == [right, rows]
        by = labels[(labels["round"] == round) & (labels.group == "own")].set_index("label").correct
        assert [by.get(name, 0) for name in data.classes] == by_label
    trained = {name: tensor for name, tensor in report.adapter.items() if name == "weight"}["weight"]
    if report.chosen_round == 4:
        torch.testing.assert_close(trained, weight)
    assert report.chosen_round in (3, 4)  # on all classes, not where the first two alone are evaluated


def test_a_client_without_rows_of_a_task_is_not_asked_and_all_classes_are_seen_at_the_end(config):
    ours = config(**FIELDS | {"partition": "classes", "clients": 2, "rounds": 8, "tasks": 4})
    tables, clients = run(ours).tables(), prepare(ours).clients
    y = prepare(ours).data.source.y
    for _, row in tables.rounds.iterrows():
        now = clients.class_tasks.current(int(row["round"]))
        holders = [client for client in range(2) if np.isin(y[clients[client].train], now).any()]
        assert row.asked == row.clients == len(holders) == 1
    assert set(tables.of("trained", 8).labels.label) == set(tables.classes)


def test_forgetting_is_the_best_earlier_accuracy_minus_the_last():
    rows = [("a", 2, 8), ("a", 4, 10), ("b", 4, 3), ("a", 6, 5), ("b", 6, 6), ("c", 6, 1)]
    labels = pd.DataFrame([(round, "own", name, right, 10) for name, round, right in rows])
    labels.columns = ["round", "group", "label", "correct", "support"]
    table = task_accuracies(labels, [["a"], ["b"], ["c"]], [2, 4, 6])
    np.testing.assert_allclose(table[[1, 2, 3]], [[0.8, np.nan, np.nan], [1.0, 0.3, np.nan], [0.5, 0.6, 0.1]])
    np.testing.assert_allclose(table.seen, [0.8, 0.65, 0.4])
    means = continual(table)
    assert means["forgetting"] == pytest.approx(((1.0 - 0.5) + (0.3 - 0.6)) / 2)
    assert [means["average_accuracy"], means["last_accuracy"]] == pytest.approx([(0.8 + 0.65 + 0.4) / 3, 0.4])


@pytest.mark.parametrize("method, server", [("fedclip", "local_only"), ("probe", "fedjudge")])
def test_a_resumed_run_and_the_reference_engine_agree_and_ends_of_tasks_are_evaluated(method, server, config, tmp_path):
    fields = {"method": {"name": method, "lr": 0.01}, "server": server, "partition": "dirichlet", "clients": 4}
    fields |= {"rounds": 6, "tasks": 3, "eval_every": 5, "dtype": "float64"}
    whole = run(config(**fields))
    assert list(whole.counts) == [0, 2, 4, 5, 6]
    broken = config(**fields, out=tmp_path / "broken", page=True)
    run_until(3, broken)
    resumed = run(broken)
    assert all(torch.equal(tensor, resumed.adapter[name]) for name, tensor in whole.adapter.items())
    assert resumed.tables().scores.equals(whole.tables().scores)
    reference = run(config(**fields, engine="reference", out=tmp_path / "reference"))
    assert reference.tables().labels.equals(whole.tables().labels)
    tables = read_tables(broken.folder())
    assert tables.summary().keys() >= {"average_accuracy", "last_accuracy", "forgetting"}
    assert "forgetting" in " ".join(remarks(tables))
    assert "Task by task" in (broken.folder() / "report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="rounds"):
        run(config(**fields | {"rounds": 9}, out=tmp_path / "broken"))  # each task would have other rounds


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tasks": 5}, "--tasks 5 from 4 trained classes; it can be at most 4"),
        ({"tasks": 3, "new_classes": 0.5}, "--tasks 3 from 2 trained classes"),
        ({"rounds": 1}, "--tasks 2 needs as many --rounds or more, got 1"),
        ({"method": "ncm", "rounds": 2}, "ncm reads rows of all classes from round 1 on"),
        ({"server": "fltrust"}, "tasks does not go with server fltrust, which has rows of all classes"),
        (
            {"attack": {"name": "label_flip", "share": 0.5}},
            "tasks does not go with attack label_flip, whose classes may arrive later",
        ),
        ({"privacy": "central_dp"}, "tasks does not go with privacy central_dp, which counts all rows"),
        ({"partition": "bootstrap"}, "this one draws them client by client"),
    ],
)
def test_what_cannot_arrive_in_tasks_is_refused_in_one_sentence(change, words, config):
    with pytest.raises(InputError, match=words):
        prepare(config(**FIELDS | change))

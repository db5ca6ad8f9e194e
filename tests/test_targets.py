"""Unlabelled rows of the held-out domains in training: who reads them, which, and what is said about it; and FACMIC."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_until
from safetensors import safe_open
from test_stack import clients, features, two_rounds  # noqa: F401
from torch import nn
from torch.nn.functional import normalize

from fedsim import Backbone, InputError, Method, component, run
from fedsim.clients import make_clients
from fedsim.encoding import from_features
from fedsim.methods import Batch
from fedsim.methods._batch_norm import BatchNorm
from fedsim.methods._contrast import contrastive
from fedsim.methods.facmic import lmmd
from fedsim.methods.probe import Probe
from fedsim.params import flatten
from fedsim.registry import available, parse
from fedsim.reporting.compare import compare
from fedsim.reporting.parquet import read_tables
from fedsim.reporting.remarks import remarks
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task

FAST = {"name": "facmic", "lr": 1e-2, "batch_size": 16}
SAID = (
    "Transductive: training reads the test rows of held-out ink without their labels, so held-out accuracy does not "
    "compare with that of methods that never see these rows."
)


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Target rows ----------------------------------------------------------------------------------------------------

SEEN = []


@component
class Watching(Probe):
    """Notes its target rows, and trains as a probe."""

    reads_target = True

    def loss(self, module, batch):
        if module.training:
            SEEN.append((batch.x, batch.target))
        return super().loss(module, batch)


def test_each_client_draws_test_rows_of_held_out_domains_pass_by_pass_and_trains_as_without_them(config, features_dir):
    fields = {"batch_size": 16, "local_epochs": 2}
    SEEN.clear()
    ours = run(config(method=Watching(**fields), engine="reference", rounds=1, dtype="float64"))
    plain = run(
        config(method=Probe(**fields), engine="reference", rounds=1, dtype="float64", out=config().out / "plain")
    )
    assert torch.equal(ours.adapter["weight"], plain.adapter["weight"])
    rows = pd.read_parquet(features_dir / "features.parquet")
    ink = np.stack(rows.feature[rows.domain == "ink"].to_list())  # 120, all of them test rows
    steps = SEEN[-20:]  # of 2 clients, 2 epochs, 5 batches; before them, operations are counted
    assert all(x.shape == target.shape for x, target in steps)
    for client in (steps[:10], steps[10:]):
        read = torch.cat([target for _, target in client]).numpy()
        at = (np.abs(read[:, None] - ink[None]).max(axis=2) < 1e-2).argmax(axis=1)
        assert len(read) == 144 and set(at[:120]) == set(range(120)) and len(set(at[120:])) == 24
    assert not torch.equal(steps[0][1], steps[10][1])


def test_target_rows_may_be_made_on_demand(tmp_path):
    made = from_features(parse("dataset", {"name": "synthetic", "rows": 20, "width": 8}).load(None))
    population = make_clients(made, parse("partition", "natural"), 3, ("domain 0",), 0)
    task = {"method": parse("method", FAST), "server": parse("server", "fedavg"), "dtype": "float64"}
    stacked, single = (two_rounds(made, population, tmp_path, reference, **task)[0][0] for reference in (False, True))
    np.testing.assert_allclose(stacked.delta, single.delta, rtol=1e-7, atol=1e-12)


def test_what_reads_target_rows_needs_a_held_out_domain(config):
    with pytest.raises(InputError) as refused:
        run(config(method="facmic", held_out=()))
    assert str(refused.value) == (
        "method facmic reads unlabelled rows of held-out domains in training, and no domain is held out; "
        "give --held-out"
    )


def test_ditto_hands_target_rows_to_both_halves(config):
    report = run(config(method=FAST, server="ditto", rounds=1))
    assert SAID in remarks(report.tables())


def test_a_label_of_a_target_row_never_matters_and_every_report_says_transductive(config, features_dir, tmp_path):
    rows = pd.read_parquet(features_dir / "features.parquet")
    ink = rows.domain == "ink"
    rows.loc[ink, "label"] = np.random.default_rng(0).permutation(rows.label[ink].to_numpy())
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    rows.to_parquet(shuffled / "features.parquet")
    pd.read_parquet(features_dir / "classes.parquet").to_parquet(shuffled / "classes.parquet")
    ours = run(config(method=FAST, page=True))
    other = run(config(method=FAST, data_dir=shuffled, out=tmp_path / "other"))
    assert all(torch.equal(ours.adapter[name], other.adapter[name]) for name in ours.adapter)
    assert ours.summary()["generalization"] != other.summary()["generalization"]

    run(config(method="probe", rounds=1, out=tmp_path / "probe"))
    tables = read_tables(tmp_path / "run")
    assert tables.facts["transductive"] == "training reads 120 test rows of held-out domains, without labels"
    assert SAID in remarks(tables) and SAID in (tmp_path / "run" / "report.html").read_text()
    assert "transductive" not in read_tables(tmp_path / "probe").facts
    warnings = []
    compare([tmp_path / "run", tmp_path / "probe"], tmp_path / "both.html", warnings.append)
    assert any(warning.startswith("Transductive: run. Training read") for warning in warnings)
    assert "Transductive: run." in (tmp_path / "both.html").read_text()


# FACMIC ---------------------------------------------------------------------------------------------------------


def by_loops(source, target, y, pseudo):
    """LMMD of Zhu et al., row by row and class by class."""
    rows, total = [*source, *target], 0.0
    distance = [[((one - other) ** 2).sum().item() for other in rows] for one in rows]
    bandwidth = sum(map(sum, distance)) / (len(rows) ** 2 - len(rows)) / 4

    def kernel(a, b):
        return sum(np.exp(-distance[a][b] / (bandwidth * 2**k)) for k in range(5))

    common = set(y.tolist()) & set(pseudo.argmax(dim=1).tolist())
    for c in common:
        own = [float(label == c) / (y == c).sum().item() for label in y]
        theirs = [-(p / pseudo[:, c].sum()).item() for p in pseudo[:, c]]
        weights = own + theirs
        total += sum(weights[a] * weights[b] * kernel(a, b) for a in range(len(rows)) for b in range(len(rows)))
    return total / len(common) if common else 0.0


@pytest.mark.parametrize("sizes", [(6, 6), (5, 9)])
def test_the_discrepancy_is_that_of_loops_over_rows_and_classes(sizes):
    source, target = (normalize(double(size, 7, seed=k), dim=1) for k, size in enumerate(sizes))
    y = torch.tensor([0, 1, 1, 3, 0, 3][: sizes[0]])  # class 2 is of no source row
    pseudo = (3 * double(sizes[1], 5, seed=3)).softmax(dim=1)
    assert lmmd(source, target, y, pseudo).item() == pytest.approx(by_loops(source, target, y, pseudo), rel=1e-10)
    none = torch.full((sizes[1], 5), 0.1, dtype=torch.float64)
    none[:, 4] = 0.6  # only class 4 is predicted, and no source row has it
    assert lmmd(source, target, y, none) == 0
    one = source[:1].expand(6, 7)  # no distance at all
    assert lmmd(one, one, torch.zeros(6, dtype=torch.int64), pseudo[:6]).isfinite()


def gate(width=6, **fields):
    text = normalize(double(4, width), dim=1)
    method = parse("method", {"name": "facmic", **fields})
    return method, method.build(Backbone(text, 20.0)).double(), text


def test_without_adaptation_the_loss_is_the_contrastive_one_of_the_gated_features():
    method, module, text = gate(adaptation=0.0)
    x, target, y = double(8, 6), double(8, 6, seed=1), torch.tensor([0, 1, 2, 3, 0, 1, 2, 2])
    hidden = x @ module.attention[0].weight.T + module.attention[0].bias
    hidden = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + 1e-5).sqrt()
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    gated = (hidden @ module.attention[3].weight.T + module.attention[3].bias).softmax(dim=1) * x
    expected = contrastive(20 * normalize(gated, dim=1) @ text.T, y)
    assert method.loss(module, Batch(x, y, target=target)).item() == pytest.approx(expected.item(), rel=1e-10)
    both = parse("method", "facmic")
    assert both.loss(module, Batch(x, y, target=target)) > expected


def test_with_the_norm_as_identity_and_a_tanh_it_is_fedclips_gate():
    _, module, text = gate()
    module.attention[2] = nn.Tanh()
    fedclip = parse("method", "fedclip").build(Backbone(text, 20.0)).double()
    names = {"0": "0", "2": "3"}  # with a norm, the second layer is one further on
    fedclip.load_state_dict(
        {
            f"attention.{k}.{part}": getattr(module.attention[int(names[k])], part)
            for k in names
            for part in ("weight", "bias")
        }
    )
    module.attention[1].running_var.fill_(1 - 1e-5)  # to which batch norms add 1e-5
    x = double(9, 6)
    torch.testing.assert_close(module.eval()(x, None), fedclip(x, None), rtol=1e-12, atol=1e-12)


def test_running_statistics_are_those_of_torchs_batch_norm_and_a_prediction_depends_on_its_row_alone():
    method, module, _ = gate()
    x, target, y = double(8, 6), double(8, 6, seed=1), torch.tensor([0, 1, 2, 3, 0, 1, 2, 2])
    theirs = nn.BatchNorm1d(6).double()
    for rows in (x, target):
        theirs(module.attention[0](rows))
    method.loss(module.train(), Batch(x, y, target=target))
    torch.testing.assert_close(module.attention[1].running_mean, theirs.running_mean)
    torch.testing.assert_close(module.attention[1].running_var, theirs.running_var)
    module.eval()
    torch.testing.assert_close(module(x, None)[3:4], module(x[3:4], None), rtol=1e-12, atol=0)


def test_clients_of_a_stack_have_running_statistics_of_their_own_which_are_averaged(features, clients, tmp_path):  # noqa: F811
    task = {
        "method": parse("method", FAST | {"batch_size": 4}),
        "server": parse("server", "fedavg"),
        "dtype": "float64",
    }
    stacked, single = (two_rounds(features, clients, tmp_path, reference, **task) for reference in (False, True))
    np.testing.assert_allclose(stacked[0][1].delta, single[0][1].delta, rtol=1e-7, atol=1e-12)
    assert stacked[1][0].keys() == {
        f"optimizer/{kind}/attention.{name}"
        for kind in ("first", "second", "steps")
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    }


def test_a_run_sends_the_gate_and_its_statistics_and_resumes_to_the_same_bits(config, tmp_path):
    whole = run(config(method=FAST, rounds=3, out=tmp_path / "whole"))
    run_until(2, config(method=FAST, rounds=3))
    again = run(config(method=FAST, rounds=3))
    assert all(torch.equal(whole.adapter[name], again.adapter[name]) for name in whole.adapter)
    width = 24
    numbers = 2 * (width**2 + width) + 2 * width + 2 * width  # two layers, the norm, its mean and variance
    assert whole.tables().rounds.bytes_up.tolist() == [2 * 4 * numbers] * 3 == whole.tables().rounds.bytes_down.tolist()
    assert whole.adapter["attention.1.running_var"].min() > 0
    assert not torch.equal(whole.adapter["attention.1.running_mean"], torch.zeros(width))


# FAA-CLIP -------------------------------------------------------------------------------------------------------


def adversarial(**fields):
    method = parse("method", {"name": "faaclip", **fields})
    torch.manual_seed(0)
    module = method.build(Backbone(normalize(double(4, 6), dim=1), 20.0)).double()
    return method, module, Batch(double(8, 6), torch.tensor([0, 1, 2, 3, 0, 1, 2, 2]), target=double(8, 6, seed=1))


def test_the_classifier_learns_to_tell_domains_apart_and_the_gate_learns_the_opposite():
    method, module, batch = adversarial()
    gated = module.features(batch.x)
    source, target = (module.classifier(rows).sigmoid() for rows in (gated, module.features(batch.target).detach()))
    adversarial_loss = -(source.log().mean() + (1 - target).log().mean()) / 2
    alone = contrastive(module.logits(gated), batch.y)
    names = dict(module.named_parameters())
    grads = dict(zip(names, torch.autograd.grad(method.loss(module, batch), list(names.values())), strict=True))
    first = torch.autograd.grad(alone, list(names.values()), retain_graph=True, materialize_grads=True)
    second = torch.autograd.grad(adversarial_loss, list(names.values()), materialize_grads=True)
    for name, ours, theirs in zip(names, first, second, strict=True):
        sign = 1 if name.startswith("classifier") else -1
        torch.testing.assert_close(grads[name], ours + sign * 0.5 * theirs, rtol=1e-9, atol=1e-12)
    assert method.loss(module, batch).item() == pytest.approx((alone + 0.5 * adversarial_loss).item(), rel=1e-10)
    without, _, _ = adversarial(adversary=0.0)
    assert without.loss(module, batch).item() == pytest.approx(alone.item(), rel=1e-12)


def test_the_classifier_stays_with_its_client_and_makes_no_model_personal(config, tmp_path):
    method = FAST | {"name": "faaclip"}
    whole = run(config(method=method, out=tmp_path / "whole"))
    run_until(2, config(method=method))
    again = run(config(method=method))
    assert all(torch.equal(whole.adapter[name], again.adapter[name]) for name in whole.adapter)
    tables = whole.tables()
    assert tables.rounds.bytes_up.tolist() == [2 * 4 * (2 * (24**2 + 24) + 4 * 24)] * 3  # the gate alone
    held_out = tables.chosen.scores[tables.chosen.scores.domain == "ink"]
    assert len(held_out) == 1  # of one model
    layers = {f"classifier.{k}.{part}" for k in (0, 1, 3, 4, 6) for part in ("weight", "bias")}
    for file in (tmp_path / "whole" / "private").iterdir():
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
        assert {name for name in names if not name.startswith("optimizer/")} == layers


def test_running_statistics_are_refused_by_rules_that_do_not_average():
    backbone, refused = Backbone(torch.eye(4), 1.0), set()
    for rule in available("server"):
        try:
            method = parse("server", rule).adapt(parse("method", {"name": "facmic", "optimizer": "sgd"}))
            initial_params(Task(method, parse("server", rule), 0), backbone, cohort=20)
        except InputError as error:
            if "does not average" in str(error):
                assert re.search(r"attention.1.running_mean, \S*attention.1.running_var of \w+ need", str(error))
                refused.add(rule)
    assert refused == {
        "centered_clipping",
        "fedadam",
        "fedavgm",
        "fedbuff",
        "feddyn",
        "fedexp",
        "fednova",
        "fedyogi",
        "norm_bound",
        "pfedme",
        "q_fedavg",
        "scaffold",
    }


@component
class Counted(Method):
    """Has torch's batch norm, which counts its batches."""

    def build(self, backbone):
        return nn.Sequential(nn.BatchNorm1d(backbone.width))


def test_a_count_of_batches_is_refused_and_the_norm_without_it_is_named():
    with pytest.raises(InputError) as refused:
        initial_params(Task(Counted(), parse("server", "fedavg"), 0), Backbone(torch.eye(4), 1.0))
    assert str(refused.value).endswith(
        "has tensors that cannot be averaged: 0.num_batches_tracked; "
        "fedsim.methods._batch_norm.BatchNorm does not count batches"
    )


@component
class Normalized(Method):
    def build(self, backbone):
        return nn.Sequential(BatchNorm(backbone.width))


def test_a_batch_norm_is_refused_with_batches_of_one_row():
    with pytest.raises(InputError, match="has a BatchNorm, and one row has no variance; it needs min_batch = 2"):
        initial_params(Task(Normalized(), parse("server", "fedavg"), 0), Backbone(torch.eye(4), 1.0))


def test_the_gate_of_vit_b_16_has_526336_parameters():
    module = parse("method", "facmic").build(Backbone(torch.eye(512)[:4], 100.0))
    assert sum(tensor.numel() for tensor in module.parameters()) == 526_336
    assert flatten(module.state_dict()).size == 526_336 + 1024

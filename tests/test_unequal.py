"""Clients with unequal devices: what a client does not have it does not train, send or weigh."""

import copy
import json
import re
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from conftest import TOWERS, run_until
from test_finetune import Y, embedded, inputs, other, whole
from test_towers import pictures  # noqa: F401

from fedsim import Averaging, Batch, Config, InputError, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.fleets import Device
from fedsim.methods import trained
from fedsim.params import Params, flatten, unflatten
from fedsim.prepare import prepare
from fedsim.registry import parse
from fedsim.reporting.report import Report
from fedsim.reporting.tables import COLUMNS
from fedsim.rng import torch_rng
from fedsim.schedule import check, schedule
from fedsim.servers import Reply
from fedsim.servers._lora import first_ranks
from fedsim.servers.fedra import FedRA
from fedsim.servers.fltrust import FLTrust
from fedsim.servers.hetlora import HetLora
from fedsim.servers.lora_stacking import LoraStacking
from fedsim.training.accumulator import Accumulator
from fedsim.training.optimizer import Optimizer
from fedsim.training.rows import RuleInputs, TrainRows
from fedsim.training.train import train_client
from fedsim.updates import CLIENT_STATS, mean_delta, sum_chunks

LORA = {"name": "lora", "rank": 2, "lr": 3e-3, "batch_size": 8, "weight_decay": 0.01}
QUICK = {"dataset": "folder", "partition": "iid", "clients": 4, "actors": 0, "page": False, "rounds": 2, "method": LORA}
QUICK |= {"dtype": "float64", "eval_every": 2}
SPSA = {"estimator": "spsa"}
NOTES = []  # of the rules below, what clients have received and trained


def fleet(**lists):
    return {"name": "ideal", **lists}


@pytest.fixture(scope="module")
def tiny():
    return whole(*embedded())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def drawings(tmp_path_factory, pictures):  # noqa: F811
    """The fields of a Config for a handful of drawings, and a small CLIP whose text tower has four blocks."""
    file = tmp_path_factory.mktemp("clip") / "unequal.json"
    text = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 4}
    file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": {"image_size": 32, **TOWERS["vit"]}, "text_cfg": text}))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("unequal").state_dict(), weights := file.with_suffix(".pt"))
    return {"data_dir": pictures, "backbone": "unequal", "pretrained": str(weights)}


class Made(NamedTuple):
    report: Report
    params: Params  # after the last round
    notes: list  # NOTES of the run


@pytest.fixture(scope="module")
def of(tmp_path_factory, drawings):
    """Runs of LoRA on the text tower."""
    folder, done = tmp_path_factory.mktemp("unequal"), {}

    def make(**fields):
        name = repr(sorted(fields.items()))
        if name not in done:
            NOTES.clear()
            config = Config(**(QUICK | drawings | fields), out=folder / str(len(done)))
            report = run(config)
            done[name] = Made(report, load_checkpoint(config.folder(), config.experiment())[0].params, NOTES[:])
        return done[name]

    return make


# Devices ---------------------------------------------------------------------------------------------------------


def test_each_class_of_devices_has_its_share_of_the_clients_which_the_seed_draws():
    ours = parse("fleet", fleet(shares=".5,.3,.2", ranks="4,8,16"))
    assert ours.devices == (Device(rank=4), Device(rank=8), Device(rank=16))
    assert str(Device(4, 1, 2)) == "rank 4, 1 block, 2 local epochs"
    for clients, counts in ((10, [5, 3, 2]), (1000, [500, 300, 200]), (6, [3, 2, 1]), (1, [0, 1, 0])):
        classes = ours.classes(clients, seed=1)
        assert np.bincount(classes, minlength=3).tolist() == counts
    again, other = ours.classes(1000, seed=1), ours.classes(1000, seed=2)
    assert (again != other).sum() > 250 and (np.diff(again) < 0).sum() > 200  # in no order
    assert np.bincount(parse("fleet", fleet(blocks=[1, 2])).classes(7, seed=1)).tolist() in ([3, 4], [4, 3])
    assert parse("fleet", "ideal").classes(5, seed=1) is None


UNEQUAL = {"fleet": fleet(ranks="1,2"), "server": "hetlora"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fleet": fleet(shares="1,2", epochs="1,2,3")}, "one value for each class .* 3 in .*epochs and 2 in .*shares"),
        ({"fleet": fleet(shares="1,1e308", epochs="1,2")}, r"fleet.shares.1 must be <= 1000000, got '1e308'"),
        ({"fleet": fleet(epochs="1,,2")}, "fleet.epochs must be a list without an empty part, got '1,,2'"),
        ({"fleet": fleet(epochs="1,9999999999")}, r"fleet.epochs.1 must be <= 1000000000, got '9999999999'"),
        ({"fleet": fleet(shares="1,2")}, "fleet.shares has no effect without fleet.ranks"),
        ({"fleet": fleet(blocks="1,2")}, "fleet.blocks needs a server rule .* fedra, not fedavg"),
        ({"fleet": fleet(blocks="0,2")}, r"fleet.blocks.0 must be >= 1, got '0'"),
        ({"fleet": fleet(blocks="2,4"), "server": "fedra", "codec": "half"}, "codec half encodes whole updates"),
        ({"fleet": fleet(epochs="1,2"), "privacy": "central_dp"}, "privacy central_dp is accounted for equal clients"),
        ({"fleet": fleet(epochs="1,2"), "privacy": "example_dp"}, "privacy example_dp is accounted for equal clients"),
        ({"fleet": fleet(ranks="1,2"), "server": "fltrust"}, "fleet.ranks needs a server rule .*, not fltrust"),
        (UNEQUAL | {"attack": {"name": "ipm", "share": 0.5}}, "attack ipm forges whole updates"),
        (UNEQUAL | {"attack": {"name": "alie", "share": 0.5}}, "attack alie forges whole updates"),
        (UNEQUAL | {"method": LORA | SPSA}, "estimator spsa perturbs whole models"),
        (UNEQUAL | {"codec": "secure_aggregation"}, "codec secure_aggregation encodes whole updates"),
        (UNEQUAL | {"tune_epochs": 1}, "tune_epochs evaluates what clients have trained, .* parts of the model"),
    ],
)
def test_what_does_not_go_with_unequal_devices_is_refused_by_the_config_alone(fields, words):
    with pytest.raises(InputError, match=words):
        check(Config(**(QUICK | fields)), 4)


@component
class Sees(HetLora):
    needs_deltas = True


@component
class Sends(HetLora):
    unicasts = True


@pytest.mark.parametrize(("rule", "words"), [(Sees, "needs the delta of"), (Sends, "stores")])
def test_a_rule_of_whole_updates_cannot_heed_unequal_devices(rule, words):
    with pytest.raises(InputError, match=rf"{rule.__name__} {words} each .*, but with fleet\.ranks clients have parts"):
        check(Config(**(QUICK | UNEQUAL | {"server": rule()})), 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fleet": fleet(ranks="1,2")}, "fleet.ranks needs a server rule .*, not fedavg"),
        ({"fleet": fleet(blocks="2,5"), "server": "fedra"}, "fleet.blocks can be at most 4, .* text tower, got 5"),
        ({"server": "fedra", "method": LORA | {"persist_optimizer": True}}, "leave --method.persist-optimizer out"),
        ({"server": "fedra", "method": "probe"}, "server fedra needs the low-rank pairs of method lora, not probe"),
        (UNEQUAL | {"method": LORA | {"name": "fedms"}}, "private ones of fedms would stay whole"),
        (
            {"fleet": fleet(blocks="1,2"), "server": "fedra", "method": LORA | {"name": "feddlp"}},
            "private ones of feddlp would stay whole",
        ),
        (UNEQUAL | {"fleet": fleet(ranks="1,3")}, r"fleet\.ranks can be at most --method\.rank 2, got 3"),
        (
            {"fleet": fleet(ranks="1,3"), "server": "lora_stacking"},
            r"fleet\.ranks can be at most --method\.rank 2, got 3",
        ),
    ],
)
def test_what_a_model_does_not_allow_is_refused_before_anything_starts(fields, words, drawings, tmp_path):
    with pytest.raises(InputError, match=words):
        prepare(Config(**(QUICK | drawings | fields), out=tmp_path / "run"))


# The mean of what clients have -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("weights", [[1.0] * 5, [3.0, 1.0, 2.5, 0.0, 7.0]])
def test_an_entry_is_averaged_over_the_clients_that_have_it_in_any_chunks(weights, device):
    # As on a CPU, client by client, and as on a GPU, a stack at a time.
    rng = np.random.default_rng(0)
    shared = unflatten(rng.standard_normal(9), {"a": torch.zeros(3, 2), "b": torch.zeros(3)})
    trained = rng.standard_normal((5, 9))
    held = [{"a": torch.tensor([[True], [k > 1], [False]]), "b": torch.tensor(k != 2)} for k in range(4)] + [{}]
    full = np.stack([np.r_[np.ones(2), [k > 1] * 2, [k == 4] * 2, [k != 2 or k == 4] * 3] for k in range(5)])
    weighed = full * np.array(weights)[:, None]
    expected = (weighed * (trained - flatten(shared))).sum(axis=0) / np.maximum(weighed.sum(axis=0), 1e-300)
    for parts in ([range(5)], [range(2), range(2, 5)], [[4], [3], [0, 1, 2]]):
        chunks = []
        for part in parts:
            total = Accumulator(shared, "cpu")
            total.by_stack = device != "cpu"
            stack = [unflatten(trained[k] * full[k], shared) for k in part]  # the others are zero
            replies = [Reply(weights[k]) for k in part]
            tensors = {name: torch.stack([client[name] for client in stack]) for name in shared}
            total.add(list(part), tensors, replies, [held[k] for k in part])
            chunks.append(total.sum(np.zeros(len(part), CLIENT_STATS), 1))
        mean = flatten(mean_delta(sum_chunks(chunks), shared))
        np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-14)


def test_an_entry_that_no_client_has_stays_and_a_sum_of_whole_clients_is_that_of_fedavg():
    shared = {"a": torch.ones(2, dtype=torch.float64)}
    sums = {}
    for name, mask in (("none", torch.tensor([True, False])), ("all", None)):
        total = Accumulator(shared, "cpu")
        after = torch.tensor([[3.0, 1.0 if name == "none" else 5.0]], dtype=torch.float64)
        total.add([0], {"a": after}, [Reply(0.3)], [{} if mask is None else {"a": mask}])
        sums[name] = total.sum(np.zeros(1, CLIENT_STATS), 1)
    assert sums["all"].held is None
    np.testing.assert_allclose(flatten(mean_delta(sum_chunks([sums["none"]]), shared)), [2, 0])
    np.testing.assert_allclose(flatten(mean_delta(sum_chunks([sums["none"], sums["all"]]), shared)), [2, 4])


# A rule of ours, by which clients with a low rank have the first rows of a head -------------------------------------


@component
class FirstRows(Averaging):
    heeds = frozenset(("rank",))

    def held(self, params, device, rng):
        return {"weight": torch.arange(len(params["weight"]))[:, None] < device.rank}

    def gradient(self, params, received, client_state, sent):
        return {"weight": 0.1 * (params["weight"] - received["weight"])}

    def reply(self, update):
        NOTES.append((update.received["weight"].clone(), update.trained["weight"].clone()))
        return super().reply(update)


@pytest.mark.parametrize(
    "method",
    [
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "adam", "weight_decay": 0.1, "persist_optimizer": True},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.01},
    ],
    ids=["adamw", "adam", "sgd"],
)
def test_entries_that_a_client_does_not_have_stay_zero_under_every_optimizer_and_the_paths_agree(
    method, config, tmp_path
):
    fields = {"method": {"name": "probe", "lr": 1e-2, "batch_size": 4, **method}, "partition": "iid", "clients": 6}
    fields |= {"fleet": fleet(ranks="1,3,3", epochs="2,1,3"), "dtype": "float64", "rounds": 2}
    results = []
    for name, more in {"stacks": {"chunk": 3}, "single": {"engine": "reference"}}.items():
        NOTES.clear()
        report = run(config(**fields, **more, server=FirstRows(), out=tmp_path / name))
        results.append(flatten(report.adapter))
        ranks = [int((received != 0).any(dim=1).sum()) for received, _ in NOTES[-12:]]
        assert {1, 3} == set(ranks)
        for rank, (received, after) in zip(ranks, NOTES[-12:], strict=True):
            assert (received[rank:] == 0).all() and (after[rank:] == 0).all()
            assert not torch.equal(received[:rank], after[:rank])
        costs = report.tables().rounds
        table = report.tables().clients
        assert costs.bytes_up.tolist() == [8 * 24 * table["rank"].sum()] * 2 == costs.bytes_down.tolist()
        assert table.bytes_up.tolist() == (8 * 24 * table["rank"]).tolist() and set(table.device) == {0, 1, 2}
    np.testing.assert_allclose(results[1], results[0], rtol=1e-9)


# Local epochs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"server": "ditto", "attack": {"name": "alie", "share": 0.5}},
        {"method": {"name": "probe", "batch_size": 8, **SPSA}, "codec": {"name": "secure_aggregation", "clip": 0.1}},
    ],
    ids=["ditto and alie", "spsa and secure_aggregation"],
)
def test_local_epochs_of_a_device_are_those_of_the_method_to_the_bit_in_time_and_operations_too(
    fields, config, tmp_path
):
    fields = {"method": {"name": "probe", "batch_size": 8}, "partition": "iid", "clients": 4, "rounds": 2} | fields
    fields["tune_epochs"] = 1  # not those of the device
    slow = {"name": "lognormal", "down_mbps": 1e-3}
    ours = run(config(**fields, fleet=slow | {"epochs": "3"}, out=tmp_path / "ours"))
    fields["method"] = fields["method"] | {"local_epochs": 3}
    theirs = run(config(**fields, fleet=slow, out=tmp_path / "theirs"))
    assert (flatten(ours.adapter) == flatten(theirs.adapter)).all()
    unlike = [name for name, column in ours.tables().rounds.items() if not column.equals(theirs.tables().rounds[name])]
    assert unlike == ["seconds"]
    assert ours.tables().scores.equals(theirs.tables().scores) and ours.tuned is not None


@component
class Trust(FLTrust):
    def step(self, params, slots, total, rng):
        NOTES.append(total.require_root())
        return super().step(params, slots, total, rng)


def test_what_the_server_trains_itself_does_not_depend_on_the_devices_of_clients(config, tmp_path):
    fields = {"method": "probe", "partition": "iid", "clients": 4, "rounds": 1, "server": Trust(root_rows=9)}
    NOTES.clear()
    for name, ours in (("equal", fleet()), ("unequal", fleet(epochs="2,3"))):
        run(config(**fields, fleet=ours, out=tmp_path / name))
    assert (NOTES[0] == NOTES[1]).all() and NOTES[0].any()


def test_clients_take_the_steps_of_their_own_epochs(config, tmp_path):
    fields = {"method": {"name": "probe", "batch_size": 1000}, "partition": "iid", "clients": 9, "rounds": 1}
    report = run(config(**fields, seed=2, fleet=fleet(shares="1,2", epochs="1,4"), out=tmp_path / "ours"))
    table = report.tables().clients
    assert set(table.epochs) == {1, 4} and report.facts["devices"].endswith(" clients with 4 local epochs")
    assert report.tables().rounds.steps.tolist() == [table.epochs.sum()]
    per_step, per_row = (report.facts[f"flops_per_{each}"] for each in ("step", "row"))
    rows = report.tables().partition.query("split == 'train'").groupby("client").rows.sum()
    assert report.tables().rounds.flops[0] == pytest.approx(
        table.epochs.sum() * per_step + (table.epochs * rows).sum() * per_row
    )


def test_time_is_that_of_each_clients_own_bytes():
    devices = {"epochs": "1,3", "rows_per_s": 10, "speed_sigma": 0, "bandwidth_sigma": 0, "down_mbps": 8, "up_mbps": 4}
    ours = Config(fleet={"name": "lognormal"} | devices, cohort=1, seed=1)
    classes = ours.fleet.classes(6, 1)
    down = np.arange(1, 7) * 1_000_000
    before = 0.0
    for planned in islice(schedule(ours, 6, lambda ids, round: np.full(len(ids), 20), down, np.zeros(6, int)), 12):
        ((client, _),) = planned.trained
        assert planned.clock_s - before == pytest.approx(2 * (1, 3)[classes[client]] + client + 1)
        assert planned.bytes_down == down[client]
        before = planned.clock_s


# FedRA -------------------------------------------------------------------------------------------------------------


def test_with_all_blocks_fedra_is_lora_to_the_bit_in_operations_and_nearly_in_bytes(of):
    lora, *others = of(server="fedavg"), of(server="fedra"), of(server="fedra", fleet=fleet(blocks="4,4"))
    theirs, costs = lora.params, lora.report.tables().rounds
    for fedra in others:
        ours = fedra.params
        assert ours.keys() - theirs.keys() == {"blocks.text"} and (ours["blocks.text"] == 1).all()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        for column in ("flops", "loss", "steps"):
            assert fedra.report.tables().rounds[column].equals(costs[column])
        for column in ("bytes_up", "bytes_down"):  # four numbers of four blocks
            assert (fedra.report.tables().rounds[column] == costs[column] + 4 * 4 * 8).all()


@component
class Noted(FedRA):
    def reply(self, update):
        NOTES.append({name: tensor.clone() for name, tensor in update.trained.items()})
        return super().reply(update)


PARTS = {"server": Noted(), "fleet": fleet(blocks="1,3", shares="1,2"), "seed": 3}


def test_bytes_and_operations_are_those_of_the_blocks_that_a_client_has(of):
    report = of(**PARTS).report
    table, pairs = report.tables().clients, of(server="fedavg").report.tables().clients.bytes_up[0]
    assert set(table.blocks) == {1, 3}
    assert table.bytes_up.tolist() == (table.blocks * (pairs // 4 + 8)).tolist() and len(table) == 4
    assert report.tables().rounds.bytes_down.tolist() == [table.bytes_down.sum()] * 2
    one, three = (costs[0] for costs in report.facts["flops_of_devices"])
    assert report.facts["flops_per_step"] - three == pytest.approx((three - one) / 2, rel=1e-6)  # a block more


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_clients_model_is_the_tower_cut_to_its_blocks(side, folder):
    """Against method lora on open_clip's modules without the other blocks, in values and in gradients."""
    model, tokenizer = other("vit", folder) if side == "image" else embedded()
    cut = copy.deepcopy(model)
    blocks = (cut.visual if side == "image" else cut).transformer.resblocks
    own = [k for k in range(len(blocks)) if k % 2]
    (cut.visual if side == "image" else cut).transformer.resblocks = torch.nn.ModuleList(blocks[k] for k in own)
    method = parse("method", LORA | {"towers": side, "modules": "all"})
    (backbone, pixels, features), (less, *_) = whole(model, tokenizer), whole(cut, tokenizer)
    less = replace(less, class_embeddings=backbone.class_embeddings)
    ours, theirs = parse("server", "fedra").adapt(method).build(backbone).double(), method.build(less).double()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.05)
    state = dict(ours.named_parameters())
    names = {
        name: re.sub(r"resblocks/(\d+)", lambda m: f"resblocks/{own[int(m[1])]}", name) for name in trained(theirs)
    }
    for name, tensor in theirs.named_parameters():
        state[names[name]].data.copy_(tensor)
    getattr(ours.blocks, side).copy_(torch.tensor([float(k in own) for k in range(len(blocks))]))
    batch = Batch(inputs(method, pixels, features), Y)
    losses = [method.loss(module, batch) for module in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    grads, fewer = (
        torch.autograd.grad(loss, [*m.parameters()], materialize_grads=True)
        for loss, m in zip(losses, (ours, theirs), strict=True)
    )
    grads = dict(zip(trained(ours), grads, strict=True))
    for name, grad in zip(trained(theirs), fewer, strict=True):
        assert grad.norm() > 0
        torch.testing.assert_close(grads.pop(names[name]), grad, rtol=1e-9, atol=1e-12)
    assert grads and all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("more", [{"chunk": 1}, {"engine": "reference"}], ids=["chunks", "reference"])
def test_the_server_averages_a_block_over_the_clients_that_had_it(more, of):
    _, ours, notes = of(**PARTS, **more)
    notes, means = notes[-8:], {}  # of two rounds
    for name in (name for name in notes[0] if name.startswith("up.")):
        block = int(name.split("resblocks/")[1].split("/")[0])
        sent = [each[name] for each in notes[4:] if each["blocks.text"][block]]
        assert all((each[name] == 0).all() for each in notes if not each["blocks.text"][block])
        means[name] = len(sent)
        if sent:
            torch.testing.assert_close(ours[name], torch.stack(sent).mean(dim=0), rtol=1e-10, atol=1e-14)
    assert len(set(means.values())) > 1 and len({tuple(each["blocks.text"].tolist()) for each in notes}) > 2
    for name, tensor in of(**PARTS).params.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-9)


def test_a_resumed_run_gives_clients_the_same_blocks(of, drawings, tmp_path):
    config = Config(**(QUICK | PARTS | drawings), out=tmp_path / "run")
    run_until(1, config)
    run(config)
    resumed = load_checkpoint(config.folder(), config.experiment())[0].params
    assert all(torch.equal(resumed[name], tensor) for name, tensor in of(**PARTS).params.items())


# Unequal ranks -----------------------------------------------------------------------------------------------------

RANKS = {"method": LORA | {"rank": 4}, "fleet": fleet(ranks="1,4", shares="1,1"), "seed": 3}


@component
class Notes(HetLora):
    def reply(self, update):
        NOTES.append({name: tensor.clone() for name, tensor in update.trained.items()})
        return super().reply(update)


@pytest.mark.parametrize("method", [{}, {"optimizer": "sgd", "momentum": 0.9, "clip_norm": 0.01}], ids=["adamw", "sgd"])
def test_a_client_of_a_lower_rank_trains_lora_of_that_rank(method, tiny):
    backbone, _, features = tiny
    long, short = (
        parse("method", LORA | {"objective": "cross_entropy", "local_epochs": 4} | method | fields)
        for fields in ({"rank": 4, "alpha": 8.0}, {"rank": 1, "alpha": 2.0})
    )
    ours, theirs = long.build(backbone).double(), short.build(backbone).double()
    masks = first_ranks(ours.state_dict(), Device(rank=1))
    for name, tensor in ours.named_parameters():
        tensor.data.normal_(std=0.1).mul_(masks[name])
        theirs.get_parameter(name).data.copy_(
            tensor[masks[name].expand(tensor.shape)].view(theirs.get_parameter(name).shape)
        )
    rows, rule = TrainRows(features, Y, [len(Y)]), parse("server", "hetlora")
    for module, own, held in ((ours, long, masks), (theirs, short, {})):
        params = {name: tensor.detach().unsqueeze(0) for name, tensor in module.named_parameters()}
        optimizer = Optimizer(own, params)
        inputs = RuleInputs(dict(module.named_parameters()), held=[held])
        train_client(module, optimizer, rows, own, rule, inputs, torch_rng(0, "x"))
    for name, tensor in theirs.named_parameters():
        longer = ours.get_parameter(name)
        torch.testing.assert_close(longer[masks[name].expand(longer.shape)], tensor.flatten(), rtol=1e-9, atol=1e-12)
        assert (longer * ~masks[name] == 0).all()


def test_the_mean_of_unequal_pairs_is_that_of_pairs_padded_with_zeros_by_their_norms(of):
    _, ours, notes = of(**RANKS, server=Notes())
    sent = notes[-4:]
    pairs = [name for name in sent[0] if name.startswith("up.")]
    ranks = [int((each[pairs[0]] != 0).flatten(0, -2).any(dim=0).sum()) for each in sent]
    assert set(ranks) == {1, 4}
    norms = [sum((each[n] @ each[n.replace("up.", "down.")]).norm() ** 2 for n in pairs) ** 0.5 for each in sent]
    assert max(norms) > 1.2 * min(norms)
    for name, tensor in ours.items():
        expected = sum(norm * each[name] for norm, each in zip(norms, sent, strict=True)) / sum(norms)
        torch.testing.assert_close(tensor, expected, rtol=1e-10, atol=1e-12)
    reference = of(**RANKS, server="hetlora", engine="reference").params
    for name, tensor in ours.items():
        torch.testing.assert_close(reference[name], tensor, rtol=1e-6, atol=1e-9)


def test_with_equal_ranks_and_weights_hetlora_is_fedit_and_stacking_is_as_without_a_fleet_to_the_bit(of):
    even = RANKS | {"fleet": fleet(ranks="4")}
    uniform = {"name": "hetlora", "weighting": "uniform"}
    for ranked, plain in (
        (of(**even, server=uniform), of(method=RANKS["method"], seed=3, server="fedavg")),
        (of(**even, server="lora_stacking"), of(method=RANKS["method"], seed=3, server="lora_stacking")),
    ):
        assert all(torch.equal(ranked.params[name], tensor) for name, tensor in plain.params.items())
        kept = [name for name in COLUMNS["rounds"] if name != "seconds"]
        assert ranked.report.tables().rounds[kept].equals(plain.report.tables().rounds[kept])


def test_directions_that_no_client_of_a_round_has_stay():
    params = {"up.a": torch.ones(3, 4, dtype=torch.float64), "down.a": torch.ones(4, 2, dtype=torch.float64)}
    total = Accumulator(params, "cpu")
    held = [first_ranks(params, Device(rank=rank)) for rank in (1, 3)]
    trained = {name: torch.stack([3 * tensor * masks[name] for masks in held]) for name, tensor in params.items()}
    total.add([0, 1], trained, [Reply(1.0), Reply(2.0)], held)
    after, _ = HetLora().step(params, {}, sum_chunks([total.sum(np.zeros(2, CLIENT_STATS), 1)]), torch_rng(0, "x"))
    expected = torch.tensor([3.0, 2, 2, 1], dtype=torch.float64)  # of both, of one of two thirds of the weight, of none
    torch.testing.assert_close(after["up.a"], expected.expand(3, 4))
    torch.testing.assert_close(after["down.a"], expected[:, None].expand(4, 2))


@component
class Stacks(LoraStacking):
    def reply(self, update):
        NOTES.append({name: tensor.clone() for name, tensor in update.trained.items()})
        return super().reply(update)


def test_bytes_and_operations_are_those_of_each_clients_own_rank(of):
    report = of(**RANKS, server=Notes()).report
    table, costs = report.tables().clients, report.facts["flops_of_devices"]
    for device, rank in enumerate((1, 4)):
        alone = of(method=LORA | {"rank": rank}, seed=3, server="fedavg", rounds=(0, 2)[device]).report
        assert costs[device] == [alone.facts["flops_per_step"], alone.facts["flops_per_row"]]
        one = table[table["rank"] == rank].iloc[0]
        assert one.bytes_up == one.bytes_down == alone.tables().clients.bytes_up[0]
    stacked = of(**RANKS, server=Stacks(), rounds=1).report.tables()
    assert (stacked.clients.bytes_down == table.bytes_up.sum()).all()  # the stack of the whole cohort
    assert stacked.clients.bytes_up.tolist() == table.bytes_up.tolist()
    assert stacked.rounds.bytes_down.tolist() == [4 * table.bytes_up.sum()]


def test_the_stack_of_unequal_pairs_is_exactly_the_mean_of_the_clients_products(of):
    _, ours, notes = of(**RANKS, server=Stacks(), rounds=1)
    sent = notes[-4:]
    merged = {name: tensor for name, tensor in ours.items() if name.startswith("merged.")}
    ranks = set()
    for name, tensor in merged.items():
        up, down = (name.replace("merged.", part, 1) for part in ("up.", "down."))
        torch.testing.assert_close(tensor, sum(each[up] @ each[down] for each in sent) / 4, rtol=1e-10, atol=1e-14)
        ranks |= {
            int(torch.linalg.matrix_rank((each[up] @ each[down])[0], rtol=1e-9)) for each in sent if each[up].dim() > 2
        }
    assert ranks == {1, 4}

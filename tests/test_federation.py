"""Partitions, clients, methods and server rules: what each promises, for every one that is there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim import Backbone, FixedPartition, InputError, available, run
from fedsim.clients import make_clients, sample_cohort
from fedsim.clip.checkpoints import find_weights
from fedsim.clip.model import Clip
from fedsim.datasets import TEST, UNASSIGNED, Labels
from fedsim.methods import Batch, ClientContext, masked
from fedsim.params import flatten, unflatten
from fedsim.registry import parse
from fedsim.servers import ClientUpdate
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task
from fedsim.updates import CLIENT_STATS, RoundSum, sum_chunks

rng = np.random.default_rng


def rows(count=240, domains=3, classes=4, split=UNASSIGNED, **fields):
    index = np.arange(count)
    labels = {"y": index % classes, "domain": index // classes % domains}
    names = {"classes": tuple("abcdef"[:classes]), "domains": ("ink", "oil", "photo")[:domains]}
    return Labels(**(labels | names | {"split": np.full(count, split, np.int8)} | fields))


RNG = torch.Generator()


def weight_of(server, rows):
    return server.reply(ClientUpdate({}, {}, {}, {}, rows, 1, 0, parse("method", "probe"), 1e-3)).weight


def an_update(weight, **delta):
    params = {name: torch.tensor(value, dtype=torch.float64) for name, value in delta.items()}
    return RoundSum(weight * flatten(params), weight, np.array([(0, 1, 1, 0.0, weight)], CLIENT_STATS))


# Partitions -----------------------------------------------------------------------------------------------------


FIXED = [name for name in available("partition") if isinstance(parse("partition", name), FixedPartition)]
DRAWN = sorted(set(available("partition")) - set(FIXED))  # client by client


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("count", [3, 6])
def test_every_partition_deals_rows_once_and_by_its_seed(name, count):
    data, partition = rows(classes=6), parse("partition", name)
    parts = partition.split(data.y, data.domain, count, rng(1))
    again = partition.split(data.y, data.domain, count, rng(1))
    everyone = np.concatenate(parts)
    assert len(parts) == count and all(len(part) for part in parts)
    assert len(np.unique(everyone)) == len(everyone) and set(everyone) <= set(range(len(data)))
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("name", DRAWN)
def test_every_partition_that_draws_gives_a_client_the_same_rows_whoever_is_asked_first(name):
    data = parse("dataset", {"name": "synthetic", "rows": 20}).load(None) if name == "natural" else rows()
    partition = parse("partition", name)
    one, other = (make_clients(data, partition, 1000, (), seed=3) for _ in range(2))
    assert one.trainers == len(one) == 1000
    backwards = {k: other[k] for k in reversed(range(1000))}
    splits = "train", "val", "test"
    for k in (0, 1, 500, 999):
        assert all(np.array_equal(getattr(one[k], split), getattr(backwards[k], split)) for split in splits)
        assert len(one[k].train) and (np.diff(one[k].train) >= 0).all()
    with pytest.raises(InputError, match=f"partition {name} needs --clients N"):
        make_clients(data, partition, None, (), seed=3)


@pytest.mark.parametrize("name", sorted(set(FIXED) - {"by_domain"}))
def test_partitions_say_what_number_of_clients_they_want(name):
    data, partition = rows(), parse("partition", name)
    with pytest.raises(InputError, match="needs --clients N, a number of clients from 1 to 240"):
        partition.split(data.y, data.domain, None, rng())
    with pytest.raises(InputError, match="300 clients for 240 rows"):
        partition.split(data.y, data.domain, 300, rng())


def test_by_domain_gives_each_client_one_domain():
    data = rows()
    for count in (None, 6):
        parts = parse("partition", "by_domain").split(data.y, data.domain, count, rng())
        assert [len(set(data.domain[part])) for part in parts] == [1] * (count or 3)
    with pytest.raises(InputError, match="a multiple of the 3 training domains, not 4 clients"):
        parse("partition", "by_domain").split(data.y, data.domain, 4, rng())


def test_shards_give_a_client_few_classes_from_all_domains():
    data = rows()
    parts = parse("partition", {"name": "shards", "per_client": 1}).split(data.y, data.domain, 4, rng())
    assert [len(set(data.y[part])) for part in parts] == [1, 1, 1, 1]
    assert [len(set(data.domain[part])) for part in parts] == [3, 3, 3, 3]


def test_classes_are_dealt_whole_and_evenly_by_the_seed_of_the_partition():
    data, partition = rows(classes=6), parse("partition", "classes")
    parts = partition.split(data.y, data.domain, 4, rng(0))
    hands = [sorted(set(data.y[part])) for part in parts]
    assert [len(hand) for hand in hands] == [2, 2, 1, 1] and sorted(np.concatenate(hands)) == [0, 1, 2, 3, 4, 5]
    assert sum(map(len, parts)) == len(data)  # all rows of a class are its client's
    assert all(set(data.domain[part]) == {0, 1, 2} for part in parts)
    other = partition.split(data.y, data.domain, 4, rng(1))
    assert hands != [sorted(set(data.y[part])) for part in other]
    with pytest.raises(InputError, match="7 clients for 6 classes; partition classes gives each class to one client"):
        partition.split(data.y, data.domain, 7, rng())


def test_a_long_tail_falls_from_the_first_class_to_the_last():
    data = rows(1200)  # 300 of each class
    partition = parse("partition", {"name": "long_tail", "factor": 27, "alpha": 1.0})
    parts = partition.split(data.y, data.domain, 4, rng(0))
    assert np.bincount(data.y[np.concatenate(parts)]).tolist() == [300, 100, 33, 11]
    less = np.flatnonzero((data.y > 0) | (np.arange(1200) < 800))  # 200 rows of the first class: all are used
    parts = partition.split(data.y[less], data.domain[less], 4, rng(0))
    assert np.bincount(data.y[less][np.concatenate(parts)]).tolist() == [200, 100, 33, 11]
    even = parse("partition", {"name": "long_tail", "factor": 1}).split(data.y, data.domain, 4, rng(0))
    assert sum(map(len, even)) == 1200


def test_pachinko_draws_domains_then_their_classes_until_all_rows_are_used():
    # Domains as coarse labels: 20 domains of 5 classes of their own, 20 rows each, as in CIFAR-100.
    labels = np.repeat(np.arange(100), 20)
    domains = labels // 5

    def shares(**fields):
        """Of the first 10 of 20 clients: the largest share of a domain, and of a class in that domain."""
        parts = parse("partition", {"name": "pachinko", **fields}).split(labels, domains, 20, rng(0))
        assert [len(part) for part in parts] == [100] * 20 and sorted(np.concatenate(parts)) == list(range(2000))
        by_class = [np.bincount(labels[part], minlength=100).reshape(20, 5) for part in parts[:10]]
        home = [counts[counts.sum(axis=1).argmax()] for counts in by_class]
        return np.mean([counts.sum() for counts in home]) / 100, np.mean(
            [counts.max() / counts.sum() for counts in home]
        )

    coarse, fine = shares()
    even, _ = shares(alpha=1000.0)
    _, skewed = shares(beta=0.1)
    assert coarse > 0.4 > 0.15 > even and skewed > 0.4 > 0.35 > fine
    shares(alpha=1e-3, beta=1e-3)  # whose shares are rounded to 0 for all but a few


def test_a_smaller_alpha_skews_labels_more():
    data = rows()

    def skew(alpha):
        parts = parse("partition", {"name": "dirichlet", "alpha": alpha, "min_rows": 1}).split(
            data.y, data.domain, 6, rng(0)
        )
        return np.mean([np.bincount(data.y[part], minlength=4).max() / len(part) for part in parts])

    assert skew(0.05) > 0.7 > 0.35 > skew(100.0)
    with pytest.raises(InputError, match="fewer than 60 rows"):
        parse("partition", {"name": "dirichlet", "alpha": 0.01, "min_rows": 60}).split(data.y, data.domain, 6, rng())


# Clients --------------------------------------------------------------------------------------------------------


def test_a_domain_of_eighty_rows_is_split_48_16_16_and_a_held_out_one_is_all_test():
    data = rows()
    clients = make_clients(data, parse("partition", "by_domain"), None, ("oil",), seed=0)
    sizes = [(len(client.train), len(client.val), len(client.test)) for client in clients]
    assert clients.trainers == 2
    assert sizes == [(48, 16, 16), (48, 16, 16), (0, 0, 80)]
    assert set(data.domain[clients[2].test]) == {1}
    other = make_clients(data, parse("partition", "by_domain"), None, ("oil",), seed=1)
    assert not np.array_equal(other[0].train, clients[0].train)


def test_a_sets_own_test_rows_are_never_trained_on_and_judge_held_out_domains():
    split = np.where(np.arange(240) % 5 == 0, TEST, UNASSIGNED).astype(np.int8)
    clients = make_clients(rows(split=split, unseen_test=True), parse("partition", "iid"), 4, ("ink",), seed=0)
    for client in clients:
        assert set(split[client.test]) == {TEST}
        assert TEST not in split[client.train] and TEST not in split[client.val]
    for client in list(clients)[:4]:  # 3 in 4 of the other rows train, as 60 are to 20
        assert abs(len(client.train) - 3 * len(client.val)) <= 2


def test_the_door_names_domains_and_clients():
    partition = parse("partition", "by_domain")
    with pytest.raises(InputError, match="no domain 'sketch' to hold out; available: ink, oil, photo"):
        make_clients(rows(), partition, None, ("sketch",), 0)
    with pytest.raises(InputError, match="all domains are held out"):
        make_clients(rows(), partition, None, ("ink", "oil", "photo"), 0)
    with pytest.raises(InputError, match="clients 0, 1, 2 have no train rows"):
        make_clients(rows(3, classes=1), partition, None, (), 0)


def test_cohorts_are_ascending_drawn_by_round_and_without_replacement():
    drawn = [sample_cohort(100, 10, seed=0, round=round) for round in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(cohort == sorted(set(cohort)) and len(cohort) == 10 for cohort in drawn)
    assert sample_cohort(3, None, 0, 1) == [0, 1, 2]


# Methods --------------------------------------------------------------------------------------------------------


@pytest.fixture
def backbone():
    text = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    return Backbone(text, 100.0)


@pytest.fixture
def towers(backbone, small_clip):
    """The backbone of a method, with those towers that it reads, and six inputs."""
    clip = Clip(find_weights(**small_clip("towers", "vit")))

    def make(method):
        x = {"features": torch.randn(6, 8), "tokens": torch.randn(6, 16, 8)}
        x["all_tokens"] = torch.randn(6, 17, 8)
        x["pixels"] = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
        text = clip.text_tower(method.reads.text == "blocks") if method.reads.text != "features" else None
        image = clip.image_tower() if method.reads.image == "pixels" else None
        names = {"classes": ("cat", "dog", "owl", "pig"), "text_tower": text, "image_tower": image}
        names["groups"] = "old", "young"
        return replace(backbone, **names), x[method.reads.image]

    return make


@pytest.mark.parametrize("name", available("method"))
def test_every_method_scores_classes_and_learns_only_what_travels(name, towers):
    method = parse("method", name)
    backbone, x = towers(method)
    module, y = method.build(backbone), torch.tensor([0, 1, 2, 3, 0, 1])
    assert module(x).shape == (6, 4)
    assert method.loss(module, Batch(x, y, target=x if method.reads_target else None, group=y // 2)).shape == ()
    assert {n for n, _ in module.named_parameters()} <= set(module.state_dict())
    assert all(tensor.is_floating_point() for tensor in module.state_dict().values())


@pytest.mark.parametrize("name", available("method"))
def test_every_method_masks_inactive_classes_and_cannot_forget_them(name, towers):
    method = parse("method", name)
    backbone, x = towers(method)
    module, classes = masked(method.build(backbone)), torch.tensor([True, True, False, True])
    logits = module(x, classes)
    assert logits[:, classes].isfinite().all() and (logits[:, 2] == -torch.inf).all()
    with pytest.raises(TypeError, match=r"module\(batch\.x, batch\.classes\)"):
        module(x)


@pytest.mark.parametrize("name", available("method"))
def test_every_method_starts_the_same_from_the_same_seed(name, towers):
    backbone, _ = towers(parse("method", name))

    def at(seed):
        return flatten(initial_params(Task(parse("method", name), parse("server", "fedavg"), seed), backbone))

    assert np.array_equal(at(5), at(5))


def test_the_adapter_of_vit_b_32_has_525312_parameters():
    module = parse("method", "fedclip").build(Backbone(torch.eye(512)[:7], 100.0))
    assert sum(p.numel() for p in module.parameters()) == 525_312


def test_the_probe_starts_as_zero_shot_clip(backbone):
    x = torch.randn(6, 8)
    probe, plain = (parse("method", name).build(backbone) for name in ("probe", "zero_shot"))
    assert torch.equal(probe(x), plain(x))


# Server rules ---------------------------------------------------------------------------------------------------


# Shapes of what the rules of one method need, with two domains, three classes and four groups.
NEEDED = {
    "domain_prompts": {"tokens": (2, 1, 3)},
    "domain_means": {"text_prompts": (2, 1, 1, 3), "visual_prompts": (2, 1, 1, 3)},
    "group_keys": {"keys": (4, 3), "grouped": (1, 4, 3), "counts": (4,)},
    "label_clusters": {"class_aware": (3, 1, 2), "general": (1, 2)},
}


@pytest.mark.parametrize("name", available("server"))
def test_every_server_leaves_its_arguments_alone_and_keeps_shapes_and_dtypes(name):
    params, server = {"w": torch.tensor([1.0, 2.0])}, parse("server", name)
    params |= {n: torch.arange(float(np.prod(shape))).view(shape) for n, shape in NEEDED.get(name, {}).items()}
    went, client = {n: t + 2 for n, t in params.items()}, ClientContext(torch.tensor(1), torch.tensor([3, 2, 3]), 1)
    start, kept = server.init(params)
    sent, method = server.broadcast(start, params), parse("method", "probe")
    trained = {n: t + went[n] for n, t in params.items()}
    update = ClientUpdate(params, trained, kept, sent, 8, 2, 0, method, method.lr, loss=0.5, client=client)
    reply = server.reply(update)
    weight, message = reply.weight, reply.message
    assert reply.client_state.keys() == kept.keys()
    pairs = {"shared.w": params["w"], "own.w": params["w"]} if name == "ditto" else params
    received = {n: t for n, t in pairs.items() if n != "own.w"}
    assert server.gradient(pairs, received, reply.client_state, sent).keys() <= pairs.keys()
    clients = 7  # enough for `bulyan`, which needs the most
    total = RoundSum(
        np.zeros(0) if server.needs_deltas else clients * weight * flatten(went).astype(np.float64),
        clients * weight,
        np.array([(client, 8, 2, 0.0, weight) for client in range(clients)], CLIENT_STATS),
        clients * weight * flatten(message).astype(np.float64),
        np.tile(flatten(went), (clients, 1)) if server.needs_deltas else None,
        np.tile(flatten(message).astype(np.float64), (clients, 1)) if server.needs_deltas else None,
        population=10,
        root=flatten(went).astype(np.float64),
    )
    before = [np.copy(some) for some in (total.delta, total.message, total.deltas) if some is not None]
    once, slots = server.step(params, start, total, RNG)
    assert slots.keys() == start.keys()
    held = {slot: {n: t.clone() for n, t in values.items()} for slot, values in slots.items()}
    twice, _ = server.step(once, slots, total, RNG)
    assert params["w"].tolist() == [1.0, 2.0] and all(torch.equal(went[n], t + 2) for n, t in params.items())
    assert all(map(np.array_equal, before, [s for s in (total.delta, total.message, total.deltas) if s is not None]))
    assert [(n, t.shape, t.dtype) for n, t in twice.items()] == [(n, t.shape, t.dtype) for n, t in params.items()]
    assert all(not torch.equal(once[n], params[n]) for n in NEEDED.get(name, {}) if n != "counts")
    assert all(torch.equal(slots[slot][n], held[slot][n]) for slot in held for n in held[slot])
    again = server.broadcast(slots, once)
    assert [(n, t.shape, t.dtype) for n, t in again.items()] == [(n, t.shape, t.dtype) for n, t in sent.items()]


def test_a_client_with_three_times_the_rows_counts_three_times():
    server = parse("server", {"name": "fedavg", "weighting": "rows"})
    total = sum_chunks([an_update(weight_of(server, 30), w=1.0), an_update(weight_of(server, 10), w=5.0)])
    assert server.step({"w": torch.tensor(0.0)}, {}, total, RNG)[0]["w"] == 2.0  # (30 * 1 + 10 * 5) / 40
    uniform = parse("server", "fedavg")
    total = sum_chunks([an_update(weight_of(uniform, 30), w=1.0), an_update(weight_of(uniform, 10), w=5.0)])
    assert uniform.step({"w": torch.tensor(0.0)}, {}, total, RNG)[0]["w"] == 3.0  # (1 + 5) / 2


def test_fedavgm_keeps_its_momentum():
    server, params = parse("server", {"name": "fedavgm", "beta": 0.5}), {"w": torch.tensor(0.0)}
    slots, _ = server.init(params)
    for expected in (1.0, 2.5, 4.25):  # steps of 1, then 0.5 * 1 + 1, then 0.5 * 1.5 + 1
        params, slots = server.step(params, slots, an_update(1.0, w=1.0), RNG)
        assert params["w"] == expected


def test_fedadam_takes_the_steps_of_the_paper():
    fields = {"name": "fedadam", "lr": 1.0, "beta1": 0.5, "beta2": 0.75, "tau": 0.5}
    server, params = parse("server", fields), {"w": torch.tensor(0.0)}
    params, _ = server.step(params, server.init(params)[0], an_update(1.0, w=2.0), RNG)
    # m = 0.5 * 2; v = 0.75 * 0.5**2 + 0.25 * 2**2 = 1.1875
    assert params["w"].item() == pytest.approx(1.0 / (1.1875**0.5 + 0.5))


def test_fedprox_pulls_by_mu_times_the_distance():
    server = parse("server", {"name": "fedprox", "mu": 0.5})
    live, received = {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}
    assert server.gradient(live, received, {}, {})["w"].tolist() == [1.0, 0.0]  # 0.5 * (3 - 1)


def test_fedprox_with_mu_0_is_fedavg_and_with_mu_trains_elsewhere(config, tmp_path):
    def adapter(**server):
        method = {"name": "fedclip", "lr": 1e-2}
        out = tmp_path / "-".join(map(str, server.values()))
        return flatten(run(config(server=server, method=method, out=out)).adapter)

    plain = adapter(name="fedavg")
    assert np.array_equal(plain, adapter(name="fedprox", mu=0.0))
    assert not np.allclose(plain, adapter(name="fedprox", mu=10.0))


def test_fedavgm_without_momentum_is_fedavg(config, tmp_path):
    plain = run(config(out=tmp_path / "a"))
    same = run(config(out=tmp_path / "b", server={"name": "fedavgm", "beta": 0.0}))
    assert np.array_equal(flatten(plain.adapter), flatten(same.adapter))


def test_local_only_sends_nothing_and_judges_held_out_domains_by_every_client(config):
    ours = config(server="local_only", clients=4, rounds=2)
    report, out = run(ours), ours.folder()
    rounds, scores = report.tables().rounds, report.tables().trained.scores
    assert rounds.bytes_up.tolist() == [0, 0] and rounds.bytes_down.tolist() == [0, 0]
    away = scores[(scores.domain == "ink") & (scores["round"] == 2)]
    assert away.client.tolist() == [0, 1, 2, 3] and away.total.tolist() == [120] * 4
    chosen = report.chosen_round
    assert report.private.tolist() == [chosen] * 4
    kept = {file.name for file in (out / "private").iterdir()}  # and those of the last round, to resume with more
    assert kept == {f"client-{k}-round-{round}.safetensors" for k in range(4) for round in {chosen, 2}}


def test_bytes_are_those_of_the_tensors_that_travel(config):
    rounds = run(config(clients=4, cohort=3, rounds=1)).tables().rounds
    assert rounds.bytes_up.item() == rounds.bytes_down.item() == 3 * 4 * 2 * (24 * 24 + 24)
    assert rounds.clients.item() == 3


def test_the_size_of_a_chunk_belongs_to_the_result_and_actors_do_not(config, tmp_path):
    one, four = (run(config(clients=4, chunk=size, out=tmp_path / str(size))) for size in (1, 4))
    assert np.allclose(flatten(one.adapter), flatten(four.adapter), rtol=1e-5)


def test_flat_vectors_come_back_by_name_whatever_the_order():
    params = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3.0]])}
    vector = flatten(params)
    assert vector.tolist() == [3.0, 1.0, 2.0]
    back = unflatten(vector, dict(reversed(params.items())))
    assert all(torch.equal(back[name], params[name]) for name in params)
    back["b"][0] = 9.0
    assert vector.tolist() == [3.0, 1.0, 2.0]  # a copy: the vector may be everybody's


def test_every_round_is_trained_by_its_own_cohort(config):
    report = run(config(clients=6, cohort=2, rounds=3))
    assert report.tables().rounds.clients.tolist() == [2, 2, 2]

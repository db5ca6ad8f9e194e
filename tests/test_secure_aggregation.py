"""Secure aggregation: sums of integers, what its messages take, and what it excludes."""

import numpy as np
import pytest
import torch
from test_attacks import FIELDS, Recording

from fedsim import InputError, run
from fedsim.params import flatten
from fedsim.prepare import prepare
from fedsim.registry import parse

NAME = "secure_aggregation"
PROBE = 24 * 4


def codec(**fields):
    return parse("codec", {"name": NAME, **fields})


def test_a_sum_in_the_ring_is_that_of_the_integers_also_where_single_ones_wrap():
    ours = codec(bits=16, fraction=8, clip=2.0)
    ours.check(30)
    updates = torch.randn(30, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masked = torch.zeros(50, dtype=torch.int64)
    for update in updates:
        sent = ours.encode(update, torch.Generator())["masked"]
        assert len(sent) == 100  # bytes
        masked += sent.view(torch.int16).long() % 2**16
    total = masked % 2**16
    centred = (total - (total >= 2**15).long() * 2**16).numpy()
    expected = np.clip(np.round(updates.numpy() * 256), -512, 512).sum(axis=0)
    assert np.array_equal(centred, expected) and (expected < 0).any()
    decoded = sum(ours.decode(ours.encode(update, torch.Generator()), update) for update in updates)
    assert np.array_equal(decoded.numpy() * 256, expected)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_round_adds_the_mean_of_the_clients_integers_to_the_bit(dtype, config, tmp_path):
    fields = FIELDS | {"dtype": dtype}
    Recording.seen.clear()
    run(config(**fields, server=Recording(), out=tmp_path / "a"))
    ours = {"name": NAME, "fraction": 10, "clip": 0.05}
    start = flatten(run(config(**(fields | {"rounds": 0}), out=tmp_path / "b")).adapter)
    summed = flatten(run(config(**fields, codec=ours, out=tmp_path / "c")).adapter)
    integers = sum(np.clip(np.round(update.astype(np.float64) * 1024), -51, 51) for update in Recording.seen.values())
    assert np.abs(integers).max() > 100  # some are cut
    assert np.array_equal(summed, (start.astype(np.float64) + integers / 1024 / 6).astype(dtype))
    chunked = run(config(**fields, codec=ours, chunk=1, out=tmp_path / "d"))
    assert np.array_equal(flatten(chunked.adapter), summed)


def test_with_many_bits_a_run_is_that_without(config, tmp_path):
    fields = FIELDS | {"rounds": 3, "server": {"name": "fedavgm"}}
    plain = run(config(**fields))
    ours = run(config(**fields, codec={"name": NAME, "bits": 53, "fraction": 40}, out=tmp_path / "a"))
    np.testing.assert_allclose(flatten(ours.adapter), flatten(plain.adapter), rtol=0, atol=1e-10)


def test_bytes_are_those_of_all_keys_and_shares(config, tmp_path):
    n = 6
    down, up = codec().overhead(n)
    assert down + up == 32 * (2 * n + 5 * n - 4)  # 2 n keys and 5 n - 4 shares
    down, up = codec(protocol="one_shot", committee=3).overhead(n)
    assert (down, up) == (3 * 32, 3 * 32 + 16)  # a share for each member; 3 sums of members, by 6 clients
    report = run(config(**FIELDS, codec={"name": NAME, "bits": 24, "fraction": 16}))
    rounds, (down, up) = report.tables().rounds, codec().overhead(n)
    assert rounds.bytes_up.tolist() == [n * (PROBE * 3 + up)]
    assert rounds.bytes_down.tolist() == [n * (PROBE * 8 + down)]
    assert (
        report.facts["codec"].startswith("bonawitz: 4 rounds of messages")
        and f"{up:,} bytes up" in report.facts["codec"]
    )


def test_a_round_in_which_too_few_clients_respond_changes_nothing(config, tmp_path):
    fleet = {"name": "lognormal", "dropout": 0.5}
    fields = FIELDS | {"fleet": fleet, "clients": 8, "rounds": 6}
    report = run(config(**fields, codec={"name": NAME, "threshold": 0.6}))
    rounds = report.tables().rounds
    responding = 8 - rounds.dropped
    assert (responding < 4.8).any() and (responding >= 4.8).any()
    assert rounds.clients.tolist() == [count if count >= 4.8 else 0 for count in responding]
    for round in range(1, 7):
        same = np.array_equal(report.counts[round].confidence, report.counts[round - 1].confidence)
        assert same == (rounds.clients[round - 1] == 0)


def test_the_share_that_must_respond_is_exact():
    assert codec(threshold=0.55).enough(55, 100) and not codec(threshold=0.55).enough(54, 100)


@pytest.mark.parametrize("fields", [{"cohort": 3, "over_selection": 0.9}, {"fleet": {"dropout": 0.9}}])
def test_a_run_in_which_too_few_always_respond_is_refused(fields, config):
    fleet = {"name": "lognormal"} | fields.get("fleet", {})
    with pytest.raises(InputError, match="no round of 3 has as many responses as codec secure_aggregation needs: "):
        prepare(config(**(FIELDS | {"codec": NAME, "rounds": 3} | fields | {"fleet": fleet})))


BAD = {
    "each update": ({"server": "median"}, "server median needs the update of each client, and with codec secure_aggre"),
    "own models": ({"server": "fedamp"}, "server fedamp needs the update of each client"),
    "messages": (
        {"server": "scaffold"},
        "server scaffold has clients send messages besides their updates, which codec",
    ),
    "weights": ({"server": {"name": "fedavg", "weighting": "rows"}}, "server fedavg weights the updates of clients"),
    "weights by steps": ({"server": "fednova"}, "server fednova weights the updates of clients"),
    "an attack": ({"attack": {"name": "ipm", "share": 0.5}}, "attack ipm"),
    "nothing": (
        {"codec": {"name": NAME, "fraction": 0, "clip": 0.5}},
        "--codec.clip 0.5 is less than one unit of --codec.fraction 0, 1, so every update would be zero",
    ),
    "overflow": (
        {"codec": {"name": NAME, "bits": 20}},
        "the sum of 6 updates up to 1 with 20 bits after the point needs integers of 24 bits, and --codec.bits is 20",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_needs_more_than_the_sum_is_refused(case, config):
    fields, message = BAD[case]
    with pytest.raises(InputError) as error:
        prepare(config(**(FIELDS | {"codec": NAME} | fields)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_24_bits_are_enough_for_what_20_are_not(config):
    prepare(config(**FIELDS, codec={"name": NAME, "bits": 24}))
    with pytest.raises(InputError, match="needs integers of 24 bits"):
        prepare(config(**FIELDS, codec={"name": NAME, "bits": 23}))


def test_clients_that_forge_their_updates_are_still_summed(config):
    assert run(config(**FIELDS, codec=NAME, attack={"name": "sign_flip", "share": 0.5})).complete

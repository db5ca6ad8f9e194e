"""Codecs against few lines of numpy, and runs whose updates travel encoded."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_until

from fedsim import Averaging, Config, Diverged, InputError, Reply, component, run
from fedsim.checkpoint import load_checkpoint
from fedsim.codecs import pack, unpack
from fedsim.params import payload_bytes
from fedsim.registry import available, parse
from fedsim.training.client_store import PrivateStore
from fedsim.training.transmit import joined, transmit

WIDTH, CLASSES = 24, 4
PROBE = WIDTH * CLASSES  # parameters of a linear probe on the small features
NAMES = available("codec")
LOSSY = [name for name in NAMES if name != "plain"]


def an_update(size, dtype=torch.float64, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sent(codec, update, seed=0):
    """What the server decodes of an update, and what has travelled."""
    encoded = codec.encode(update, torch.Generator().manual_seed(seed))
    return codec.decode(encoded, update), encoded


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8, 9, 17, 31])
def test_packed_integers_take_their_bits_and_come_back(bits):
    values = torch.randint(2**bits, (101,), generator=torch.Generator().manual_seed(bits))
    values[:2] = torch.tensor([0, 2**bits - 1])
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-101 * bits // 8)
    assert torch.equal(unpack(packed, bits, 101), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 512, 1500])
@pytest.mark.parametrize("name", NAMES)
def test_what_travels_has_the_same_shapes_for_every_update_and_is_decoded_to_its_size(name, size, dtype):
    codec = parse("codec", name)
    shapes = []
    for seed, update in enumerate(
        (an_update(size, dtype), torch.zeros(size, dtype=dtype), an_update(size, dtype, 1) / 1e9)
    ):
        decoded, encoded = sent(codec, update, seed)
        assert decoded.shape == update.shape and decoded.dtype == dtype and decoded.isfinite().all()
        assert torch.equal(decoded, torch.zeros_like(update)) or update.any()
        shapes.append({key: (tensor.shape, tensor.dtype) for key, tensor in encoded.items()})
    assert shapes[0] == shapes[1] == shapes[2]


# Bits of one number of a long update, its share of a scale, norm or position included.
BITS = {
    "plain": 32,
    "half": 16,
    "int8": 8 + 32 / 512,
    "qsgd": 4 + 32 / 512,
    "secure_aggregation": 32,
    "sign": 1 + 32 / 512,
    "top_k": 0.01 * (32 + 17),  # 2 ** 17 > 100,000
    "random_k": 0.01 * 32,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_long_update_takes_as_many_bytes_as_its_encoded_tensors(name):
    assert sorted(BITS) == NAMES
    _, encoded = sent(parse("codec", name), an_update(100_000, torch.float32))
    assert payload_bytes(encoded) == pytest.approx(100_000 * BITS[name] / 8, rel=1e-3, abs=16)


def in_buckets(update, size):
    return [update[first : first + size].numpy() for first in range(0, len(update), size)]


def test_int8_rounds_to_255_levels_of_the_largest_number_of_a_bucket():
    update = an_update(1500)
    expected = [
        np.round(part / np.abs(part).max() * 127) * (np.float32(np.abs(part).max()) / 127)
        for part in in_buckets(update, 512)
    ]
    decoded, _ = sent(parse("codec", "int8"), update)
    np.testing.assert_allclose(decoded, np.concatenate(expected), rtol=1e-7)


def test_signs_have_the_mean_absolute_value_of_their_bucket():
    update = an_update(1500)
    expected = [np.where(part >= 0, 1, -1) * np.float32(np.abs(part).mean()) for part in in_buckets(update, 512)]
    decoded, _ = sent(parse("codec", "sign"), update)
    np.testing.assert_allclose(decoded, np.concatenate(expected), rtol=1e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_gives_one_of_the_two_levels_around_a_number_and_on_average_the_number(bits):
    codec, update = parse("codec", {"name": "qsgd", "bits": bits, "bucket": 64}), an_update(100)
    step = np.repeat([np.linalg.norm(part) for part in in_buckets(update, 64)], 64)[:100] / (2 ** (bits - 1) - 1)
    draws = np.stack([sent(codec, update, seed)[0].numpy() for seed in range(4000)])
    assert (np.abs(draws - update.numpy()) < step * (1 + 1e-6)).all()
    assert np.abs(draws / step - np.round(draws / step)).max() < 1e-5
    # The standard deviation of a draw is at most half a step.
    assert (np.abs(draws.mean(axis=0) - update.numpy()) < 5 * step / 2 / 4000**0.5).all()


def test_top_k_keeps_the_largest_numbers_where_they_are():
    update = an_update(1000, torch.float32)
    update[10] = -update[20]  # of equal numbers, the first
    decoded, encoded = sent(parse("codec", {"name": "top_k", "share": 0.013}), update)
    largest = np.argsort(-np.abs(update.numpy()), kind="stable")[:13]
    expected = np.zeros(1000, np.float32)
    expected[largest] = update.numpy()[largest]
    assert np.array_equal(decoded, expected) and len(encoded["values"]) == 13


def test_random_k_is_unbiased_and_with_error_feedback_not_scaled():
    codec, update = parse("codec", {"name": "random_k", "share": 0.25}), an_update(40)
    draws = np.stack([sent(codec, update, seed)[0].numpy() for seed in range(4000)])
    assert ((draws != 0).sum(axis=1) == 10).all()
    spread = np.abs(update.numpy()) * 3**0.5  # of x / 0.25 with probability 0.25
    assert (np.abs(draws.mean(axis=0) - update.numpy()) < 5 * spread / 4000**0.5).all()
    kept, _ = sent(parse("codec", {"name": "random_k", "share": 0.25, "error_feedback": True}), update)
    assert set(kept.tolist()) <= {0.0, *update.tolist()}


@pytest.mark.parametrize("down", ["full", "fp16", "bf16", "int8"])
def test_parameters_on_their_way_down_are_as_close_as_their_format(down):
    codec = parse("codec", {"name": "plain", "down": down})
    params = {"w": an_update(60).view(6, 10), "zero": torch.zeros(3, dtype=torch.float64)}
    encoded = codec.encode_down(params)
    received = codec.decode_down(encoded, params)
    close = {"full": 0, "fp16": 2**-11 * 4, "bf16": 2**-8 * 4, "int8": params["w"].abs().max() / 254}[down]
    assert (received["w"] - params["w"]).abs().max() <= close * (1 + 1e-9) and not received["zero"].any()
    assert received["w"].dtype == torch.float64 and received["w"].shape == (6, 10)
    bytes_ = {"full": 8 * 63, "fp16": 2 * 63, "bf16": 2 * 63, "int8": 63 + 2 * 8}
    assert payload_bytes(encoded) == bytes_[down]


def test_with_error_feedback_nothing_of_many_updates_is_lost_for_good():
    codec = parse("codec", {"name": "top_k", "share": 0.1})
    zero = {"a": torch.zeros(5, 6, dtype=torch.float64), "b": torch.zeros(20, dtype=torch.float64)}
    lost, arrived, made = {}, torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    for seed in range(8):
        trained = {"a": an_update(30, seed=seed).view(5, 6), "b": an_update(20, seed=seed + 100)}
        at_server, lost = transmit(codec, zero, trained, lost, torch.Generator())
        assert (joined(at_server) != 0).sum() == 5
        arrived, made = arrived + joined(at_server), made + joined(trained)
    torch.testing.assert_close(arrived + lost["update"], made)
    assert parse("codec", {"name": "top_k", "error_feedback": False}).remembers is False


@pytest.fixture
def probe(config):
    """Makes a Config of a linear probe whose clients take several steps."""
    method = {"name": "probe", "optimizer": "sgd", "lr": 0.1, "local_epochs": 2, "batch_size": 8}
    return lambda **fields: config(**({"method": method, "partition": "iid", "clients": 5, "cohort": 4} | fields))


@pytest.mark.parametrize("down", ["full", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_a_run_are_those_of_the_encoded_tensors(name, down, probe, tmp_path):
    run(probe(codec={"name": name, "down": down}))
    _, encoded = sent(parse("codec", name), torch.zeros(PROBE))
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    more_down, more_up = parse("codec", name).overhead(4)
    assert (rounds.bytes_up == 4 * (payload_bytes(encoded) + more_up)).all()
    assert (rounds.bytes_down == 4 * ((4 * PROBE if down == "full" else PROBE + 4) + more_down)).all()


def test_the_update_of_the_only_client_is_added_as_it_is_decoded(probe, tmp_path):
    alone = {"clients": 1, "cohort": None}
    (start,) = run(probe(**alone, rounds=0, out=tmp_path / "start")).adapter.values()
    (trained,) = run(probe(**alone, rounds=1, out=tmp_path / "plain")).adapter.values()
    (rounded,) = run(probe(**alone, rounds=1, codec="int8", out=tmp_path / "int8")).adapter.values()
    decoded, _ = sent(parse("codec", "int8"), (trained - start).view(-1))
    torch.testing.assert_close(rounded.view(-1), start.view(-1) + decoded, rtol=0, atol=1e-6)
    assert not torch.equal(rounded, trained)


@pytest.mark.parametrize("codec", ["sign", {"name": "qsgd", "error_feedback": True, "down": "bf16"}])
def test_a_run_with_memory_gives_the_same_bits_in_other_chunks_and_after_an_interruption(codec, probe, tmp_path):
    whole = run(probe(codec=codec, rounds=4))
    states = PrivateStore(tmp_path / "run" / "private")
    assert len(list(states.folder.iterdir())) >= 4
    run_until(2, probe(codec=codec, rounds=4, out=tmp_path / "resumed"))
    resumed = run(probe(codec=codec, rounds=4, out=tmp_path / "resumed"))
    single = run(probe(codec=codec, rounds=4, out=tmp_path / "single", chunk=1))
    for name, tensor in whole.adapter.items():
        assert torch.equal(tensor, resumed.adapter[name])
        torch.testing.assert_close(tensor, single.adapter[name], rtol=0, atol=1e-6)


def test_the_readable_path_sends_the_same(probe, tmp_path):
    stacked = run(probe(codec="int8"))
    one_by_one = run(probe(codec="int8", engine="reference", out=tmp_path / "reference"))
    for name, tensor in stacked.adapter.items():
        torch.testing.assert_close(tensor, one_by_one.adapter[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("computes", [False, True])
def test_messages_are_those_of_the_decoded_update_only_if_the_server_computes_them(computes, probe):
    seen = {"message": [], "memory": []}

    @component
    class Counting(Averaging):
        """Sends, and stores, how many numbers of the update are not 0."""

        computes_messages = computes

        def init(self, params):
            return {}, {"count": torch.zeros(())}

        def reply(self, update):
            count = ((joined(update.trained) - joined(update.received)) != 0).sum().float()
            return Reply(1.0, {"count": count}, {"count": count})

        def step(self, params, slots, total, rng):
            seen["message"].append(total.message[0] / len(total.clients))
            return super().step(params, slots, total, rng)

    codec = {"name": "top_k", "share": 0.05}
    config = probe(server=Counting(), codec=codec, rounds=1)
    run(config)
    store = PrivateStore(config.folder() / "private")
    counts = [store.read(client, 1)["rule/count"] for client in range(5) if store._file(client, 1).exists()]
    assert len(counts) == 4 and min(counts) > 0.8 * PROBE
    assert seen["message"] == [round(0.05 * PROBE)] if computes else seen["message"][0] > 0.8 * PROBE


def test_an_update_that_the_server_drops_is_still_to_be_sent():
    codec, zero = parse("codec", {"name": "top_k", "share": 0.1}), {"a": torch.zeros(50)}
    trained = {"a": an_update(50, torch.float32)}
    _, lost = transmit(codec, zero, trained, {}, torch.Generator(), counts=False)
    assert torch.equal(lost["update"], trained["a"])


def test_the_bank_of_a_rule_that_unicasts_is_what_clients_have_sent(probe, tmp_path):
    """Of one client, whose model the server has: what it received, rounded, plus its update."""
    config = probe(server="fedamp", codec={"name": "plain", "down": "int8"}, clients=3, cohort=None, rounds=2)
    run(config)
    state, _ = load_checkpoint(config.folder(), config.experiment())
    for client in range(3):
        (stored,) = PrivateStore(config.folder() / "private").read(client, 2).values()
        np.testing.assert_allclose(state.bank[client], stored.view(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "facmic"}, r"codec sign would change .*running_var of facmic, which clients compute"),
        ({"method": "facmic", "server": "moon"}, r"codec sign would change .*attention.* of facmic, which"),
        ({"method": "lora", "server": "lora_stacking"}, r"lora_stacking gives clients new tensors .* codec sign would"),
    ],
)
def test_what_a_codec_would_spoil_is_refused(fields, words, tmp_path):
    ours = Config(dataset="glyphs", held_out=("ink",), rounds=1, actors=0, out=tmp_path / "run", codec="sign", **fields)
    with pytest.raises(InputError, match=words) as raised:
        run(ours)
    assert "shared." not in str(raised.value)


@pytest.mark.parametrize("name", LOSSY)
def test_an_update_that_is_not_finite_is_not_hidden_by_its_code(name, probe):
    with pytest.raises(Diverged):
        run(probe(codec=name, method={"name": "probe", "optimizer": "sgd", "lr": 1e38, "weight_decay": 1e10}))

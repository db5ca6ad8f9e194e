"""Simulated time: who is asked, who counts, and what the clock says."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from fedsim.clients import sample_cohort
from fedsim.config import Config
from fedsim.errors import InputError
from fedsim.fleets import Fleet
from fedsim.registry import component, find
from fedsim.rng import numpy_rng
from fedsim.schedule import check, schedule
from fedsim.servers import ClientUpdate
from fedsim.updates import CLIENT_STATS, RoundSum

UNEVEN = {"name": "lognormal", "speed_sigma": 1.0, "jitter_sigma": 0.5, "dropout": 0.1, "availability": 0.8}


@component
class Timed(Fleet):
    """Client k takes `seconds[k]` for its one row."""

    seconds: tuple[float, ...]
    answers: bool = True
    there: bool = True

    def costs(self, clients, rng):
        return np.column_stack([self.seconds, *np.zeros((2, clients))])

    def available(self, clients, rng):
        return np.full(clients, self.there)

    def outcomes(self, clients, rng):
        return np.ones(clients), np.full(clients, self.answers)


def rounds(many: int, population: int, **fields):
    """The first rounds where every client has one row; nothing is sent."""
    return list(islice(schedule(Config(**fields), population, lambda ids, round: np.ones(len(ids)), 0, 0), many))


def clients_of(planned) -> list[int]:
    return [client for client, _ in planned.trained]


# Rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", [None, 1, 7, 50])
def test_the_ideal_fleet_trains_the_cohort_and_the_clock_stands_still(cohort):
    for planned in rounds(4, 50, cohort=cohort, seed=3):
        assert clients_of(planned) == sample_cohort(50, cohort, 3, planned.round)
        assert {version for _, version in planned.trained} == {planned.round - 1}
        assert (planned.clock_s, planned.asked, planned.dropped, planned.late) == (0.0, len(planned.trained), 0, 0)
        assert not planned.needed  # no client trains on earlier parameters


def test_time_is_rows_times_epochs_and_bytes_over_the_link():
    fleet = {
        "name": "lognormal",
        "rows_per_s": 10,
        "speed_sigma": 0,
        "bandwidth_sigma": 0,
        "down_mbps": 8,
        "up_mbps": 4,
    }
    config = Config(fleet=fleet, method={"name": "fedclip", "local_epochs": 3})
    planned = next(schedule(config, 2, lambda ids, round: np.array([20, 50]), 2_000_000, 3_000_000))
    assert planned.clock_s == pytest.approx(50 * 3 / 10 + 2 + 6)  # the slower one; 8 megabits are one megabyte


def test_a_deadline_leaves_out_exactly_the_slow_ones():
    fleet = Timed(seconds=(1, 5, 3, 4, 2))
    first, second = rounds(2, 5, fleet=fleet, deadline_s=3)
    assert clients_of(first) == [0, 2, 4] and first.late == 2 and first.asked == 5
    assert (first.clock_s, second.clock_s) == (3, 6)
    (patient,) = rounds(1, 5, fleet=fleet, deadline_s=100)
    assert clients_of(patient) == [0, 1, 2, 3, 4] and patient.clock_s == 5  # the last one ends the round


def test_over_selection_closes_the_round_with_the_answer_that_fills_the_cohort():
    fleet = Timed(seconds=tuple(range(8, 0, -1)))  # client k takes 8 - k
    before = 0.0
    for planned in rounds(5, 8, fleet=fleet, cohort=4, over_selection=0.5):
        asked = sample_cohort(8, 6, 0, planned.round)
        assert clients_of(planned) == asked[-4:] and planned.asked == 6 and planned.late == 2
        assert planned.clock_s - before == 8 - asked[-4]
        before = planned.clock_s
    (one,) = rounds(1, 200, fleet="lognormal", cohort=100, over_selection=0.1)
    assert one.asked == 110  # and not 111, though 100 * 1.1 > 110


def test_answers_at_the_same_time_count_by_client():
    (planned,) = rounds(1, 8, fleet=Timed(seconds=(1,) * 8), cohort=4, over_selection=1)
    assert clients_of(planned) == [0, 1, 2, 3]


def test_who_never_answers_is_missed_when_due_or_at_the_deadline():
    silent = Timed(seconds=(1, 2, 3), answers=False)
    (planned,) = rounds(1, 3, fleet=silent)
    assert (planned.trained, planned.dropped, planned.late, planned.clock_s) == ([], 3, 0, 3)
    assert rounds(1, 3, fleet=silent, deadline_s=2)[0].clock_s == 2


def test_a_round_in_which_nobody_can_be_asked_passes():
    for planned in rounds(3, 3, fleet=Timed(seconds=(1, 2, 3), there=False)):
        assert (planned.trained, planned.asked, planned.clock_s) == ([], 0, 0.0)


def test_a_device_is_the_same_however_many_others_there_are():
    fleet = find("fleet", "lognormal")(speed_sigma=2)
    few, many = (fleet.costs(clients, numpy_rng(5, "fleet")) for clients in (10, 1000))
    assert np.array_equal(few, many[:10])
    assert len(np.unique(many[:, 0])) == 1000


def test_a_clients_luck_does_not_depend_on_who_else_is_asked():
    fields = {"fleet": UNEVEN | {"availability": 1}, "deadline_s": 0.06}
    for everybody, some in zip(rounds(5, 200, **fields), rounds(5, 200, **fields, cohort=30), strict=True):
        assert 0 < len(some.trained) < 30
        assert clients_of(some) == sorted({*clients_of(everybody)} & {*sample_cohort(200, 30, 0, some.round)})


def test_half_of_the_clients_are_there_at_availability_one_half():
    for planned in rounds(3, 10_000, fleet=UNEVEN | {"availability": 0.5}):
        assert abs(planned.asked - 5000) < 250  # five standard deviations


def test_speeds_have_the_median_and_the_spread_that_were_asked_for():
    speeds = 1 / find("fleet", "lognormal")(rows_per_s=30, speed_sigma=0.7).costs(50_000, numpy_rng(0, "fleet"))[:, 0]
    assert np.median(speeds) == pytest.approx(30, rel=0.03)
    assert np.log(speeds).std() == pytest.approx(0.7, rel=0.03)


# Buffers --------------------------------------------------------------------------------------------------------


def fedbuff(buffer: int, concurrency: int) -> dict:
    return {"name": "fedbuff", "buffer": buffer, "concurrency": concurrency}


def test_a_slow_client_comes_back_with_the_parameters_it_was_sent():
    first, second, third, fourth = rounds(4, 3, fleet=Timed(seconds=(2, 3, 10)), server=fedbuff(2, 3))
    # Clients 0 and 1 fill a buffer every 3 s while client 2 is at work; at 10 s it takes the place of one of them.
    assert [planned.clock_s for planned in (first, second, third, fourth)] == [3, 6, 9, 11]
    assert [planned.trained for planned in (first, second, third)] == [[(0, k), (1, k)] for k in range(3)]
    assert [planned.needed for planned in (first, second, third)] == [{0}, {0}, {0}]
    assert fourth.trained == [(2, 0), (0, 3)] and fourth.needed == {3}  # client 1 is still at work
    assert [planned.asked for planned in (first, second, third, fourth)] == [3, 2, 2, 2]


def test_one_at_a_time_is_never_stale_and_takes_the_sum_of_the_times():
    before = 0.0
    for planned in rounds(50, 6, fleet=Timed(seconds=(1, 2, 3, 4, 5, 6)), server=fedbuff(1, 1)):
        ((client, version),) = planned.trained
        assert version == planned.round - 1 and planned.clock_s - before == client + 1
        before = planned.clock_s


def test_staleness_grows_with_concurrency_and_is_never_negative():
    means = []
    for concurrency in (10, 40, 160):
        made = rounds(60, 400, fleet=UNEVEN, server=fedbuff(10, concurrency))
        staleness = [planned.round - 1 - version for planned in made for _, version in planned.trained]
        assert len(staleness) == 600 and min(staleness) >= 0
        means.append(np.mean(staleness))
    assert means[0] + 1 < means[1] and means[1] + 4 < means[2]  # in the long run about concurrency / buffer


def test_a_client_is_asked_again_only_after_its_update_was_taken():
    taken: dict[int, int] = {}
    for planned in rounds(200, 30, fleet=UNEVEN, server=fedbuff(5, 20)):
        assert len({*clients_of(planned)}) == 5
        assert planned.trained == sorted(planned.trained, key=lambda pair: pair[::-1])
        for client, version in planned.trained:
            assert version >= taken.get(client, 0)
            taken[client] = planned.round
    assert len(taken) == 30  # in the end every client has trained


def test_parameters_are_kept_as_long_as_somebody_needs_them():
    made = rounds(300, 50, fleet=UNEVEN, server=fedbuff(5, 30))
    for k, planned in enumerate(made[:200]):
        later = [version for after in made[k + 1 :] for _, version in after.trained]
        assert planned.needed == {version for version in later if version < planned.round}


def test_a_deadline_bounds_how_long_a_client_is_waited_for():
    fields = {"fleet": Timed(seconds=(1, 1, 1, 50)), "server": fedbuff(1, 4)}
    assert 3 in {client for planned in rounds(300, 4, **fields) for client in clients_of(planned)}
    made = rounds(300, 4, **fields, deadline_s=10)
    assert 3 not in {client for planned in made for client in clients_of(planned)}
    assert sum(planned.late for planned in made) == pytest.approx(made[-1].clock_s / 10, abs=1)


def test_where_nobody_can_answer_in_time_it_says_so_and_ends():
    with pytest.raises(InputError, match=r"of 10000 clients asked in a row none answered \(deadline_s: 0.5\)"):
        rounds(1, 4, fleet=Timed(seconds=(1, 2, 3, 4)), server=fedbuff(1, 2), deadline_s=0.5)


def test_buffers_wait_for_a_round_in_which_somebody_can_be_asked():
    made = rounds(40, 2, fleet={"name": "lognormal", "availability": 0.2}, server=fedbuff(2, 2))
    empty = [planned for planned in made if not planned.trained]
    assert 0 < len(empty) < 40 and all(len(planned.trained) == 2 for planned in made if planned.trained)


def weight_of(server, rows, staleness):
    return server.reply(ClientUpdate({}, {}, {}, {}, rows, 1, staleness, find("method", "probe")(), 1e-3)).weight


def test_fedbuff_divides_by_the_number_of_updates_and_not_by_their_scales():
    server = find("server", "fedbuff")(buffer=2, lr=0.5)
    fresh, stale = weight_of(server, 30, 0), weight_of(server, 10, 3)
    assert (fresh, stale) == (1.0, 0.5)  # 1/sqrt(1 + 3); rows do not matter
    total = RoundSum(np.array([fresh * 2.0 + stale * 8.0]), fresh + stale, np.zeros(2, CLIENT_STATS))
    params, slots = server.step({"w": torch.tensor([1.0])}, {}, total, torch.Generator())
    assert params["w"].tolist() == [2.5] and slots == {}  # 1 + 0.5 * (2 + 4) / 2
    assert weight_of(find("server", "fedbuff")(staleness="constant"), 1, 8) == 1.0


# Both -----------------------------------------------------------------------------------------------------------

BOTH = {"rounds": {"cohort": 20, "over_selection": 0.3}, "buffers": {"server": fedbuff(10, 40)}}


@pytest.mark.parametrize("fields", BOTH.values(), ids=BOTH)
def test_a_schedule_is_replayed_and_another_seed_is_another_one(fields):
    first, again, other = (rounds(30, 100, fleet=UNEVEN, **fields, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert all(mine.trained != theirs.trained for mine, theirs in zip(first, other, strict=True))


@pytest.mark.parametrize("fields", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("deadline_s", [None, 0.1])
def test_the_clock_never_goes_back_and_nobody_is_asked_for_nothing(fields, deadline_s):
    made = rounds(100, 100, fleet=UNEVEN, **fields, deadline_s=deadline_s)
    assert all(one.clock_s < next.clock_s for one, next in pairwise(made))
    asked = sum(planned.asked for planned in made)
    done = sum(len(planned.trained) + planned.dropped + planned.late for planned in made)
    assert 0 <= asked - done <= (40 if "server" in fields else 0)  # those still at work
    assert sum(planned.dropped for planned in made) > 0


def test_a_cohort_of_10_000_from_100_000_clients():
    for planned in rounds(3, 100_000, fleet=UNEVEN, cohort=10_000, deadline_s=0.1):
        assert planned.asked == 10_000 == len(planned.trained) + planned.dropped + planned.late
        assert len(planned.trained) > 1000
        assert all(type(number) is int for pair in planned.trained for number in pair)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"deadline_s": 5}, "deadline_s needs a fleet whose clients take time, such as lognormal, not ideal"),
        ({"over_selection": 0.3, "cohort": 5}, "over_selection needs a fleet whose clients take time"),
        ({"server": "fedbuff"}, "server fedbuff needs a fleet whose clients take time"),
        ({"fleet": UNEVEN, "over_selection": 0.3}, "over_selection 0.3 needs a cohort smaller than 20"),
        ({"fleet": UNEVEN, "over_selection": 0.3, "cohort": 16}, "asks 21 of 20 clients; at most all of them"),
        ({"fleet": UNEVEN, "server": "fedbuff", "cohort": 5}, "cohort 5, but server fedbuff has none"),
        ({"fleet": UNEVEN, "server": "fedbuff", "over_selection": 0.3}, "server fedbuff has no cohort to exceed"),
        ({"fleet": UNEVEN, "server": fedbuff(21, 5)}, "server.buffer of 21 from 20 clients"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_in_one_sentence(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        check(Config(**fields), 20)


def test_what_can_be_scheduled_passes():
    check(Config(), 20)
    check(Config(fleet=UNEVEN, deadline_s=5, over_selection=0.25, cohort=16), 20)
    check(Config(fleet=UNEVEN, server=fedbuff(20, 500), deadline_s=5), 20)


def test_values_out_of_range_are_refused_where_they_are_made():
    for fields in ({"deadline_s": 0}, {"deadline_s": float("inf")}, {"over_selection": -0.1}):
        with pytest.raises(InputError, match=next(iter(fields))):
            Config(**fields)
    with pytest.raises(InputError, match=r"fleet\.dropout must be"):
        Config(fleet={"name": "lognormal", "dropout": 1})
    with pytest.raises(InputError, match=r"no fleet 'phones'; available: .*ideal.*lognormal"):
        Config(fleet="phones")

"""What a sweep searches: declared with each hyperparameter, written by a user, asked for by a real Optuna study."""

import optuna
import pytest

from fedsim import Config, InputError
from fedsim.config import merged
from fedsim.errors import listing
from fedsim.registry import KINDS, available, find, parse
from fedsim.search_space import Choice, Field, Linear, Log, search_of
from fedsim.sweep.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)

METHODS = listing(available("method"), 40)
COMPONENTS = [(kind, name) for kind in KINDS for name in available(kind)]
DECLARED = [
    (kind, name, field)
    for kind, name in COMPONENTS
    for field in find(kind, name).__pydantic_fields__
    if search_of(find(kind, name), field)
]


def asked(texts, config=None, trials=60):
    """Fields and parameters of so many trials of a random search."""
    space = Space.parse(texts, config or Config())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(trials):
        trial = study.ask()
        found.append((space.suggest(trial), trial.params))
    return found


@pytest.mark.parametrize(("kind", "name", "field"), DECLARED, ids=".".join)
def test_the_ends_of_a_declared_range_are_values_of_the_field_and_of_its_type(kind, name, field):
    for end in search_of(find(kind, name), field).extremes:
        value = getattr(parse(kind, {"name": name, field: end}), field)
        assert value == end and type(value) is type(end)


@pytest.mark.parametrize(("kind", "name", "field"), DECLARED, ids=".".join)
def test_a_declared_range_holds_the_default_unless_that_turns_something_off(kind, name, field):
    default = getattr(parse(kind, name), field)
    assert default in (0, None) or default in search_of(find(kind, name), field)


def test_what_config_declares_it_takes():
    assert [Config(cohort=end).cohort for end in search_of(Config, "cohort").extremes] == [2, 100]


def test_every_method_says_where_to_look_for_its_step_size():
    assert all(search_of(find("method", name), "lr") for name in available("method"))


def test_no_two_components_have_one_name():
    names = [name for _, name in COMPONENTS]  # what Optuna calls their parameters begins with it
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("declare", "sentence"),
    [
        (lambda: Linear(2, 1), "a range needs two finite numbers, the lower one first, got 2:1"),
        (lambda: Linear(1, 1), "the lower one first, got 1:1"),
        (lambda: Linear(0.0, float("inf")), "two finite numbers"),
        (
            lambda: Log(0.0, 1.0),
            "a log-uniform range must begin above 0, got 0.0:1.0; 0.0:1.0:linear may begin anywhere",
        ),
        (lambda: Choice((3,)), "a choice needs two values or more, got 3"),
        (lambda: Choice((3, 4, 3)), "a choice needs each value once, got 3, 4, 3"),
        (
            lambda: Field(0.5, gt=0, search=Linear(0.0, 1.0)),
            "search range 0.0:1.0:linear of a field that must be > 0",
        ),
        (lambda: Field(0.5, le=1, search=Linear(0.5, 2.0)), "of a field that must be <= 1: 2.0"),
        (lambda: Field(0.5, lt=1, search=Choice((0.5, 1.0))), "of a field that must be < 1: 1.0"),
        (lambda: Field(5, ge=2, search=Linear(1, 9)), "of a field that must be >= 2: 1"),
    ],
)
def test_a_bad_range_is_refused_where_it_is_declared(declare, sentence):
    with pytest.raises(InputError) as refused:
        declare()
    assert sentence in str(refused.value)


def test_what_is_searched_unless_it_is_said_is_what_the_method_and_the_rule_declare():
    config = Config(server="fedprox", partition="dirichlet", clients=40)
    assert Space.parse((), config).plain() == [
        "fedclip.batch_size=16,32,64,128",
        "fedclip.beta1=0.5:0.95:linear",
        "fedclip.beta2=0.9,0.98,0.99,0.999",
        "fedclip.local_epochs=1:5:linear",
        "fedclip.lr=1e-05:0.01:log",
        "fedclip.schedule=constant,cosine",
        "fedclip.weight_decay=1e-05:1.0:log",
        "fedprox.mu=0.001:1.0:log",
    ]


@pytest.mark.parametrize(
    ("texts", "plain"),
    [
        (["method.lr"], ["fedclip.lr=1e-05:0.01:log"]),
        (["method.lr=1e-4:1e-3"], ["fedclip.lr=0.0001:0.001:log"]),  # by logarithm, as the declared one
        (["method.lr=0:1e-3:linear"], None),
        (["method.lr=1e-4:1e-3:linear"], ["fedclip.lr=0.0001:0.001:linear"]),
        (["method.eps=1e-8:1e-4"], ["fedclip.eps=1e-08:0.0001:linear"]),
        (["method.eps=1e-8:1e-4:log"], ["fedclip.eps=1e-08:0.0001:log"]),
        (["method.batch_size=16, 32,64"], ["fedclip.batch_size=16,32,64"]),
        (["method.batch_size=8:64:log"], ["fedclip.batch_size=8:64:log"]),
        (["method.weight-decay"], ["fedclip.weight_decay=1e-05:1.0:log"]),
        (["fedclip.lr"], ["fedclip.lr=1e-05:0.01:log"]),
        (["method.objective"], ["fedclip.objective=contrastive,cross_entropy"]),
        (["method.objective=cross_entropy,contrastive"], ["fedclip.objective=cross_entropy,contrastive"]),
        (["method.persist_optimizer"], ["fedclip.persist_optimizer=false,true"]),
        (["cohort=10:30"], ["cohort=10:30:log"]),
        (["cohort=none,10"], ["cohort=none,10"]),
        (["shots=1:16"], ["shots=1:16:linear"]),
        (["partition.alpha=0.1:1"], ["dirichlet.alpha=0.1:1.0:log"]),
        (["method=fedclip,tip-adapter"], ["method=fedclip,tip_adapter"]),
        (["method.*", "server.*", "method.lr=1e-4:1e-3"], "fedclip.lr=0.0001:0.001:log"),
        (["method.lr=1e-4:1e-3", "method.*"], "fedclip.lr=0.0001:0.001:log"),
    ],
)
def test_a_space_is_what_is_written(texts, plain):
    config = Config(partition="dirichlet", clients=40)
    if plain is None:
        with pytest.raises(InputError, match="must be > 0"):
            Space.parse(texts, config)
        return
    space = Space.parse(texts, config)
    assert space.plain() == plain if isinstance(plain, list) else plain in space.plain()
    assert Space.parse(space.plain(), config) == space


BAD = {
    "a kind": (
        ["metod.lr"],
        "'metod' is neither a kind of component nor one of the chosen components: dataset (glyphs), ",
    ),
    "a component that is no candidate": (["probe.lr"], "'probe' is neither a kind of component nor one of the chosen"),
    "a component": (["method=fedclip,fedklip"], f"no method 'fedklip'; available: {METHODS}"),
    "one component": (["method=fedclip"], "a choice needs two values or more, got fedclip"),
    "a component twice": (["method=probe,fedclip,probe"], "a choice needs each value once, got probe, fedclip, probe"),
    "components that are not said": (
        ["method"],
        f"method needs names to choose from, method=A,B; available: {METHODS}",
    ),
    "components said twice": (["method=fedclip,probe", "method=fedclip,lora"], "method is given twice"),
    "a field": (
        ["method.gamma"],
        "no field 'gamma' in fedclip; fields with a declared range: fedclip.lr, fedclip.schedule, fedclip.momentum",
    ),
    "a field of no candidate": (["method=fedclip,probe", "method.rank"], "no field 'rank' in fedclip, probe; fields"),
    "a field of the config": (
        ["kohort=2:3"],
        "no field 'kohort' to search; available: partition, clients, train_share",
    ),
    "nothing": ([""], "no field '' to search"),
    "a field without a range": (
        ["method.eps"],
        "eps of fedclip declares no range; give method.eps=LOW:HIGH, or values separated by commas; fields",
    ),
    "a field of the config without a range": (["rounds"], "rounds declares no range; give rounds=LOW:HIGH"),
    "a field of a rule without a range": (["server=fedavg,krum", "server.f"], "f of krum declares no range"),
    "a seed": (["seed=0,1"], "seed cannot be searched: --tuning-seeds are a sweep's seeds, and its partition is fixed"),
    "the partition's seed": (["partition_seed=0,1"], "partition_seed cannot be searched"),
    "what changes no result": (["actors=1,2"], "actors cannot be searched: it does not change the result"),
    "a range the wrong way round": (["method.lr=1e-2:1e-5"], "the lower one first, got 0.01:1e-05"),
    "an empty range": (["method.lr=1e-2:1e-2"], "the lower one first, got 0.01:0.01"),
    "a range without an end": (["method.lr=1e-5:inf"], "a range needs two finite numbers"),
    "half a range": (["method.lr=1e-5:"], "the ends of a range must be numbers, got 1e-5:"),
    "words for a range": (["method.lr=small:large"], "the ends of a range must be numbers, got small:large"),
    "a scale": (["method.lr=1e-5:1e-2:logg"], "LOW:HIGH, LOW:HIGH:log or LOW:HIGH:linear, got 1e-5:1e-2:logg"),
    "too much of a range": (["method.lr=1:2:log:3"], "LOW:HIGH, LOW:HIGH:log or LOW:HIGH:linear, got 1:2:log:3"),
    "a range outside of the limits": (["method.beta1=0.5:1"], "method.beta1 must be < 1, got 1.0"),
    "a range by logarithm from 0": (
        ["method.weight_decay=0:1"],
        "got 0.0:1.0; 0.0:1.0:linear may begin anywhere",
    ),
    "a broken number of rows": (["method.batch_size=1.5:8"], "method.batch_size must be an integer"),
    "one value": (["method.batch_size=16"], "a choice needs two values or more, got 16"),
    "no value": (["method.batch_size="], "a choice needs two values or more"),
    "a value twice": (["method.batch_size=16,16"], "a choice needs each value once, got 16, 16"),
    "a value twice in two spellings": (["method.lr=0.1,1e-1"], "a choice needs each value once, got 0.1, 0.1"),
    "a value of another type": (["method.batch_size=16,many"], "method.batch_size must be an integer, got 'many'"),
    "a value outside of the limits": (
        ["method.batch_size=0,16"],
        "method.batch_size must be >= 1, got '0'",
    ),
    "an unknown choice": (
        ["method.objective=contrastive,hinge"],
        "must be 'contrastive' or 'cross_entropy', got 'hinge'",
    ),
    "a value that only one candidate has": (
        ["method=fedclip,tip_adapter", "method.objective=cross_entropy,means"],
        "fedclip: method.objective must be 'contrastive' or 'cross_entropy', got 'means'",
    ),
    "the data": (["held_out=ink,photo"], "held_out cannot be searched: all trials of a sweep use the same data"),
    "who judges": (["eval_every=1,5"], "eval_every cannot be searched: it changes how trials are evaluated"),
    "a field twice": (["method.lr", "method.lr=1e-4:1e-3"], "--search method.lr=1e-4:1e-3: fedclip.lr is given twice"),
    "a field twice under two names": (["method.lr", "fedclip.lr"], "--search fedclip.lr: fedclip.lr is given twice"),
    "a range for all": (["method.*=1:2"], "* stands for declared ranges and takes no range"),
    "what does not count": (
        ["method.momentum"],
        "fedclip.momentum has an effect only when fedclip.optimizer is 'sgd', not 'adam'",
    ),
    "nothing to search": (
        ["server.*"],
        "nothing to search; fields with a declared range: fedclip.lr",
    ),
    "a cohort of more than there are": (["cohort=10:100"], "a cohort of 100 from 40 clients"),
    "a declared cohort of more than there are": (["cohort"], "--search cohort: a cohort of 100 from 40 clients"),
    "fewer clients than the cohort": (
        ["clients=20:60", "cohort=10:30"],
        "clients, cohort: a cohort of 30 from 20 clients",
    ),
    "a rule for other methods": (
        ["server=fedavg,fedex_lora"],
        "server fedex_lora needs the low-rank pairs of method lora, not fedclip",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_sentence(bad):
    texts, sentence = BAD[bad]
    with pytest.raises(InputError) as refused:
        Space.parse(texts, Config(clients=40))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_field_that_the_rule_does_not_bear_is_to_be_left_out():
    config = Config(method={"name": "promptfl", "momentum": 0}, server="scaffold")
    with pytest.raises(InputError, match=r"^--search: name the others, and leave promptfl.momentum out: .*not 0\.95$"):
        Space.parse((), config)
    assert Space.parse(["method.lr", "server.*"], config).plain() == [
        "promptfl.lr=0.0001:0.1:log",
        "scaffold.lr=0.01:10.0:log",
    ]


def test_a_space_is_the_same_whatever_the_order_of_writing():
    config = Config(clients=40)
    texts = ["method=fedclip,probe", "method.*", "cohort=10:20", "server=fedavgm,fedprox", "server.lr"]
    assert Space.parse(texts, config) == Space.parse(texts[::-1], config)


def test_a_range_of_whole_numbers_gives_whole_numbers_and_reaches_both_ends():
    fields = [fields for fields, _ in asked(["cohort=2:4", "method.local_epochs"], Config(clients=40))]
    assert {one["cohort"] for one in fields} == {2, 3, 4}
    assert {one["method"]["local_epochs"] for one in fields} == {1, 2, 3, 4, 5}
    assert all(type(one["cohort"]) is int for one in fields)


def test_by_logarithm_half_of_four_decades_are_the_two_lower_ones():
    values = [fields["method"]["lr"] for fields, _ in asked(["method.lr=1e-5:1e-1"], trials=200)]
    assert all(1e-5 <= value <= 1e-1 for value in values)
    assert 70 <= sum(value < 1e-3 for value in values) <= 130  # linear: 2 of 200


def test_only_what_the_chosen_component_has_is_asked_for():
    found = asked(["method=fedclip,lora", "method.lr", "method.rank"])
    assert {frozenset(params) for _, params in found} == {
        frozenset({"method", "fedclip.lr"}),
        frozenset({"method", "lora.lr", "lora.rank"}),
    }
    for fields, params in found:
        name = params["method"]
        assert fields["method"]["name"] == name and fields["method"]["lr"] == params[f"{name}.lr"]


def test_each_candidate_is_searched_over_the_range_that_it_declares():
    found = asked(["method=finetune,promptfl", "method.lr"])
    for name, low, high in (("finetune", 1e-6, 3e-4), ("promptfl", 1e-4, 1e-1)):
        values = [fields["method"]["lr"] for fields, params in found if params["method"] == name]
        assert values and all(low <= value <= high for value in values)


def test_momentum_is_searched_beside_sgd_alone():
    found = asked(["method.optimizer", "method.momentum", "method.beta1"])
    assert {(params["fedclip.optimizer"], *sorted(params)) for _, params in found} == {
        ("adam", "fedclip.beta1", "fedclip.optimizer"),
        ("adamw", "fedclip.beta1", "fedclip.optimizer"),
        ("sgd", "fedclip.momentum", "fedclip.optimizer"),
    }


def test_of_two_methods_each_has_the_hyperparameters_of_its_own_optimizer():
    plain = Space.parse(["method=fedclip,promptfl", "method.momentum", "method.beta1"], Config()).plain()
    assert plain == ["method=fedclip,promptfl", "fedclip.beta1=0.5:0.95:linear", "promptfl.momentum=0.0:0.95:linear"]


def test_a_prompt_that_starts_as_a_text_has_no_length_to_search():
    config = Config(method={"name": "promptfl", "init": "a picture of a"})
    assert not any("length" in text for text in Space.parse((), config).plain())
    assert "promptfl.length=4,8,16" in Space.parse((), Config(method="promptfl")).plain()


def test_local_epochs_are_not_searched_where_a_fleet_gives_those_of_each_device():
    config = Config(fleet={"name": "ideal", "epochs": [1, 2]})
    assert "fedclip.local_epochs=1:5:linear" in Space.parse((), Config()).plain()
    assert not any("local_epochs" in text for text in Space.parse((), config).plain())
    with pytest.raises(InputError, match=r"fedclip\.local_epochs has no effect with fleet\.epochs"):
        Space.parse(["method.local_epochs"], config)
    both = Space.parse(["fleet=ideal,lognormal", "method.local_epochs"], config).plain()
    assert "fedclip.local_epochs=1:5:linear" in both  # the other fleet has none


def test_what_is_suggested_makes_a_config_that_keeps_the_rest_of_the_base():
    base = Config(method={"name": "fedclip", "eps": 0.01}, server="fedavgm", clients=40, rounds=7)
    texts = ["method=fedclip,probe", "method.*", "server.*", "cohort=10:20", "shots=none,4"]
    seen = set()
    for fields, params in asked(texts, base):
        config = Config(**merged(base.plain(), fields))
        assert config.rounds == 7 and 10 <= config.cohort <= 20 and config.shots in (None, 4)
        assert config.method.eps == (0.01 if params["method"] == "fedclip" else 1e-8)
        assert config.server.beta == params["fedavgm.beta"]
        seen.add(params["method"])
    assert seen == {"fedclip", "probe"}


def test_a_trial_that_is_taken_up_again_is_told_the_same(tmp_path):
    space = Space.parse(["method=fedclip,probe", "method.*"], Config())
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="sweep")
    trial = study.ask()
    first = space.suggest(trial)
    again = optuna.load_study(storage=f"sqlite:///{tmp_path / 'study.db'}", study_name="sweep")
    assert space.suggest(optuna.trial.Trial(again, trial._trial_id)) == first


def test_the_base_config_can_be_the_first_trial():
    config = Config(method={"name": "fedclip", "lr": 3e-4}, server="fedavgm")
    space = Space.parse(["method=fedclip,probe", "method.lr", "server.*"], config)
    base = {"method": "fedclip", "fedclip.lr": 3e-4, "fedavgm.lr": 1.0, "fedavgm.beta": 0.9}
    assert space.defaults(config) == base
    study = optuna.create_study()
    study.enqueue_trial(base)
    assert Config(**merged(config.plain(), space.suggest(study.ask()))) == config


@pytest.mark.parametrize(
    "texts", [["method.lr=1e-3:1e-2"], ["method=lora,probe"], ["cohort=2:4"], ["method.batch_size=8,16"]]
)
def test_a_base_config_outside_of_the_space_is_no_trial(texts):
    config = Config(clients=40)
    assert Space.parse(texts, config).defaults(config) is None


def test_two_spaces_are_told_apart_parameter_by_parameter():
    config = Config(clients=40)
    before = Space.parse(["method.lr", "method.batch_size", "method.local_epochs"], config).plain()
    after = Space.parse(["method.lr=1e-4:1e-3", "method.batch_size", "cohort=10:20"], config)
    assert after.changes(before) == [
        "cohort was not searched, and now is, over 10:20:log",
        "fedclip.local_epochs was searched over 1:5:linear, and now is not",
        "fedclip.lr was searched over 1e-05:0.01:log, and now is over 0.0001:0.001:log",
    ]
    assert after.changes(after.plain()) == []

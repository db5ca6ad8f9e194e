"""Several data sets in one federation: made in the layouts of CoOp, from drawings of glyphs."""

import json
import shutil
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedsim import Config, InputError, run
from fedsim.cli.flags import parse_run
from fedsim.clients import make_clients, new_of
from fedsim.cluster.pool import open_pool
from fedsim.config import read_yaml
from fedsim.counts import Counts
from fedsim.datasets import TEST, TRAIN, VAL
from fedsim.datasets.glyphs import Glyphs
from fedsim.folder import exclusive
from fedsim.prepare import encode_experiment, prepare, sizing_of
from fedsim.registry import parse
from fedsim.reporting.report import Report
from fedsim.simulate import rounds
from fedsim.training.client_store import PrivateStore
from fedsim.training.task import Task

# Folder, name of the split file and folder of the images, as in CoOp's DATASETS.md; and a number of classes.
LAYOUTS = {
    "caltech101": ("caltech-101", "Caltech101", "101_ObjectCategories", 5),
    "oxford_flowers": ("oxford_flowers", "OxfordFlowers", "jpg", 4),
    "fgvc_aircraft": ("fgvc_aircraft", None, "images", 3),
    "ucf101": ("ucf101", "UCF101", "UCF-101-midframes", 4),
    "oxford_pets": ("oxford_pets", "OxfordPets", "images", 5),
    "food101": ("food-101", "Food101", "images", 3),
    "dtd": ("dtd", "DescribableTextures", "images", 4),
    "stanford_cars": ("stanford_cars", "StanfordCars", "cars_train", 4),
    "sun397": ("sun397", "SUN397", "SUN397", 5),
}
SPLITS = {"train": 3, "val": 1, "test": 3}  # images of each class
THREE = "oxford_pets", "fgvc_aircraft", "dtd"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """The nine sets, with drawings of the classes of glyphs, which follow each other in a circle."""
    root, glyphs, first = tmp_path_factory.mktemp("sets"), Glyphs().load(None), 0
    for folder, split_file, images, count in LAYOUTS.values():
        labels = list(islice(cycle(range(len(glyphs.classes))), first, first + count))
        first += count
        items = {split: [] for split in SPLITS}
        for number, label in enumerate(labels):
            rows = iter(np.flatnonzero(glyphs.y == label).tolist())
            for split, copies in SPLITS.items():
                for row in islice(rows, copies):
                    items[split].append([f"{row}.jpg", number, glyphs.classes[label]])
                    (root / folder / images).mkdir(parents=True, exist_ok=True)
                    glyphs.open(row).convert("RGB").save(root / folder / images / f"{row}.jpg")
        if split_file:
            (root / folder / f"split_zhou_{split_file}.json").write_text(json.dumps(items))
            continue
        (root / folder / "variants.txt").write_text("\n".join(glyphs.classes[label] for label in labels))
        for split, of_split in items.items():
            lines = [f"{Path(path).stem} {name}" for path, _, name in of_split]
            (root / folder / f"images_variant_{split}.txt").write_text("\n".join(lines))
    return root


@pytest.fixture
def suite(sets, tmp_path):
    """Makes a Config of a quick run on three of the sets, in this process."""

    def make(**fields):
        quick = {"dataset": {"name": "suite", "members": THREE}, "data_dir": sets, "rounds": 1, "actors": 0}
        quick["page"] = False
        return Config(**(quick | {"out": tmp_path / "run"} | fields))

    return make


@pytest.mark.parametrize("method", ["facmic", "faaclip"])
def test_target_rows_of_other_classes_are_refused(method, suite):
    with pytest.raises(InputError) as refused:
        prepare(suite(method=method, held_out=("dtd",)))
    assert str(refused.value) == (
        f"method {method} reads unlabelled rows of held-out domains in training, which need the classes of the other "
        "domains; in a suite, each data set has classes of its own"
    )


def load(root, members):
    return parse("dataset", {"name": "suite", "members": members}).load(root)


def encoded(config):
    return encode_experiment(prepare(config), sizing_of(config), print).encoded.source


def report_of(config):
    """The report of a run without its page, which takes most of the time of so small a run."""
    experiment = encode_experiment(prepare(config), sizing_of(config), print)
    with exclusive(experiment.folder, "run"), open_pool(sizing_of(config), 1) as pool:
        return list(rounds(experiment, pool))[-1]


def alone(sets, tmp_path, name, **fields):
    return Config(dataset="coop", data_dir=sets / LAYOUTS[name][0], rounds=1, actors=0, out=tmp_path / name, **fields)


# The data set ---------------------------------------------------------------------------------------------------


def test_a_suite_joins_sets_whose_classes_stay_their_own(sets):
    pets, aircraft = (parse("dataset", "coop").load(sets / name) for name in ("oxford_pets", "fgvc_aircraft"))
    both = load(sets, {"pets": "oxford_pets", "fgvc_aircraft": None})
    assert both.domains == ("pets", "fgvc_aircraft") and both.classes == pets.classes + aircraft.classes
    assert both.y.tolist() == [*pets.y, *(aircraft.y + 5)] and both.class_domain == (0, 0, 0, 0, 0, 1, 1, 1)
    assert both.domain.tolist() == [0] * len(pets) + [1] * len(aircraft)
    assert both.class_labels[0] == f"pets/{pets.classes[0]}" and both.names[0] == f"pets/{pets.names[0]}"
    assert both.template == (*[pets.template] * 5, *["a photo of a {}, a type of aircraft."] * 3)
    assert np.array_equal(both.split, np.concatenate([pets.split, aircraft.split]))


def test_without_members_every_folder_is_one(sets):
    assert sorted(load(sets, None).domains) == sorted(folder for folder, *_ in LAYOUTS.values())


def test_members_are_written_on_the_command_line_in_yaml_and_in_the_config_of_a_run(sets, tmp_path):
    words = ["--dataset", "suite", "--dataset.members", "dtd, pets=oxford_pets", "--data-dir", str(sets)]
    config, _ = parse_run(words)
    fields = {"classes": None, "class_names": None, "spaces": True, "absent_classes": False, "domain_groups": False}
    assert config.plain()["dataset"] == {
        "name": "suite",
        "members": {"dtd": {"folder": "dtd", "name": "coop"} | fields}
        | {"pets": {"folder": "oxford_pets", "name": "coop"} | fields},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    assert Config(**read_yaml(tmp_path / "config.yaml")) == config


def test_a_member_has_the_options_of_its_data_set(sets):
    names = parse("dataset", "coop").load(sets / "dtd").classes
    chosen = {"name": "coop", "classes": ",".join(names[:2])}
    assert load(sets, {"dtd": chosen, "ucf101": "ucf101"}).classes[:2] == names[:2]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ("dtd,ucf101,dtd", "dataset.members has two members of one name: dtd"),
        ({"dtd": "dtd", "DTD": "ucf101"}, "every member needs a name, and not one that differs only in capitals; "),
        ({}, "dataset.members must map the name of each data set to its folder, got {}"),
        ({"dtd": {"name": "coopp"}}, "member dtd: no dataset 'coopp'; available: coop, "),
        ({"dtd": {"colour": 1}}, "member dtd: no field 'colour' in CoOp; available: "),
        ({"dtd": {"name": "synthetic"}}, "member dtd: data set synthetic cannot be a member of a suite"),
        ({"dtd": {"folder": 7}}, "member dtd: folder must be the name of a folder in --data-dir, got 7"),
        ({"dtd": {"domain_groups": True}}, "member dtd: its rows are of one domain, and so of one group; "),
        ({"dtd": 7}, "member dtd must be a folder or a mapping of its fields, got 7"),
    ],
)
def test_members_that_cannot_be_are_refused(members, sentence):
    with pytest.raises(InputError) as caught:
        Config(dataset={"name": "suite", "members": members})
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_a_member_whose_files_do_not_fit_is_named(sets, tmp_path):
    with pytest.raises(InputError) as caught:
        load(sets, "dtd,eurosat")
    assert str(caught.value) == (
        f"member eurosat of the suite needs the folder {sets / 'eurosat'}; folders there: "
        + ", ".join(sorted(folder for folder, *_ in LAYOUTS.values()))
    )
    with pytest.raises(InputError, match=r"^member empty: expected one split_zhou_\*.json"):
        (tmp_path / "empty").mkdir()
        load(tmp_path, None)
    with pytest.raises(InputError, match=r"test rows of their own, or none may have them: dtd with, tree without"):
        load(sets, {"dtd": "dtd", "tree": {"name": "image_folder", "folder": "caltech-101"}})
    with pytest.raises(InputError, match="member dtd must be image files of one domain; data set folder has others"):
        pictures = sorted((sets / "dtd" / "images").iterdir())
        for domain in "ab":
            (tmp_path / "two" / domain / "dog").mkdir(parents=True)
            (tmp_path / "two" / domain / "dog" / "1.jpg").write_bytes(pictures[0].read_bytes())
        load(tmp_path, {"dtd": {"name": "folder", "folder": "two"}})


# Texts and accuracies -------------------------------------------------------------------------------------------


def test_class_texts_and_zero_shot_counts_are_those_of_each_set_alone(sets, suite, tmp_path):
    together = suite(method="zero_shot", rounds=0)
    report, vectors = report_of(together), encoded(together).class_embeddings.vectors
    assert report.facts["class_texts"] == (
        "'a photo of a {}, a type of pet.', 'a photo of a {}, a type of aircraft.', '{} texture.'"
    )
    scores, first = report.tables().zero_shot.scores, 0
    for name in THREE:
        one = alone(sets, tmp_path, name, method="zero_shot", partition="iid", clients=1)
        own = encoded(one).class_embeddings.vectors
        assert np.array_equal(vectors[first : first + len(own)], own)
        first += len(own)
        columns = ["split", "correct", "total", "correct_own"]
        expected = report_of(one).tables().zero_shot.scores[columns].to_numpy().tolist()
        assert scores[scores.domain == name][columns].to_numpy().tolist() == expected
    assert first == len(vectors)
    prompted = encoded(suite(method="zero_shot", prompt="{}", out=tmp_path / "plain")).class_embeddings
    assert prompted.templates == ("{}",) and not np.array_equal(prompted.vectors, vectors)


def test_a_suite_of_one_set_is_the_set(sets, suite, tmp_path):
    fields = {"method": {"name": "fedtpg", "heads": 2}, "partition": "domain_classes", "clients": 2, "new_classes": 0.4}
    one = report_of(suite(dataset={"name": "suite", "members": "oxford_pets"}, **fields))
    other = report_of(alone(sets, tmp_path, "oxford_pets", **fields))
    assert all(np.array_equal(one.adapter[name], other.adapter[name]) for name in other.adapter)
    assert one.summary() == pytest.approx(other.summary(), nan_ok=True)


def test_a_client_trains_among_the_classes_of_its_set(sets, suite, tmp_path):
    # Full batches, so the order of the rows, which is drawn by a client's number, changes nothing but rounding.
    method = {"name": "probe", "optimizer": "sgd", "lr": 0.1, "batch_size": 1000}
    both = suite(method=method, server="local_only", new_classes=0.4)
    source = encoded(both)
    report_of(both)
    for client, name in enumerate(THREE):
        one = alone(
            sets, tmp_path, name, method=method, server="local_only", partition="iid", clients=1, new_classes=0.4
        )
        report_of(one)
        (own,) = PrivateStore(one.folder() / "private").read(0, 1).values()
        (ours,) = PrivateStore(both.folder() / "private").read(client, 1).values()
        mine = np.array(source.class_domain) == client
        assert np.allclose(ours[mine], own, rtol=0, atol=1e-6)
        start = source.class_embeddings.vectors
        assert np.array_equal(ours[~mine], start[~mine]) and not np.array_equal(ours[mine], start[mine])


def test_the_classes_of_a_client_with_rows_of_two_sets_compete_together(suite):
    config = suite(partition="iid", clients=2, method="fedclip")
    experiment = prepare(config)
    data = encoded(config)
    trained = experiment.clients.trained_classes(data)
    masks = Task(config.method, config.server, 0).competing(data, trained, [np.array([0, len(data) - 1])])
    domain = np.array(data.class_domain)
    assert masks is not None and masks.tolist() == [(domain != 1).tolist()]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedclip"},
        {"name": "promptfl", "init": "a picture of a"},
        {"name": "fedtpg", "heads": 2},
        {"name": "lora"},
    ],
    ids=lambda fields: fields["name"],
)
def test_methods_run_on_a_suite_and_predict_classes_of_the_rows_own_set(method, suite):
    config = suite(method=method, partition={"name": "domain_classes", "per_client": 2}, new_classes=0.5)
    report = report_of(config)
    summary, tables = report.summary(), report.tables()
    assert 0 < summary["local"] <= 1 and np.isfinite([summary[key] for key in ("base", "new", "harmonic_3")]).all()
    source = prepare(config).data.source
    assert tables.new_classes == [source.class_labels[label] for label in (3, 4, 7, 10, 11)]
    counts = tables.trained.labels.assign(set=lambda table: table.label.str.partition("/")[0])
    by_set = counts.groupby(["round", "group", "set"])[["predicted", "support"]].sum()
    assert (by_set.predicted == by_set.support).all() and len(by_set) == 2 * 2 * 3


def test_operations_are_those_of_the_texts_that_a_client_encodes(suite, sets, tmp_path):
    method, name = {"name": "promptfl", "length": 2}, THREE[0]
    both = report_of(suite(method=method))
    one = report_of(alone(sets, tmp_path, name, method=method, partition="iid", clients=1))
    base = report_of(suite(method=method, new_classes=0.5, out=tmp_path / "base"))
    counts = [report.facts["flops_per_step"] for report in (both, one, base)]
    assert counts[0] == counts[1] > counts[2]


# FedTPG's federation --------------------------------------------------------------------------------------------


def test_new_classes_are_the_last_half_of_each_set_and_clients_have_one_set(sets):
    data = load(sets, list(THREE))
    assert new_of(data.classes, 0.5, data.class_domain) == [3, 4, 7, 10, 11]  # of 5, 3 and 4 classes
    partition = parse("partition", {"name": "domain_classes", "per_client": 2})
    clients = make_clients(data, partition, None, (), 0, shots=1, new_classes=0.5)
    held = [np.unique(data.y[clients[k].train]).tolist() for k in range(clients.trainers)]
    assert held == [[0, 1], [2], [5, 6], [8, 9]]
    assert all(np.bincount(data.y[clients[k].train]).max() == 1 for k in range(clients.trainers))
    assert np.unique(data.y[clients[4].test]).tolist() == [3, 4, 7, 10, 11] and len(clients) == 5
    assert (data.split[clients[4].test] == TEST).all()


def test_the_sets_of_fedtpg_have_thirty_clients():
    base = [50, 51, 50, 51, 19, 51, 24, 98, 199]
    labels, domains = np.arange(sum(base)), np.repeat(np.arange(9), base)
    split = parse("partition", {"name": "domain_classes", "per_client": 20}).split
    parts = split(labels, domains, None, np.random.default_rng())
    assert np.bincount([domains[part[0]] for part in parts]).tolist() == [2, 3, 2, 3, 1, 3, 1, 5, 10]
    sizes = [20, 30, 20, 20, 11, 20, 30, 20, 20, 11, 19, 20, 20, 11, 24, 20, 20, 20, 20, 18, *[20] * 9, 19]
    assert [len(part) for part in parts] == sizes
    with pytest.raises(InputError, match=r"--partition\.per-client 20 gives 30 clients, not 9; leave one out"):
        split(labels, domains, 9, np.random.default_rng())


def test_clients_may_share_the_classes_of_each_set_evenly():
    labels, domains = np.arange(12), np.repeat([0, 1], [5, 7])
    split = parse("partition", "domain_classes").split
    assert [len(part) for part in split(labels, domains, 4, np.random.default_rng())] == [3, 2, 4, 3]
    for count in (3, 12):
        with pytest.raises(InputError, match=f"a multiple of the 2 training domains, at most 10, not {count} clients"):
            split(labels, domains, count, np.random.default_rng())


# Correct and all predictions in FedTPG's published log (output/cross_cls/fedtpg/20_8/43): of each client among its own
# classes, and of the new classes of each set; and the correct ones among all base classes of each set.
LOCAL = [
    [(962, 974), (556, 575)], [(316, 351), (302, 348), (337, 354)], [(166, 666), (491, 1000)],
    [(662, 761), (622, 754), (362, 419)], [(1786, 1881)], [(5520, 6000), (5636, 6000), (3185, 3300)], [(540, 864)],
    [(590, 814), (603, 806), (655, 804), (539, 819), (590, 759)],
    [*[(correct, 1000) for correct in (895, 925, 923, 920, 920, 950, 882, 903, 892)], (876, 950)],
]  # fmt: skip
BASE = [1506, 746, 525, 1452, 1786, 13753, 540, 2659, 7368]
NEW = [872, 1109, 595, 1421, 1689, 13735, 511, 3012, 7663]
NEW_ROWS = [916, 1410, 1667, 1849, 1788, 15000, 828, 4039, 9900]


def test_the_counts_of_fedtpgs_log_have_the_means_of_the_log():
    scores, client = [], 0
    for domain, clients in enumerate(LOCAL):
        left = BASE[domain]
        for own, total in clients:
            correct, left = min(left, total), left - min(left, total)  # shared among clients in any way
            scores.append([client, domain, 1, correct, total, own])
            client += 1
    scores += [[30, domain, 2, NEW[domain], NEW_ROWS[domain], NEW[domain]] for domain in range(9)]
    names = [f"set {k}" for k in range(9)]
    report = Report({}, names, names, [], {}, list(range(9)))
    report.add_scores(0, Counts(np.array(scores, np.int32)))
    summary = report.summary()
    assert summary["local"] == pytest.approx(0.8089875957861062, abs=1e-15)
    assert summary["base"] == pytest.approx(0.7360997759797618, abs=1e-15)
    assert summary["new"] == pytest.approx(0.7623509856917346, abs=1e-15)


def test_a_held_out_set_is_tested_on_its_own_test_rows(sets):
    data = load(sets, list(THREE))
    clients = make_clients(data, parse("partition", "by_domain"), None, ("dtd",), 0)
    assert np.array_equal(clients[2].test, np.flatnonzero((data.domain == 2) & (data.split == TEST)))
    assert set(data.split[clients[0].train].tolist()) == {TRAIN}


def test_the_config_of_fedtpgs_federation_runs_on_small_sets_of_its_layouts(sets, tmp_path):
    overrides = {"data_dir": sets, "backbone": None, "pretrained": None, "rounds": 1, "eval_every": 1, "actors": 0}
    fields = read_yaml("fedtpg_suite")
    assert Config(**fields).rounds == 500 and list(fields["dataset"]["members"]) == list(LAYOUTS)
    report = run(Config(**fields | overrides, out=tmp_path / "run"))
    tables = report.tables()
    assert report.domains == list(LAYOUTS) and tables.partition.client.nunique() == 9 + 1
    assert len(tables.new_classes) == sum(count // 2 for *_, count in LAYOUTS.values())
    assert 0 < report.summary()["harmonic_3"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the trained classes of the row&#39;s data set (21 in all) compete" in page
    assert "local, base and new are means over the data sets" in page


def test_rows_of_neighbors_are_judged_among_the_classes_of_their_data_set(suite):
    tables = report_of(suite(method="probe", neighbors=2)).tables()
    assert sorted(set(tables.scores.domain)) == sorted(THREE)
    for model in tables.zero_shot, tables.of("trained", 1):
        own, others = (
            model.scores[model.scores.split == split].groupby("client")[["correct", "total"]].sum()
            for split in ("test", "neighbor")
        )
        assert len(own) == 3 and (own + others == own.sum()).all(axis=None)  # one model for all


# Cross-dataset --------------------------------------------------------------------------------------------------

# Correct and all predictions in FedTPG's published log (output/cross_data/fedtpg/5_8/43), in the order of the config.
CROSS = [
    (2312, 2465), (1734, 2463), (791, 3333), (2528, 3783), (3341, 3669),
    (26102, 30300), (769, 1692), (5205, 8041), (13265, 19850), (3627, 8100),
]  # fmt: skip


@pytest.fixture(scope="module")
def eleven(sets, tmp_path_factory) -> Path:
    """The nine sets, EuroSAT, and an ImageNet of 12 classes, which has train and test rows only."""
    root, glyphs = tmp_path_factory.mktemp("eleven"), Glyphs().load(None)
    shutil.copytree(sets, root, dirs_exist_ok=True)
    shutil.copytree(sets / "dtd", root / "eurosat")
    (root / "eurosat" / "images").rename(root / "eurosat" / "2750")
    for label in range(12):
        rows = np.flatnonzero(glyphs.y == label)
        for split, own in (("train", rows[:3]), ("val", rows[3:4])):
            (folder := root / "imagenet" / split / f"n{label:08}").mkdir(parents=True)
            for row in own:
                glyphs.open(row).convert("RGB").save(folder / f"{row}.jpg")
    names = "".join(f"n{label:08} {glyphs.classes[label]}\n" for label in range(12))
    (root / "imagenet" / "classnames.txt").write_text(names)
    return root


def test_a_client_has_validation_rows_as_its_set_defines_them(eleven):
    data = load(eleven, {"imagenet": {"name": "imagenet"}, "dtd": {}})
    clients = make_clients(data, parse("partition", "by_domain"), None, (), 0, 0.5)
    imagenet, dtd = clients[0], clients[1]
    # ImageNet's train rows are cut as those of a set alone, dtd's are its own.
    own = parse("dataset", "imagenet").load(eleven / "imagenet")
    (alone,) = make_clients(own, parse("partition", "by_domain"), None, (), 0, 0.5)
    for part in ("train", "val", "test"):
        assert np.array_equal(getattr(imagenet, part), getattr(alone, part))
    assert (len(imagenet.train), len(imagenet.val), len(imagenet.test)) == (24, 12, 12)
    for split, rows in ((TRAIN, dtd.train), (VAL, dtd.val), (TEST, dtd.test)):
        assert np.array_equal(rows, np.flatnonzero((data.domain == 1) & (data.split == split)))


def test_the_cross_dataset_config_trains_on_imagenet_and_tests_ten_held_out_sets(eleven, tmp_path):
    fields = read_yaml("cross_dataset")
    assert Config(**fields).rounds == 500 and Config(**fields).cohort == 20
    tenth = {"data_dir": eleven, "backbone": None, "pretrained": None, "cohort": 1, "rounds": 0}
    report = report_of(Config(**fields | tenth, actors=0, page=False, out=tmp_path / "run"))
    partition, tables = report.tables().partition, report.tables()
    train = partition[partition.split == "train"]
    assert train.groupby("client").label.nunique().tolist() == [5, 7]  # 12 classes are 2 blocks, the last one longer
    assert (train.rows == 3).all() and not (partition.split == "val").any()  # fewer than 8 shots: all
    assert tables.held_out == [*list(LAYOUTS), "eurosat"]
    held = tables.trained.scores[tables.trained.scores.domain.isin(tables.held_out)]
    assert held.groupby("domain").total.sum().reindex(tables.held_out).tolist() == [
        *(3 * count for *_, count in LAYOUTS.values()), 12,
    ]  # fmt: skip
    accuracy = held.groupby("domain")[["correct", "total"]].sum()
    assert report.summary()["generalization"] == pytest.approx((accuracy.correct / accuracy.total).mean())


def test_the_counts_of_fedtpgs_cross_dataset_log_have_the_mean_of_the_log():
    names = [f"set {k}" for k in range(10)]
    scores = [[k, k, 1, correct, total, correct] for k, (correct, total) in enumerate(CROSS)]
    report = Report({}, names, names, names, {}, list(range(10)))
    report.add_scores(0, Counts(np.array(scores, np.int32)))
    assert report.summary()["generalization"] == pytest.approx(0.6537420471045971, abs=1e-15)

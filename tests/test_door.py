"""Bad input: one sentence, exit code 2, nothing written, and Ray never started."""

import os
import re
import subprocess
import sys
from io import StringIO

import pytest
import torch
import yaml
from PIL import Image

from fedsim import Config, InputError, run
from fedsim.__main__ import main
from fedsim.checkpoint import NAME
from fedsim.cli.flags import parse_run, run_parser
from fedsim.cli.help import show_components
from fedsim.config import DEFAULTS
from fedsim.errors import Diverged, code_of, listing, sentence_of
from fedsim.events import Note
from fedsim.folder import refuse_another
from fedsim.progress import plain_console, progress_bars, show_on
from fedsim.registry import FOLDERS, KINDS, available, component, find, parse


def names(kind: str) -> str:
    return listing(available(kind), 40)


BAD = {
    "a command": (["rum"], "no command 'rum'; available: run, sweep, compare, page, watch, stop, list, help"),
    "a list": (
        ["list", "x"],
        "no list 'x'; available: datasets, partitions, methods, servers, codecs, privacy, attacks, fleets",
    ),
    "a component": (["help", "fedklip"], "no component 'fedklip'; did you mean fedclip"),
    "nothing like a component": (["help", "zzz"], "no component 'zzz'; available: coop, domainnet"),
    "help without end": (["help", "fedclip", "lora"], "unrecognized arguments: lora"),
    "a flag": (["run", "--roundz", "3"], "no flag --roundz; did you mean --rounds"),
    "a word": (["run", "glyphs"], "no flag glyphs"),
    "a flag without its value": (["run", "--rounds"], "argument --rounds: expected one argument"),
    "a method": (["run", "--method", "fedklip"], f"no method 'fedklip'; available: {names('method')}"),
    "a long name": (["run", "--method", 300 * "a"], f"no method '{300 * 'a'}'; available: {names('method')}"),
    "a name in capitals": (["run", "--method", "LoRA"], f"no method 'LoRA'; available: {names('method')}"),
    "a server": (["run", "--server", "x"], f"no server 'x'; available: {names('server')}"),
    "a partition": (["run", "--partition", "x"], f"no partition 'x'; available: {names('partition')}"),
    "a data set": (["run", "--dataset", "x"], f"no dataset 'x'; available: {names('dataset')}"),
    "a field of another": (["run", "--method.gamma", "1"], "no flag --method.gamma"),
    "a name as a field": (["run", "--method.name", "probe"], "no flag --method.name"),
    "no name of a field": (["run", "--method.__dataclass_self__", "1"], "no flag --method.--dataclass-self--"),
    "a flag before a config": (
        ["run", "--config", "nowhere.yaml", "--method.lrr", "1"],
        "no flag --method.lrr; did you mean --method.lr",
    ),
    "a field of a component": (
        ["run", "--method", "probe", "--method.objective", "contrastive"],
        "no field 'objective' in Probe; available: optimizer, lr",
    ),
    "a type": (["run", "--rounds", "many"], "rounds must be an integer, got 'many'"),
    "a range": (["run", "--method.lr", "-1"], "method.lr must be > 0, got '-1'"),
    "a huge number": (
        ["run", "--method.local-epochs", "9999999999"],
        "method.local_epochs must be <= 1000000000, got '9999999999'",
    ),
    "a choice": (["run", "--dtype", "int8"], "dtype must be 'float32' or 'float64', got 'int8'"),
    "a domain": (["run", "--held-out", "sketch"], "no domain 'sketch' to hold out; available: clipart, ink, noto"),
    "clients": (["run", "--partition", "iid", "--clients", "9999"], "9999 clients for"),
    "a cohort": (["run", "--cohort", "40"], "cohort of 40 from 4 clients; it can be at most 4"),
    "a config": (
        ["run", "--config", "nowhere.yaml"],
        "no config file 'nowhere.yaml'; embedded configs: base_to_new, cross_dataset, ",
    ),
    "a GPU": (["run", "--gpus-per-actor", "0.5"], "--gpus-per-actor 0.5, but torch finds no GPU on this machine"),
    "an address": (["run", "--address", "127.0.0.1:9"], "no cluster answers at 127.0.0.1:9"),
    "a form of address": (["run", "--address", "nowhere"], "--address needs host:port or auto, got 'nowhere'"),
    "a backbone": (
        ["run", "--backbone", "ViT-B-33", "--pretrained", "openai"],
        "no backbone 'ViT-B-33' in open_clip; there are: ViT-B-32",
    ),
    "a tag": (
        ["run", "--backbone", "ViT-B-32", "--pretrained", "clozedai"],
        "no file and no tag 'clozedai' for ViT-B-32; its tags: openai",
    ),
    "a data folder": (["run", "--dataset", "pacs", "--data-dir", "/nowhere"], "/nowhere is not a folder"),
    "a rank": (
        ["run", "--method", "lora", "--method.rank", "200"],
        "lora.rank 200 is more than the smaller side of the text tower's transformer.resblocks.0.attn.in_proj_weight",
    ),
    "a context": (
        ["run", "--method", "promptfl", "--method.length", "40"],
        "--method.length 40 leaves no room for",
    ),
    "patch tokens": (
        ["run", "--method", "fedotp"],
        "needs patch tokens, and tiny's image tower (EfficientNet) has none; use a ViT",
    ),
    "blocks": (
        ["run", "--method", "fedvpt"],
        "needs the blocks of open_clip's VisionTransformer, and tiny's image tower is timm's EfficientNet",
    ),
    "matrices": (
        ["run", "--method", "lora", "--method.towers", "image"],
        "lora needs attention matrices in the image tower, which has none",
    ),
    "a rule for pairs": (
        ["run", "--server", "fedex_lora"],
        "server fedex_lora needs the low-rank pairs of method lora",
    ),
    "few for krum": (["run", "--server", "krum"], "krum with f 1 needs at least 5 clients per round, not 4"),
    "a head": (
        ["run", "--server", "fedper"],
        "fedper makes some shared tensors private, but none of this method's names begin with 'head'",
    ),
    "a schedule that ends": (
        ["run", "--method.schedule", "step", "--method.lr-decay", "1e-200", "--rounds", "30"],
        "--method.schedule step with --method.lr-decay 1e-200 lowers the step size to 0 in 30 rounds",
    ),
    "adam under scaffold": (["run", "--server", "scaffold"], "--method.optimizer sgd"),
    "new classes": (["run", "--new-classes", "0.01"], "new_classes 0.01 of 15 classes rounds down to none"),
    "a prompt": (
        ["run", "--prompt", "a picture"],
        "prompt needs {} once, where the class name goes, and no other braces, not 'a picture'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    if case == "a GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    argv, expected = BAD[case]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("fedsim: ") and expected in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_reaches_the_shell_and_neither_ray_nor_other_components_are_imported(tmp_path):
    others = "ray", "fedsim.methods.fedotp", "fedsim.servers.fedavgm", "fedsim.datasets.vlcs"
    code = "import sys; from fedsim.__main__ import main; code = main()\n"
    code += f"assert not {{*sys.modules}} & {{*{others}}}, 'imported'; sys.exit(code)"
    command = [sys.executable, "-c", code, "run", "--cohort", "40", "--method.lr", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "cohort of 40 from 4 clients; it can be at most 4" in done.stderr


@pytest.mark.parametrize(
    "text, expected",
    [
        ("rounds: [", "is not YAML"),
        ("- rounds", "must be a mapping of fields to values, got list"),
        ("roundz: 3", "no field 'roundz' in Config; available: dataset, data_dir"),
        ("server: {name: 7}", f"server must be a name, got 7; available: {names('server')}"),
        ("method: {name: fedclip, lr: high}", "method.lr must be a number, got 'high'"),
    ],
)
def test_a_bad_config_file_is_named_for_what_it_is(text, expected, tmp_path, capsys):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert main(["run", "--config", str(file)]) == 2
    assert expected in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"expects a folder; .*file is a file"):
        run(config(out=tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written"):
        run(config(out=tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="cannot be written"):
        run(config(out="/proc/fedsim"))


def test_a_folder_of_another_version_is_refused_by_the_fields_that_one_lacks(config, tmp_path):
    theirs, ours = ({"method": {"name": "probe", field: 32}, "rounds": 1} for field in ("batch", "batch_size"))
    sentence = "another version of fedsim or of method probe: only one of them has batch (now batch_size); give"
    with pytest.raises(InputError, match=re.escape(sentence)):
        refuse_another(tmp_path, theirs, ours)
    with pytest.raises(InputError, match=r"another version of fedsim: only one of them has lambda, mu; give"):
        refuse_another(tmp_path, {"lambda": 1, "rounds": 1}, {"mu": 1, "rounds": 2})


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--evaluate-every", "2"], "no flag --evaluate-every; it is now called --eval-every"),
        (["--method.keep-moments=1"], "no flag --method.keep-moments; it is now called --method.persist-optimizer"),
        (["--config", "old.yaml"], "no field 'evaluate_every' in Config; it is now called 'eval_every'"),
        (["--config", "batch.yaml"], "no field 'batch' in FedCLIP; it is now called 'batch_size'"),
    ],
)
def test_a_name_of_an_earlier_version_is_answered_with_the_new_one(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text("evaluate_every: 2", encoding="utf-8")
    (tmp_path / "batch.yaml").write_text("method: {batch: 2}", encoding="utf-8")
    with pytest.raises(InputError) as refused:
        parse_run(flags)
    assert str(refused.value) == sentence


def test_a_folder_of_another_experiment_is_refused_by_the_fields_that_differ(config):
    run(config(rounds=1))
    with pytest.raises(
        InputError, match=r"holds another experiment \(cohort None there, 2 here, seed 0 there, 5 here\)"
    ):
        run(config(cohort=2, seed=5))
    unequal = {"fleet": {"name": "ideal", "epochs": [1, 2]}, "method": {"name": "probe", "lr": 0.5}}
    with pytest.raises(
        InputError, match=r"\(fleet\.epochs \[\] there, \[1, 2\] here, method 'fedclip' there, 'probe' here\)"
    ):
        run(config(**unequal))
    run(config(rounds=1))


def test_a_checkpoint_cut_short_is_named(config):
    ours = config(rounds=1, page=True)
    run(ours)
    (ours.folder() / "report.html").unlink()
    file = ours.folder() / NAME
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        InputError, match=rf"{NAME} is damaged \(.*; delete the run's folder {ours.folder()} to start again"
    ):
        run(ours)


def test_weights_that_cannot_be_fetched_say_what_to_do(tmp_path):
    # A hub at a closed port of this machine, and nothing in its cache.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "fedsim", "run", "--backbone", "ViT-B-32", "--pretrained", "openai"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "the weights 'openai' of ViT-B-32 are not on this machine and the hub cannot be reached" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.ray
def test_what_goes_wrong_in_an_actor_is_one_sentence_too(features_dir, tmp_path, capsys):
    flags = ["--dataset=features", f"--data-dir={features_dir}", "--actors=1", f"--out={tmp_path / 'run'}"]
    diverging = ["--method=probe", "--method.optimizer=sgd", "--method.lr=1e38", "--method.weight_decay=1e3"]
    assert main(["run", *flags, *diverging]) == 1
    err = capsys.readouterr().err
    assert "fedsim: training diverged: in round 1 an update is not finite" in err and "Traceback" not in err


FAR = {"name": "probe", "optimizer": "sgd", "lr": 1e38, "weight_decay": 1e3}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"method": FAR}, "in round 1 an update is not finite; try a smaller --method.lr"),
        ({"method": FAR, "server": "median"}, "in round 1 an update is not finite; try a smaller --method.lr"),
        (
            {"method": FAR, "server": "local_only"},
            "in round 1 the private state of client 0 is not finite; try a smaller --method.lr",
        ),
        (
            {"method": "probe", "server": {"name": "fedadam", "lr": 1e39}},
            "in round 1 a prediction of the trained model is not finite; try a smaller --method.lr",
        ),
        (
            {"method": "probe", "server": {"name": "fedadam", "lr": 1e300}},
            "in round 1 weight after the server's step is not finite; try a smaller --method.lr or --server.lr",
        ),
    ],
)
def test_training_that_diverges_is_a_failure_of_the_run_that_names_its_round_and_a_remedy(fields, sentence, config):
    with pytest.raises(Diverged) as failed:
        run(config(**fields))
    assert sentence_of(failed.value) == f"training diverged: {sentence}"
    assert code_of(failed.value) == 1


@component
class Endless(type(parse("method", "probe"))):
    """A linear probe whose loss overflows and whose gradients do not."""

    def closed_form(self, module, params, batch):
        return None

    def loss(self, module, batch):
        return super().loss(module, batch) + 1e38 * 1e38


def test_a_loss_that_is_not_finite_has_diverged_although_the_parameters_are_finite(config):
    with pytest.raises(Diverged, match="in round 1 the loss of a client is not finite"):
        run(config(method=Endless()))


@pytest.fixture
def pictures(tmp_path):
    """2 domains x 2 classes x 6 real PNG files, one of them cut short."""
    for domain in ("ink", "oil"):
        for label in ("cat", "dog"):
            (tmp_path / "pictures" / domain / label).mkdir(parents=True)
            for k in range(6):
                image = Image.effect_noise((40, 40), 50 + k).convert("RGB")
                image.save(tmp_path / "pictures" / domain / label / f"{k}.png")
    cut = tmp_path / "pictures" / "ink" / "cat" / "3.png"
    cut.write_bytes(cut.read_bytes()[:500])
    return tmp_path / "pictures"


def test_a_truncated_image_is_named_and_skipped_only_when_asked_for(pictures, config, tmp_path):
    fields = {"dataset": "folder", "data_dir": pictures, "held_out": ("oil",), "rounds": 1, "partition": "iid"}
    with pytest.raises(InputError, match=r"ink/cat/3.png cannot be read \(.*\); --skip-unreadable leaves them out"):
        run(config(**fields, clients=2))
    said = []
    report = run(config(**fields, clients=2, skip_unreadable=True), said.append)
    assert report.facts["skipped"] == ["ink/cat/3.png"] and report.facts["images"] == 23
    assert Note("data", "left out 1 unreadable image: ink/cat/3.png") in said


def test_what_is_left_out_of_a_data_set_is_told_and_kept_in_the_report(pictures, config):
    (pictures / "ink" / "cat" / "3.png").rename(pictures / "ink" / "cat" / "3.heic")
    said = []
    fields = {"dataset": "folder", "data_dir": pictures, "held_out": ("oil",), "rounds": 0}
    report = run(config(**fields, partition="iid", clients=2), said.append)
    note = "left out 1 file not named like an image: 1 .heic"
    assert Note("data", note) in said and report.facts["data_notes"] == note


def test_a_file_name_in_brackets_is_shown_as_it_is():
    console = plain_console(record=True, width=80)
    with progress_bars(console) as bars:
        show_on(bars)(Note("data", "left out 1 unreadable image: [red].png"))
    assert "image: [red].png" in console.export_text()


def test_a_link_to_nowhere_is_named_and_skipped_only_when_asked_for(pictures, config):
    (pictures / "ink" / "cat" / "0.png").unlink()
    (pictures / "ink" / "cat" / "0.png").symlink_to("nowhere.png")
    fields = {"dataset": "folder", "data_dir": pictures, "held_out": ("oil",), "rounds": 0}
    with pytest.raises(InputError, match=r"ink/cat/0.png and 1 more cannot be read \(No such file or directory\)"):
        run(config(**fields))
    assert run(config(**fields, skip_unreadable=True)).facts["skipped"] == ["ink/cat/0.png", "ink/cat/3.png"]


def test_a_class_of_which_nothing_can_be_read_is_refused(pictures, config):
    for file in (pictures / "oil" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"--skip-unreadable leaves no image in: oil/dog"):
        run(config(dataset="folder", data_dir=pictures, held_out=("oil",), skip_unreadable=True))


def test_weights_that_are_none_are_refused_and_never_unpickled(tmp_path, config, pictures):
    evil = tmp_path / "evil.pt"
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return open, (str(trap), "w")

    torch.save({"state_dict": Trap()}, evil)
    fields = {"dataset": "folder", "data_dir": pictures, "skip_unreadable": True, "backbone": "ViT-B-32"}
    with pytest.raises(InputError, match=r"evil.pt holds Python objects besides tensors, which are never unpickled"):
        run(config(**fields, held_out=("oil",), pretrained=str(evil)))
    assert not trap.exists()


def test_flags_override_the_config_file_and_underscores_work_as_well(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"rounds": 7, "method": {"name": "fedclip", "lr": 0.5}, "held_out": ["ink"]}))
    config, _ = parse_run(["--config", str(file), "--method.weight_decay=0.1", "--held_out=noto,clipart"])
    assert (config.rounds, config.method.lr, config.method.weight_decay) == (7, 0.5, 0.1)
    assert config.held_out == ("noto", "clipart")
    config, _ = parse_run(["--config", str(file), "--method", "probe"])
    assert config.method == find("method", "probe")()  # another method starts from its own defaults


def test_a_config_survives_its_own_yaml():
    config, _ = parse_run(["--method", "probe", "--method.lr", "3e-4", "--partition", "shards", "--clients", "9"])
    assert Config(**yaml.safe_load(yaml.safe_dump(config.plain()))) == config


def test_without_flags_the_embedded_experiment_runs_and_with_other_data_the_papers_defaults():
    assert parse_run([])[0].method.lr == 3e-3
    assert parse_run(["--dataset", "glyphs", "--backbone", "tiny"])[0].method == parse_run([])[0].method
    assert parse_run(["--dataset.split", "concepts"])[0].method == parse_run([])[0].method
    assert parse_run(["--config", "paper"])[0].method == find("method", "fedclip")()
    assert parse_run(["--dataset", "features", "--data-dir", "x"])[0].method == find("method", "fedclip")()


def test_the_help_of_a_run_lists_every_field_on_one_screen_and_says_how_components_are_listed():
    text = run_parser().format_help()
    assert text.count("\n") <= 60 and max(map(len, text.splitlines())) <= 80
    for name in Config.model_fields:
        assert f"  --{name.replace('_', '-')} " in text
    for kind, default in DEFAULTS.items():
        entry = f"--{kind} NAME one of {len(available(kind))} (default: {default})"
        assert entry in " ".join(text.split())


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in available(kind)])
def test_help_lists_every_component_with_its_source_and_every_field(kind, name, capsys):
    assert main(["help", name]) == 0
    text = capsys.readouterr().out
    component, doc = find(kind, name), sys.modules[find(kind, name).__module__].__doc__ or ""
    assert text.startswith(f"--{kind} {name}\n") and max(map(len, text.splitlines())) <= 80
    assert "Source: " in doc, f"the docstring at the top of {kind}s/{name}.py needs a line `Source: ...`"
    words = " ".join(text.split())
    assert all(" ".join(part.split()) in words for part in (doc, component.__doc__ or ""))
    for field, about in component.__pydantic_fields__.items():
        assert f"  --{kind}.{field.replace('_', '-')} " in text.replace("\n", " \n")
        assert " ".join((about.description or "").partition(" (default")[0].split()) in words


def test_help_gives_default_limits_choices_and_search_range_of_a_field(capsys):
    assert main(["help", "fedclip"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "for adam and adamw (default: 0.98; >= 0; < 1; searched 0.9,0.98,0.99,0.999)" in text
    assert "(contrastive | cross_entropy; default: contrastive)" in text
    assert "Differs: the code trains with all of CLIP in training mode." in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_has_the_name_and_the_first_line_of_every_component(kind, capsys):
    assert main(["list", FOLDERS[kind]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == available(kind)
    for line, name in zip(lines, available(kind), strict=True):
        doc = sys.modules[find(kind, name).__module__].__doc__ or ""
        assert line.split(maxsplit=1)[1] == doc.partition("\n")[0]


def test_a_list_on_a_terminal_is_a_table_that_fits():
    with StringIO() as text:
        show_components(plain_console(file=text, force_terminal=True, width=80, color_system=None), ["methods"])
        lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "what it is" in "".join(lines) and "fedclip" in "".join(lines)


def test_two_processes_do_not_run_in_one_folder(config):
    from filelock import FileLock

    ours = config(rounds=1)
    ours.folder().mkdir()
    with FileLock(ours.folder() / ".lock"), pytest.raises(InputError, match="another process is running in"):
        run(ours)
    run(ours)

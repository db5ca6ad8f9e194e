"""Class texts: each class has one of its own, which the model reads to its end."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image

from fedsim import Config, InputError, component, run
from fedsim.clip.architectures import tokenizer_of
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.model import Clip
from fedsim.clip.texts import templates_of, texts_of
from fedsim.config import read_yaml
from fedsim.datasets.folder import Folder
from fedsim.encoding import text_file
from fedsim.files import digest
from fedsim.prepare import encode_experiment, prepare, sizing_of

LONG = "word " * 30 + "and"  # after which the model reads no more
CLASSES = "cat", "dog", "owl"
SEVERAL = "a photo of a {}.", "a drawing of the {}", "{}"


@component
class Drawings(Folder):
    """A folder of images whose classes have a text of their own."""

    text: str = "a drawing of a {}."

    def load(self, root):
        return replace(super().load(root), template=self.text)


@pytest.fixture
def pictures(tmp_path):
    """Makes a data set of 2 domains, 6 images a class."""

    def make(*classes):
        for domain in ("ink", "oil"):
            for k, name in enumerate(classes):
                folder = tmp_path / "pictures" / domain / name
                folder.mkdir(parents=True)
                for shade in range(6):
                    Image.new("RGB", (8, 8), (shade, 40 * k, 0)).save(folder / f"{shade}.png")
        return {"dataset": "folder", "data_dir": tmp_path / "pictures", "held_out": ("oil",), "rounds": 0}

    return make


@pytest.fixture(scope="module")
def clip():
    return Clip(find_weights(*EMBEDDED))


def test_classes_whose_texts_are_the_same_tokens_are_refused_before_anything_is_encoded(pictures, config, tmp_path):
    fields = pictures("dog", "&amp;", "&")  # which the tokenizer reads as it reads HTML
    with pytest.raises(InputError) as caught:
        run(config(**fields, cache_dir=tmp_path / "cache", method="zero_shot"))
    assert str(caught.value) == (
        "'a picture of a &' and 'a picture of a &amp;' have the same tokens, so the model cannot distinguish their "
        "classes; rename one"
    )
    assert not any((tmp_path / "cache").glob("*.npy"))


@pytest.mark.parametrize("method", ["zero_shot", "promptfl", "lora"])
def test_a_text_that_the_model_would_not_read_to_its_end_is_refused(method, pictures, config):
    fields = pictures(f"{LONG} cat", f"{LONG} dog")
    with pytest.raises(InputError, match=r"' has [0-9]+ tokens; the model takes 32, including start and end"):
        run(config(**fields, method=method))


def test_texts_are_checked_wherever_they_are_tokenized(clip):
    with pytest.raises(InputError, match="'a Crane' and 'a crane' have the same tokens"):
        clip.encode_texts(["a Crane", "a crane"])
    for tokenize in (clip.encode_texts, clip.text_tower(blocks=False).tokenize):
        with pytest.raises(InputError, match="has 34 tokens; the model takes 32"):
            tokenize(["cat " * 32])


def test_a_text_that_fills_the_context_is_whole(clip):
    text = "cat " * 30
    assert torch.equal(clip.text_tower(False).tokenize([text]), tokenizer_of("tiny")([text]))


def test_a_long_text_is_cut_in_the_message_and_not_in_the_model(clip):
    with pytest.raises(InputError) as caught:
        clip.encode_texts(["cat " * 10_000])
    assert len(str(caught.value)) < 250 and "has 10002 tokens" in str(caught.value)


@pytest.mark.parametrize(
    "prompt", ["a {0}", "a {name}", "a {!r}", "a {:.3}", "a {{}}", "{} and {}", "{0.__class__}", "{"]
)
def test_a_prompt_has_one_place_for_the_name_and_no_other_braces(prompt):
    with pytest.raises(InputError, match=r"prompt needs \{\} once, where the class name goes, and no other braces"):
        Config(prompt=prompt)


@pytest.mark.parametrize("prompt", ["a\n{}", "a \udcff {}", "\0 {}"])
def test_a_prompt_is_one_line_of_text(prompt):
    with pytest.raises(InputError, match="prompt needs to be one line of text"):
        Config(prompt=prompt)


def test_braces_in_the_name_of_a_class_stay_as_they_are(pictures, config):
    report = run(config(**pictures("{}", "{0}", "%s"), method="zero_shot"))
    assert list(report.classes) == ["%s", "{0}", "{}"]


# Several templates ----------------------------------------------------------------------------------------------


def embeddings(config) -> np.ndarray:
    """(C, D) what the clients of a run read."""
    return encode_experiment(prepare(config), sizing_of(config), print).encoded.source.class_embeddings.vectors


def by_open_clip(clip, templates, classes=CLASSES) -> np.ndarray:
    with torch.no_grad():
        found = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, classes, templates, None)
    return found.T.numpy()


@pytest.mark.parametrize("templates", [SEVERAL, templates_of("openai80")], ids=["three", "openai80"])
def test_an_ensemble_is_open_clips_own_in_any_order(templates, clip):
    found = clip.encode_classes(texts_of(templates, CLASSES))
    assert found.dtype == np.float32
    assert np.allclose(found, by_open_clip(clip, templates), rtol=0, atol=1e-6)
    assert np.allclose(found, clip.encode_classes(texts_of(templates[::-1], CLASSES)), rtol=0, atol=1e-7)
    assert not np.allclose(found, clip.encode_classes(texts_of(templates[:1], CLASSES)), atol=1e-4)


def test_openai80_are_the_templates_of_open_clip_with_one_place_for_the_name():
    templates = templates_of("openai80")
    assert [template.format("cat") for template in templates] == [t("cat") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(set(templates)) == 80 and Config(prompt=templates).prompt == templates


def test_a_run_reads_the_ensemble_and_its_report_says_of_which_texts(pictures, config, clip):
    given = config(**pictures(*CLASSES), page=True, prompt=SEVERAL, method={"name": "kgcoop", "length": 2})
    assert np.allclose(embeddings(given), by_open_clip(clip, SEVERAL), rtol=0, atol=1e-6)
    texts = "normalized mean of: a photo of a {}., a drawing of the {}, {}"
    assert run(given).facts["class_texts"] == texts
    assert texts in (given.folder() / "report.html").read_text()


def test_templates_may_be_a_list_in_yaml_and_one_alone_is_what_it_is_without_a_list(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"prompt": list(SEVERAL)}))
    config = Config(**read_yaml(file))
    assert config.prompt == SEVERAL and Config(**config.plain()) == config
    assert Config(prompt=["a {}"]) == Config(prompt="a {}") != Config()


@pytest.mark.parametrize("prompt", [[], 7, ["a {}", 7], {"a {}": 1}])
def test_what_is_no_template_and_no_list_of_templates_is_refused(prompt):
    with pytest.raises(InputError, match="prompt needs to be a template, a list of templates, or openai80, not "):
        Config(prompt=prompt)


def test_each_of_several_templates_is_checked(pictures, config):
    with pytest.raises(InputError, match=r"prompt needs \{\} once, .* not 'a cat'"):
        Config(prompt=["a {}", "a cat"])
    with pytest.raises(InputError, match="has 34 tokens; the model takes 32"):
        prepare(config(**pictures(*CLASSES), prompt=["a {}", f"{'word ' * 31}{{}}"]))


def test_the_key_of_one_template_is_as_ever_and_that_of_several_is_of_all_in_their_order(tmp_path):
    weights = find_weights(*EMBEDDED)
    texts = [f"a picture of a {name}" for name in CLASSES]
    key = text_file(CLASSES, weights, ("a picture of a {}",), tmp_path).name
    assert key == f"{digest(weights.key, *texts)}.text.npy"
    others = [SEVERAL, SEVERAL[::-1], SEVERAL[:2], SEVERAL[1:], SEVERAL[:1] * 2, SEVERAL[:1]]
    keys = {text_file(CLASSES, weights, templates, tmp_path).name for templates in others}
    assert len({key, *keys}) == 1 + len(others)
    one_by_one = tuple(text for each in texts_of(SEVERAL, CLASSES) for text in each)
    assert text_file(one_by_one, weights, ("{}",), tmp_path).name not in keys


@pytest.mark.parametrize("fields", [{"name": "lora"}, {"name": "finetune", "towers": "text"}])
def test_training_through_the_text_tower_needs_one_template(fields, pictures, config):
    given = pictures(*CLASSES)
    with pytest.raises(InputError) as caught:
        prepare(config(**given, method=fields, prompt="openai80"))
    assert str(caught.value) == (
        "training through the text tower needs one text of a class, and --prompt gives 80 templates; give one"
    )
    prepare(config(**given, method=fields, prompt=SEVERAL[:1]))


def test_training_through_the_image_tower_alone_reads_the_ensemble(pictures, config):
    fields = {"name": "finetune", "towers": "image", "batch_size": 4}
    report = run(config(**pictures(*CLASSES) | {"rounds": 1}, method=fields, prompt=SEVERAL))
    assert report.last_round == 1


# A data set's own template --------------------------------------------------------------------------------------


def test_a_data_set_brings_its_own_template_and_a_prompt_overrides_it(pictures, config, clip):
    given = pictures(*CLASSES)
    plain, drawn = config(**given), config(**given | {"dataset": Drawings()})
    chosen = config(**given | {"dataset": Drawings()}, prompt="{}")
    for each, template in ((plain, "a picture of a {}"), (drawn, "a drawing of a {}."), (chosen, "{}")):
        assert np.array_equal(embeddings(each), clip.encode_texts([template.format(name) for name in CLASSES]))
    assert run(drawn).facts["class_texts"] == "a drawing of a {}."


def test_the_template_of_a_data_set_is_checked_too(pictures, config):
    with pytest.raises(InputError, match=r"prompt needs \{\} once, .* not 'a drawing'"):
        prepare(config(**pictures(*CLASSES) | {"dataset": Drawings(text="a drawing")}))


def test_a_data_set_of_features_has_its_class_embeddings_and_takes_no_prompt(config):
    with pytest.raises(InputError, match=r"features, which are encoded already; remove .* and --prompt"):
        prepare(config(prompt="a {}"))
    assert "class_texts" not in run(config(rounds=0)).facts

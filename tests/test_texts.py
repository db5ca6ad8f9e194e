"""Class texts: each class has one of its own, which the model reads to its end."""

import pytest
import torch
from PIL import Image

from fedsim import Config, InputError, run
from fedsim.clip.architectures import tokenizer_of
from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.model import Clip

LONG = "word " * 30 + "and"  # after which the model reads no more


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
        "'a picture of a &' and 'a picture of a &amp;' are the same tokens to the model, so that their classes cannot "
        "be told apart; rename one"
    )
    assert not any((tmp_path / "cache").glob("*.npy"))


@pytest.mark.parametrize("method", ["zero_shot", "promptfl", "lora"])
def test_a_text_that_the_model_would_not_read_to_its_end_is_refused(method, pictures, config):
    fields = pictures(f"{LONG} cat", f"{LONG} dog")
    with pytest.raises(InputError, match=r"' has [0-9]+ tokens; the model takes 32, start and end among them"):
        run(config(**fields, method=method))


def test_texts_are_checked_wherever_they_are_tokenized(clip):
    tower = clip.text_tower(blocks=False)
    for tokenize in (clip.encode_texts, tower.tokenize):
        with pytest.raises(InputError, match="'a Crane' and 'a crane' are the same tokens to the model"):
            tokenize(["a Crane", "a crane"])
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

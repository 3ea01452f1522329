"""COCO: which words name its 80 categories, and which objects an image truly shows.

Caption to objects: lower-case, Treebank tokens, singular forms, two-word objects merged from left
to right, then the words of the vocabulary in order, repeats kept (CHAIR, Rohrbach et al. 2018,
https://arxiv.org/abs/1809.02156). What a singular form is depends on the rules: `pattern`, the
original ones, or `wordnet`, those of OPERA's fork. The truth of an image is the categories of its
instances together with the objects of its reference captions, found by the same rules.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pycocotools.coco import COCO

from eval.benchmarks import wordnet
from eval.benchmarks.english import rule_data, singulars
from eval.benchmarks.rows import read_json, read_text
from eval.errors import EvalError

SHIPPED = Path(__file__).parent / "vocabulary" / "coco.yaml"
_FOLDERS = (
    ".",
    "images",
    *(f"{split}{year}" for year in (2014, 2017) for split in ("val", "train")),
)

LONGEST_NAME = 1000
"""Of the path of an image in characters; what is longer is the image itself."""
_NAMED = re.compile(
    r"(?:COCO_(?:train|val|test)20[0-9]{2}_([0-9]{12})|([0-9]+))(?:\.[A-Za-z][A-Za-z0-9]*)?"
)

Rules: TypeAlias = Literal["pattern", "wordnet"]
# what the words of a caption are read as
RULES: Mapping[str, Callable[[str], list[str]]] = {"pattern": singulars, "wordnet": wordnet.lemmas}


@dataclass(frozen=True)
class Reading:
    """A caption as the rules see it.

    tokens: singular forms, neighbours merged
    mentions: (word, object) pairs in order
    """

    tokens: tuple[str, ...]
    mentions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Vocabulary:
    """Words for objects.

    name: file name of the list and start of its SHA-256
    words: object by word
    rules: how captions are read
    """

    name: str
    words: Mapping[str, str]
    rules: str = "pattern"

    def __post_init__(self) -> None:
        if self.rules not in RULES:
            raise EvalError(f"rules {self.rules!r}: expected {' or '.join(RULES)}.")

    @classmethod
    def load(cls, path: Path | None = None, rules: str = "pattern") -> Vocabulary:
        """The shipped list, or a file: `.yaml` like the shipped one, else a CHAIR synonym list.

        A synonym list holds one category a line, items separated by a comma and a blank, and is
        taken literally: of an item with a blank too many, or with a capital, nothing ever comes,
        and a later line wins a word that two lines claim. The published scores are made so.
        """
        path = path or SHIPPED
        text = read_text(path)
        yaml_file = path.suffix in (".yaml", ".yml")
        lines = _yaml_lines(path, text) if yaml_file else _synonym_lines(text)
        words = {word: line[0] for line in lines for word in line if word}
        checksum = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cls(f"{path.name} (sha256 {checksum})", words, rules)

    @property
    def objects(self) -> frozenset[str]:
        return frozenset(self.words.values())

    def read(self, caption: str) -> Reading:
        """Tokens after merging (what CHAIR counts as length), and mentions in order."""
        merged = _merged(RULES[self.rules](caption))
        ignored = {"seat"} if "toilet" in merged else frozenset[str]()
        mentions = [(w, self.words[w]) for w in merged if w in self.words and w not in ignored]
        return Reading(tuple(merged), tuple(mentions))

    def mentions(self, caption: str) -> list[tuple[str, str]]:
        """(word, object) pairs of a caption in order, repeats kept."""
        return list(self.read(caption).mentions)


def _synonym_lines(text: str) -> list[list[str]]:
    return [line.strip().split(", ") for line in text.strip().split("\n")]


def _yaml_lines(path: Path, text: str) -> list[list[str]]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EvalError(f"{path}: broken YAML: {error}.") from error
    if not isinstance(data, dict):
        raise EvalError(f"{path}: expected one `category: [words]` a line.")
    for category, words in data.items():
        if not isinstance(words, list) or not all(isinstance(w, str) for w in [category, *words]):
            raise EvalError(f"{path}, category {category!r}: expected a list of words.")
    return [[category, *words] for category, words in data.items()]


@cache
def _pairs() -> dict[tuple[str, ...], str]:
    """What two neighbouring words are read as."""
    table = rule_data()["two_words"]
    readings = {words: words for words in table["themselves"]} | table["others"]
    readings |= {f"{one} {x}": x for one, others in table["qualified"].items() for x in others}
    return {tuple(words.split()): reading for words, reading in readings.items()}


def _merged(words: list[str]) -> list[str]:
    pairs = _pairs()
    merged, index = [], 0
    while index < len(words):
        reading = pairs.get(tuple(words[index : index + 2]))
        merged.append(words[index] if reading is None else reading)
        index += 1 if reading is None else 2
    return merged


def image_id(value: int | str) -> int:
    """The id of an image, given as an integer or by a file name of one of two forms.

    COCO's, as COCO_val2014_000000000009.jpg: a split, a year, twelve digits. Or nothing but
    digits: 9.jpg, 000000000009.jpg, "9". A folder or URL before it and a suffix do not count.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = id_in_name(value) if isinstance(value, str) else None
    if number is None:
        raise EvalError(
            f"image id {repr(value)[:100]}: expected an integer, or a file name that is "
            "COCO's (COCO_val2014_000000000009.jpg) or holds nothing but digits (9.jpg). Which "
            "number of another name is the id cannot be known: give it in a field image_id."
        )
    return number


def id_in_name(name: str) -> int | None:
    """The id that a file name of one of the two forms states."""
    match = _NAMED.fullmatch(re.split(r"[/\\]", name)[-1])
    return int(match[1] or match[2]) if match else None


def image_id_in(where: str, value: int | str) -> int:
    """Like `image_id`; an error says where the value stands."""
    try:
        return image_id(value)
    except EvalError as error:
        raise EvalError(f"{where}: {error}") from None


def read_truth(
    path: Path, vocabulary: Vocabulary, images: Collection[int] | None = None
) -> dict[int, list[str]]:
    """Objects of every image (of `images` only, if given), each once, in first-seen order.

    `path` is an objects file `{image id: [objects]}`, or a COCO folder: all its `instances_*.json`
    and `captions_*.json`, in it or in its `annotations/`, are merged.
    """
    if path.is_dir():
        return _folder_truth(path, vocabulary, images)
    data = read_json(path)
    if not isinstance(data, dict) or "annotations" in data:
        raise EvalError(
            f"{path}: expected {{image id: [objects]}}. COCO annotations are read from the folder "
            "that holds instances_*.json and captions_*.json: pass that folder."
        )
    for key, objects in data.items():
        if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
            raise EvalError(f"{path}, image {key!r}: expected a list of object names.")
    keys = {key: image_id_in(str(path), key) for key in data}
    if doubles := [key for key, times in Counter(keys.values()).items() if times > 1]:
        names = ", ".join(repr(key) for key, number in keys.items() if number == doubles[0])
        raise EvalError(f"{path}: image {doubles[0]} stands there more than once, as {names}.")
    truth = {keys[key]: list(dict.fromkeys(objects)) for key, objects in data.items()}
    return truth if images is None else {k: v for k, v in truth.items() if k in images}


def named_truth(path: Path, vocabulary: Vocabulary) -> dict[str, list[str]]:
    """Like `read_truth`, by file name: the annotations' own, or the 2014 release's."""
    truth = read_truth(path, vocabulary)
    names: dict[int, str] = {}
    for file in _annotation_files(path, "instances") if path.is_dir() else ():
        images = _load(file, "image_id").imgs
        names |= {number: record["file_name"] for number, record in images.items()}
    return {names.get(n, f"COCO_val2014_{n:012d}.jpg"): objects for n, objects in truth.items()}


def _folder_truth(
    folder: Path, vocabulary: Vocabulary, images: Collection[int] | None
) -> dict[int, list[str]]:
    truth: dict[int, dict[str, None]] = {}
    for image, names in _named_objects(folder, vocabulary, images):
        truth.setdefault(image, {}).update(dict.fromkeys(names))
    return {image: list(names) for image, names in truth.items()}


def _named_objects(
    folder: Path, vocabulary: Vocabulary, images: Collection[int] | None
) -> Iterable[tuple[int, list[str]]]:
    """(image id, objects) of every image record, then instance, then reference caption."""
    kept = images if images is None else frozenset(images)
    for path in _annotation_files(folder, "instances"):
        coco = _load(path, "image_id", "category_id")
        yield from ((image, []) for image in coco.imgs if kept is None or image in kept)
        for note in coco.dataset["annotations"]:
            if kept is None or note["image_id"] in kept:
                if note["category_id"] not in coco.cats:
                    raise EvalError(
                        f"{path}, annotation {note.get('id')}: category_id {note['category_id']} "
                        "is not in its 'categories'."
                    )
                yield note["image_id"], [coco.cats[note["category_id"]]["name"]]
    for path in _annotation_files(folder, "captions"):
        for note in _load(path, "image_id", "caption").dataset["annotations"]:
            if kept is None or note["image_id"] in kept:
                yield note["image_id"], [name for _, name in vocabulary.mentions(note["caption"])]


def _annotation_files(folder: Path, kind: str) -> list[Path]:
    files = sorted([*folder.glob(f"{kind}_*.json"), *folder.glob(f"annotations/{kind}_*.json")])
    if not files:
        raise EvalError(
            f"{folder}: no {kind}_*.json in it or in its annotations/. The truth is the instance "
            "categories together with the objects of the reference captions: both files are needed."
        )
    return files


def _load(path: Path, *fields: str) -> COCO:
    """A COCO index of one file, after a check that the annotations carry these fields."""
    data = read_json(path)
    for section in ("images", "annotations"):
        if not isinstance(data, dict) or not isinstance(data.get(section), list):
            raise EvalError(f"{path}: expected the COCO format, with a list {section!r}.")
    for row, note in enumerate(data["annotations"], 1):
        missing = [field for field in fields if field not in note]
        if missing:
            raise EvalError(
                f"{path}, annotation {row}: no field {missing[0]!r}; found {', '.join(note)}."
            )
    for section, field in (("images", "id"), ("annotations", "image_id")):
        for row, entry in enumerate(data[section], 1):
            entry[field] = image_id_in(f"{path}, {section}, entry {row}", entry.get(field))
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def image_path(folder: Path, record: Mapping[str, Any]) -> Path:
    """File of a COCO image record (`file_name`, and `id` where it is known) under `folder`.

    Tried are the folder itself, `images/`, `val2014/` and its siblings, also below `images/`, with
    the record's file name and with the names that the 2014 and 2017 releases give the image.
    """
    given = record["file_name"]
    if not isinstance(given, str) or given.startswith("data:") or len(given) > LONGEST_NAME:
        raise EvalError(
            f"{folder}: image {repr(given)[:60]}: expected a file name. Images within the rows "
            "(bytes, base64) are not read: write each to a file."
        )
    names: list[str] = [given, *_release_names(record)]
    for subfolder in dict.fromkeys([*_FOLDERS, *(f"images/{part}" for part in _FOLDERS)]):
        for path in (folder / subfolder / name for name in names):
            if path.is_file():
                return path
    raise EvalError(
        f"{folder}: no image {' or '.join(dict.fromkeys(names))} in it or in "
        f"{', '.join(_FOLDERS[1:])} (also looked below images/). Put the images there."
    )


def _release_names(record: Mapping[str, Any]) -> list[str]:
    """What the releases call an image whose id is known; nothing for a name without one."""
    number = image_id(record["id"]) if "id" in record else id_in_name(record["file_name"])
    if number is None:
        return []
    splits = [f"COCO_{split}2014_{number:012d}.jpg" for split in ("val", "train")]
    return [f"{number:012d}.jpg", *splits]

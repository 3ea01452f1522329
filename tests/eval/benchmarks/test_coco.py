"""Vocabulary, mentions and the truth of an image."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.benchmarks.chair import files
from eval.benchmarks.coco import SHIPPED, Vocabulary, id_in_name, image_id, image_path, read_truth
from eval.errors import EvalError
from tests.support.shared_data import SHARED, shared

SYNONYMS = SHARED / "chair" / "synonyms.txt"


# caption, objects: what the original script gives (the `pattern` rules)
GOLDEN = [
    ("A bus and two buses.", "bus"),
    ("The toilet seat is up.", "toilet"),
    ("The seat of the toilet is up.", "toilet"),
    ("A man on a seat next to a toilet and a chair.", "person, toilet, chair"),
    ("Two hot dogs on plates.", "hot dog"),
    ("A dog eats a hot dog.", "dog, hot dog"),
    ("a baby elephant with its mother", "elephant, person"),
    ("A passenger train passes passengers.", "train, person"),
    ("The train tracks cross home plate.", ""),
    ("A motor bike and motor cycles.", "motorcycle"),
    ("a stove top oven", "oven, oven"),
    ("two wine glasses and a wine glass", "wine glass, wine glass"),
    ("Men and women wear ties and a bow tie.", "person, person, tie"),
    ("People are seated; a man is skiing.", "person, person"),
    ("a man's tie and the boys' kites", "person, tie, person, kite"),
    ("cell phones, mobile phone, iPhone", "cell phone, cell phone"),
    ("teddy bears and a teddy-bear", "teddy bear"),
    ("A cheesecake and cakes", "cake"),
    ("an orange car", "orange, car"),
    ("potted plants and a plant", "potted plant"),
    ("street lights, parking meters", "traffic light, parking meter"),
    ("a mother bird feeding", "person, bird"),
    ("firetrucks and fire trucks", "truck, truck"),
    ("", ""),
]


def objects_of(caption: str, vocabulary: Vocabulary) -> str:
    return ", ".join(name for _, name in vocabulary.mentions(caption))


@pytest.mark.parametrize(("caption", "expected"), GOLDEN)
def test_golden_examples_with_the_shipped_words(caption: str, expected: str) -> None:
    assert objects_of(caption, Vocabulary.load()) == expected


@pytest.mark.parametrize(("caption", "expected"), GOLDEN)
@shared
def test_golden_examples_with_the_standard_list(caption: str, expected: str) -> None:
    assert objects_of(caption, Vocabulary.load(SYNONYMS)) == expected


def test_a_reading_holds_merged_tokens_and_the_words_as_read() -> None:
    reading = Vocabulary.load().read("The toilet has a seat and two baseball bats.")
    assert reading.tokens == ("the", "toilet", "ha", "a", "seat", "and", "two", "baseball bat", ".")
    assert reading.mentions == (("toilet", "toilet"), ("baseball bat", "baseball bat"))


def test_two_word_objects_merge_from_left_to_right_without_overlap() -> None:
    vocabulary = Vocabulary.load()
    assert vocabulary.read("a stop light post").tokens == ("a", "stop light", "post")
    assert vocabulary.read("baby hot dogs").tokens == ("baby", "hot dog")
    assert vocabulary.read("an adult polar bear").tokens == ("an", "adult", "polar", "bear")
    assert vocabulary.read("an adult bear").tokens == ("an", "bear")


def test_the_shipped_words_cover_the_80_categories_in_a_singular_form() -> None:
    vocabulary = Vocabulary.load()
    assert len(vocabulary.objects) == 80
    assert {name: vocabulary.words[name] for name in vocabulary.objects} == {
        name: name for name in vocabulary.objects
    }
    assert vocabulary.name.startswith("coco.yaml (sha256 ")


def test_no_shipped_word_is_claimed_twice() -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    words = [word for category, others in data.items() for word in [category, *others]]
    assert sorted(words) == sorted(set(words))


def test_every_shipped_word_can_be_met_in_a_caption() -> None:
    vocabulary = Vocabulary.load()
    unmet = {
        word
        for word, name in vocabulary.words.items()
        if not any((word, name) in vocabulary.mentions(word + ending) for ending in ("", "s"))
    }
    # "sports" and "tennis" lose their s; a dining table is met as a table
    assert unmet == {"sports ball", "tennis racket", "dining table"}


def test_a_synonym_list_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("\nperson, man\ncake,  cheesecake, iCake\ncup, man, mug \n")
    vocabulary = Vocabulary.load(path)
    assert vocabulary.words == {
        "person": "person",
        "man": "cup",  # the later line wins
        "cake": "cake",
        " cheesecake": "cake",  # one blank too many: never matched
        "iCake": "cake",  # captions are lower-cased: never matched
        "cup": "cup",
        "mug": "cup",
    }
    assert objects_of("A man and a cheesecake, an iCake, a mug", vocabulary) == "cup, cup"
    assert vocabulary.name.startswith("synonyms.txt (sha256 ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("person: man", "expected a list of words"),
        ("- person", "one `category"),
        ("a: [", "broken"),
    ],
)
def test_a_broken_vocabulary_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(text)
    with pytest.raises(EvalError, match=message):
        Vocabulary.load(path)


@pytest.mark.parametrize(
    "value",
    [
        9,
        "9",
        "9.jpg",
        "000000000009.jpg",
        "COCO_val2014_000000000009.jpg",
        "COCO_train2017_000000000009",
        "val2014/0000009.png",
        "C:\\coco\\val2014\\COCO_val2014_000000000009.jpg",
        "http://images.cocodataset.org/val2017/000000000009.jpg",
    ],
)
def test_image_ids(value: int | str) -> None:
    assert image_id(value) == 9


@pytest.mark.parametrize(
    "value",
    [
        "photo_2024-05-01.jpg",
        "img139_resized_336.jpg",
        "000000000139_0.jpg",
        "139 (1).jpg",
        "139-2.jpg",
        "COCO_val2014_139.jpg",
        "COCO_val2014_000000581857_0.jpg",
        "AMBER_12.jpg",
        "vqa_139.jpg",
        "139.0",
        "139.jpg.1",
        "١٣٩.jpg",
        "-139",
        "cat.jpg",
        "val2014/",
        "",
        None,
        1.5,
        True,
    ],
)
def test_what_is_no_image_id(value: Any) -> None:
    """No number is picked out of a name that may hold several."""
    assert not isinstance(value, str) or id_in_name(value) is None
    with pytest.raises(EvalError, match=r"expected an integer, or a file name .* image_id"):
        image_id(value)


def test_a_name_without_an_id_is_shown_with_its_place(tmp_path: Path) -> None:
    captions, objects = tmp_path / "captions.jsonl", tmp_path / "objects.json"
    objects.write_text('{"139": ["cat"], "336": ["dog"]}')
    row = {"image": "img139_resized_336.jpg", "caption": "a cat"}
    captions.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        EvalError, match=r"captions.jsonl, line 1: image id 'img139_resized_336.jpg'"
    ):
        files.score_files(captions, objects)
    captions.write_text(json.dumps({"image_id": 139, **row}) + "\n")
    assert files.score_files(captions, objects)["chair_s"] == 0
    objects.write_text('{"img139_resized_336.jpg": ["cat"]}')
    with pytest.raises(EvalError, match=r"objects.json: image id 'img139_resized_336.jpg'"):
        read_truth(objects, Vocabulary.load())
    objects.write_text('{"139": ["cat"], "COCO_val2014_000000000139.jpg": ["dog"]}')
    with pytest.raises(EvalError, match=r"139 stands there more than once, as '139', 'COCO_val"):
        read_truth(objects, Vocabulary.load())


def test_ids_of_annotations_may_be_names_of_the_two_forms(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    truth = read_truth(folder, Vocabulary.load())
    for path in (folder / "annotations").iterdir():
        data = json.loads(path.read_text())
        for image in data["images"]:
            image["id"] = f"{image['id']:012d}"
        for note in data["annotations"]:
            note["image_id"] = f"{note['image_id']:012d}"
        path.write_text(json.dumps(data))
    assert read_truth(folder, Vocabulary.load()) == truth
    data["images"][1]["id"] = "photo_2024-05-01"
    path.write_text(json.dumps(data))
    with pytest.raises(
        EvalError, match=rf"{path.name}, images, entry 2: image id 'photo_2024-05-01'"
    ):
        read_truth(folder, Vocabulary.load())


def coco_folder(folder: Path) -> Path:
    notes = folder / "annotations"
    notes.mkdir(parents=True)
    images = [{"id": 2, "file_name": "two.png"}, {"id": 1, "file_name": "000000000001.png"}]
    instances = {
        "images": images,
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 18, "iscrowd": 1},
            {"id": 2, "image_id": 1, "category_id": 3, "iscrowd": 0},
            {"id": 3, "image_id": 1, "category_id": 18, "iscrowd": 0},
        ],
    }
    captions = {
        "images": images,
        "annotations": [{"id": 1, "image_id": 1, "caption": "Two men, a car and a cat."}],
    }
    (notes / "instances_test.json").write_text(json.dumps(instances))
    (notes / "captions_test.json").write_text(json.dumps(captions))
    return folder


def test_truth_is_instances_and_captions_in_first_seen_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, vocabulary = coco_folder(tmp_path), Vocabulary.load()
    truth = {1: ["dog", "car", "person", "cat"], 2: []}
    assert read_truth(folder, vocabulary) == truth
    assert read_truth(folder, vocabulary, images=[1]) == {1: truth[1]}
    assert capsys.readouterr().out == ""  # `--json` prints one object and nothing else


def test_several_annotation_files_are_merged(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    more = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{"id": 9, "image_id": 7, "category_id": 1}],
    }
    (folder / "instances_more.json").write_text(json.dumps(more))
    truth = read_truth(folder, Vocabulary.load())
    assert truth == {7: ["person"], 2: [], 1: ["dog", "car", "person", "cat"]}


def test_truth_from_an_objects_file(tmp_path: Path) -> None:
    path = tmp_path / "objects.json"
    path.write_text('{"COCO_val2014_000000000007.jpg": ["cup", "person", "cup"], "8": []}')
    assert read_truth(path, Vocabulary.load()) == {7: ["cup", "person"], 8: []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r"objects.json: expected \{image id: \[objects\]\}"),
        ('{"annotations": []}', "pass that folder"),
        ('{"7": "cup"}', "objects.json, image '7': expected a list of object names"),
        ('{"7":\n oops}', "objects.json, line 2: broken JSON"),
        ("", "objects.json: the file is empty"),
    ],
)
def test_a_broken_objects_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "objects.json"
    path.write_text(content)
    with pytest.raises(EvalError, match=message):
        read_truth(path, Vocabulary.load())


def test_a_missing_truth_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"nowhere.json: no such file"):
        read_truth(tmp_path / "nowhere.json", Vocabulary.load())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions", None, r"no captions_\*.json in it or in its annotations"),
        ("instances", None, r"no instances_\*.json in it or in its annotations"),
        ("captions", '{"images": []}', "captions_test.json: expected the COCO format"),
        (
            "captions",
            '{"images": [], "annotations": [{"image_id": 1, "text": "a"}]}',
            "captions_test.json, annotation 1: no field 'caption'; found image_id, text",
        ),
        (
            "instances",
            '{"images": [], "annotations": [{"id": 5, "image_id": 1, "category_id": 4}]}',
            "annotation 5: category_id 4 is not in its 'categories'",
        ),
    ],
)
def test_a_broken_coco_folder_is_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = coco_folder(tmp_path) / "annotations" / f"{name}_test.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(EvalError, match=message):
        read_truth(tmp_path, Vocabulary.load())


@pytest.mark.parametrize(
    "place",
    [
        "two.png",
        "images/two.png",
        "val2014/two.png",
        "images/val2017/000000000002.jpg",
        "COCO_val2014_000000000002.jpg",
    ],
)
def test_images_are_found_where_coco_puts_them(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).touch()
    assert image_path(tmp_path, {"id": 2, "file_name": "two.png"}) == tmp_path / place


def test_a_question_finds_its_image_by_file_name_alone(tmp_path: Path) -> None:
    (tmp_path / "000000000009.jpg").touch()
    found = image_path(tmp_path, {"file_name": "COCO_val2014_000000000009.jpg"})
    assert found == tmp_path / "000000000009.jpg"


def test_a_name_without_an_id_is_looked_for_as_it_is(tmp_path: Path) -> None:
    """139 (1).jpg is no reason to show image 1."""
    (tmp_path / "000000000001.jpg").touch()
    with pytest.raises(EvalError, match=r"no image 139 \(1\)\.jpg in it"):
        image_path(tmp_path, {"file_name": "139 (1).jpg"})
    (tmp_path / "139 (1).jpg").touch()
    assert image_path(tmp_path, {"file_name": "139 (1).jpg"}) == tmp_path / "139 (1).jpg"


@pytest.mark.parametrize("value", ["data:image/png;base64,iVBORw0KGgo=", "iVBORw" * 900, {"a": 1}])
def test_an_image_in_the_row_itself_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"expected a file name. Images .* are not read"):
        image_path(tmp_path, {"file_name": value})


def test_a_missing_image_names_the_places(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no image two.png or 000000000002.jpg.*images, val2014"):
        image_path(tmp_path, {"id": 2, "file_name": "two.png"})


@pytest.fixture(scope="module")
def standard() -> Vocabulary:
    return Vocabulary.load(SYNONYMS)


@pytest.fixture(scope="module")
def published(standard: Vocabulary) -> dict[int, list[str]]:
    return read_truth(SHARED / "chair" / "objects_pattern.json", standard)


@shared
def test_the_truth_of_the_50_images_of_the_coco_files(
    standard: Vocabulary, published: dict[int, list[str]]
) -> None:
    truth = read_truth(SHARED / "coco", standard)
    assert len(truth) == 50
    for image, names in truth.items():
        assert sorted(names) == published[image]


@shared
def test_the_truth_of_the_80_images_with_named_boxes(
    standard: Vocabulary, published: dict[int, list[str]]
) -> None:
    lines = (SHARED / "coco" / "caps_boxes_coco2014_val_80.jsonl").read_text().splitlines()
    assert len(lines) == 80
    for record in map(json.loads, lines):
        named = {box["category"] for box in record["instances"]}
        for caption in record["captions"]:
            named |= {name for _, name in standard.mentions(caption)}
        assert sorted(named) == published[image_id(record["id"])]


@shared
def test_the_six_photos_are_found_by_their_name_in_pope() -> None:
    photos = list((SHARED / "coco" / "images").glob("*.jpg"))
    assert len(photos) == 6
    for path in photos:
        record = {"file_name": f"COCO_val2014_{path.name}"}
        assert image_path(SHARED / "coco", record) == path

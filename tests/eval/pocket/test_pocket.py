"""The pocket world: reproducible scenes, true annotations, captions that CHAIR can read."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from eval.benchmarks.coco import Vocabulary, read_truth
from eval.pocket import SPLITS, WORLD, language, pope_question, world
from eval.pocket.build import make_tokenizer
from eval.pocket.scenes import NAMES, THEMES, Scene, render, scene, stream

ROOT = Path(__file__).parents[3]

PIXELS = """
import hashlib
from eval.pocket import SPLITS
from eval.pocket.scenes import render, scene
drawn = [render(scene(split, index)).tobytes() for split in SPLITS for index in range(5)]
print(hashlib.sha256(b"".join(drawn)).hexdigest())
"""


def coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_scenes_are_the_same_in_every_process() -> None:
    def fresh() -> str:
        command = [sys.executable, "-c", PIXELS]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert fresh() == fresh()


def test_the_first_test_scene_is_pinned() -> None:
    view = scene("test", 0)
    found = [(thing.name, thing.color, thing.size) for thing in view.things]
    assert view.theme == "kitchen"
    assert found == [
        ("cup", "purple", 19),
        ("bottle", "white", 23),
        ("umbrella", "purple", 18),
        ("bicycle", "red", 27),
    ]


def test_no_split_shares_a_scene_with_another() -> None:
    def looks(split: str) -> set[object]:
        return {(view.theme, view.things) for view in (scene(split, i) for i in range(300))}

    for at, split in enumerate(SPLITS):
        for other in SPLITS[at + 1 :]:
            assert not looks(split) & looks(other)
            assert world.image_id(scene(split, 299)) < world.image_id(scene(other, 0))


def test_a_break_scene_lacks_a_usual_companion() -> None:
    for index in range(300):
        view = scene("break", index)
        assert view.missing in list(view.companions)[:2]
        assert view.missing not in view.names
        assert view.names
    assert all(scene("test", index).missing is None for index in range(300))


def test_companions_are_as_usual_as_the_table_says() -> None:
    views = [scene("test", index) for index in range(2000)]
    kitchens = [view for view in views if view.theme == "kitchen"]
    assert len(kitchens) / len(views) == pytest.approx(THEMES["kitchen"]["share"], abs=0.04)
    for name, presence in THEMES["kitchen"]["companions"].items():
        share = np.mean([name in view.names for view in kitchens])
        assert share == pytest.approx(presence, abs=0.06)


def test_things_stand_in_the_picture_where_their_boxes_say() -> None:
    for index in range(40):
        view = scene("test", index)
        bare = render(Scene("test", index, view.theme, ()))
        changed = np.asarray(render(view)) != np.asarray(bare)
        inside = np.zeros(changed.shape[:2], bool)
        for thing in view.things:
            x, y, width, height = thing.box
            inside[y : y + height, x : x + width] = True
            assert changed[y : y + height, x : x + width].any()
        assert not changed[~inside].any()


def test_unknown_splits_and_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'val'.*train, calibration, test, break"):
        scene("val", 0)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        scene("test", -1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        world.write("test", 0, tmp_path)


@pytest.mark.parametrize("split", ["test", "break"])
def test_pycocotools_reads_what_the_scenes_are(split: str, tmp_path: Path) -> None:
    world.write(split, 20, tmp_path)
    found = coco(tmp_path / "annotations" / f"instances_{split}.json")
    told = coco(tmp_path / "annotations" / f"captions_{split}.json")
    assert {c["name"]: c["id"] for c in found.cats.values()} == {
        name: about["id"] for name, about in WORLD["objects"].items()
    }
    for index in range(20):
        view = scene(split, index)
        rows = found.imgToAnns[world.image_id(view)]
        boxes = [(found.cats[row["category_id"]]["name"], tuple(row["bbox"])) for row in rows]
        assert boxes == [(thing.name, thing.box) for thing in view.things]
        assert [found.annToMask(row).sum() for row in rows] == [row["area"] for row in rows]
        assert len(told.imgToAnns[world.image_id(view)]) == 5
        record = found.imgs[world.image_id(view)]
        with Image.open(tmp_path / "images" / record["file_name"]) as picture:
            assert picture.size == (record["width"], record["height"])
            assert picture.tobytes() == render(view).tobytes()


def test_chair_finds_the_objects_of_a_scene_and_no_other(tmp_path: Path) -> None:
    """Instances and captions agree under the `pattern` rules; no colour or place is an object."""
    world.write("test", 60, tmp_path)
    truth = read_truth(tmp_path, Vocabulary.load())
    vocabulary = Vocabulary.load()
    for index in range(60):
        view = scene("test", index)
        assert set(truth[world.image_id(view)]) == set(view.names)
        text = language.caption(view, stream("test", index, 2))
        assert sorted(name for _, name in vocabulary.mentions(text)) == sorted(view.names)


def test_no_sentence_form_holds_an_object_word() -> None:
    vocabulary = Vocabulary.load()
    assert set(NAMES) <= vocabulary.objects
    for line in [*language.CAPTION_PROMPTS, *language.vocabulary_text()]:
        assert {name for _, name in vocabulary.mentions(line)} <= set(NAMES)


def test_a_whole_folder_is_left_alone_and_a_broken_one_made_anew(tmp_path: Path) -> None:
    world.write("test", 3, tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    world.write("test", 3, tmp_path)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before

    (tmp_path / "annotations" / "captions_test.json").write_text('{"images": [')
    files[-1].unlink()
    world.write("test", 3, tmp_path)
    assert {path: path.read_bytes() for path in files} == {p: b for p, (_, b) in before.items()}
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files


def test_another_count_gives_another_list(tmp_path: Path) -> None:
    world.write("test", 3, tmp_path)
    world.write("test", 2, tmp_path)
    listed = json.loads((tmp_path / "annotations" / "instances_test.json").read_text())
    assert len(listed["images"]) == 2


def test_rumours_name_absent_companions_only() -> None:
    vocabulary = Vocabulary.load()
    for index in range(100):
        view = scene("train", index)
        names = {
            n
            for _, n in vocabulary.mentions(language.caption(view, stream("train", index, 3), 1.0))
        }
        assert set(view.names) <= names <= {*view.names, *view.companions}


def test_questions_are_those_of_pope() -> None:
    assert pope_question("cup") == "Is there a cup in the image?"
    assert pope_question("oven") == "Is there an oven in the image?"
    rng = np.random.default_rng(0)
    view = scene("train", 1)
    for _ in range(50):
        text, answer = language.presence_question(view, rng, 0.5)
        asked = [name for name in NAMES if f" {name} " in text or f" {name}?" in text]
        assert len(asked) == 1
        assert answer == ("Yes" if asked[0] in view.names else "No")


@pytest.mark.parametrize(
    "text",
    [
        " There is an oven at the top left, and a traffic light.",
        "USER: \nIs there a cup in the image? ASSISTANT: Yes",
        "Zwölf Boxkämpfer jagen 日本 \t &  zz\n",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_each_word_of_the_world_is_one_token() -> None:
    tokenizer = make_tokenizer()
    text = " There is an oven on the left side and a purple surfboard in the center."
    assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(text.split()) + 1

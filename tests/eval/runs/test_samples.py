"""Which images are asked about, which questions, and the facts kept for scoring."""

import json
from pathlib import Path

import pytest

from eval.benchmarks.coco import Vocabulary, read_truth
from eval.errors import EvalError
from eval.runs import samples
from eval.runs.config import from_settings
from eval.runs.samples import Sample
from tests.eval.conftest import Settings
from tests.support.shared_data import SHARED, shared


def test_captions_carry_their_truth(settings: Settings, coco: Path, tmp_path: Path) -> None:
    found = samples.samples(settings(tasks=["chair"]), tmp_path)
    truth = read_truth(coco, Vocabulary.load())
    assert len(found) == len({sample.id for sample in found}) == 5
    for sample in found:
        number = sample.facts["image_id"]
        assert sample.key == ("chair", "test", str(number))
        assert sample.image == coco / "images" / f"{number:012d}.png"
        assert sample.prompt == "Please describe this image in detail."
        assert sample.facts["truth"] == truth[number] != []


def test_images_are_drawn_by_the_seed_and_a_limit_keeps_the_first(
    settings: Settings, tmp_path: Path
) -> None:
    def ids(**changes: object) -> list[str]:
        return [s.id for s in samples.samples(settings(tasks=["chair"], **changes), tmp_path)]

    every = ids(chair={"images": None})
    assert len(every) == 12
    assert every != sorted(every)
    assert ids(chair={"images": 12}) == every
    assert ids() == every[:5]
    assert ids(limit=2) == every[:2]
    other = ids(chair={"images": None}, seed=1)
    assert sorted(other) == sorted(every)
    assert other != every


def test_images_can_be_listed_in_a_file(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("30000003\nCOCO_val2014_000030000001.jpg\n")
    listed = settings(tasks=["chair"], chair={"images": str(tmp_path / "ids.txt")})
    assert [s.id for s in samples.samples(listed, tmp_path)] == ["30000003", "30000001"]
    (tmp_path / "ids.txt").write_text("30000003 7\n")
    with pytest.raises(EvalError, match=r"ids\.txt lists image 7, which .* lacks"):
        samples.samples(listed, tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("30000003\n000030000003.jpg\n", "lists image 30000003 twice"),
        ("img_30000003_336.jpg\n", r"ids\.txt: image id 'img_30000003_336\.jpg'"),
    ],
)
def test_a_list_of_images_names_each_once_and_plainly(
    lines: str, message: str, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "ids.txt").write_text(lines)
    listed = settings(tasks=["chair"], chair={"images": str(tmp_path / "ids.txt")})
    with pytest.raises(EvalError, match=message):
        samples.samples(listed, tmp_path)


OWN = ("photo_2024-05-01.jpg", "img139_resized_336.jpg", "139 (1).jpg")


def own_names(folder: Path, names: tuple[str, ...]) -> None:
    """A COCO folder of images 1, 2 and so on, each with a dog, a cup and a thing of its own."""
    things = ["dog", "cup", "car", "tie", "bed"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, 1)]
    categories = [{"id": number, "name": thing} for number, thing in enumerate(things, 1)]
    notes = [
        {"image_id": image["id"], "category_id": category}
        for image in images
        for category in (1, 2, 2 + int(str(image["id"])))
    ]
    notes = [{"id": number, **note} for number, note in enumerate(notes, 1)]
    about = {"images": images, "categories": categories, "annotations": notes}
    (folder / "instances_own.json").write_text(json.dumps(about))
    (folder / "captions_own.json").write_text(json.dumps(about | {"annotations": []}))


def test_questions_go_to_the_image_of_their_name_not_of_a_number_in_it(
    settings: Settings, tmp_path: Path
) -> None:
    """photo_2024-05-01.jpg is image 1 by its record; 139 (1).jpg ends in 1 and is image 3."""
    own_names(tmp_path, OWN)
    found = samples.samples(settings(data=str(tmp_path), tasks=["pope"]), tmp_path)
    truth = read_truth(tmp_path, Vocabulary.load())
    assert {sample.image.name for sample in found} == {*OWN}
    for sample in found:
        thing = sample.prompt.removesuffix(" in the image?").split(" ", 3)[3]
        objects = truth[OWN.index(sample.image.name) + 1]
        assert sample.facts["label"] == ("yes" if thing in objects else "no")


def test_two_images_of_one_name_are_told_apart_or_refused(
    settings: Settings, tmp_path: Path
) -> None:
    own_names(tmp_path, ("a/1.jpg", "b/1.jpg", "b/2.jpg"))
    captioned = settings(data=str(tmp_path), tasks=["chair"], chair={"images": None})
    assert {s.image.parent.name for s in samples.samples(captioned, tmp_path)} == {"a", "b"}
    with pytest.raises(EvalError, match=r"a/1\.jpg and .*b/1\.jpg have one file name"):
        samples.samples(settings(data=str(tmp_path), tasks=["pope"]), tmp_path)


def test_a_record_without_id_or_file_name_is_named(settings: Settings, tmp_path: Path) -> None:
    for record, field in (({"file_name": "1.jpg"}, "id"), ({"id": 1}, "file_name")):
        (tmp_path / "instances_x.json").write_text(json.dumps({"images": [record]}))
        with pytest.raises(
            EvalError, match=rf"instances_x\.json, images, entry 1: no field '{field}'"
        ):
            samples.samples(settings(data=str(tmp_path)), tmp_path)


def test_questions_are_balanced_and_true(settings: Settings, coco: Path, tmp_path: Path) -> None:
    found = samples.samples(settings(tasks=["pope"], seed=3), tmp_path)
    truth = read_truth(coco, Vocabulary.load())
    assert len(found) == 3 * 3 * 2
    for sample in found:
        thing = sample.prompt.removesuffix(" in the image?").split(" ", 3)[3]
        objects = truth[int(sample.image.stem)]
        assert sample.facts["label"] == ("yes" if thing in objects else "no")
        assert sample.id == f"{sample.facts['strategy']}-{sample.facts['question_id']}"
    assert [s.facts["label"] for s in found] == ["yes", "no"] * 9
    assert [s.facts["strategy"] for s in found[::6]] == ["random", "popular", "adversarial"]


def test_a_limit_keeps_the_questions_of_the_first_images(
    settings: Settings, tmp_path: Path
) -> None:
    every = samples.samples(settings(tasks=["pope"]), tmp_path)
    few = samples.samples(settings(tasks=["pope"], limit=2), tmp_path)
    assert [s.id for s in few] == [s.id for s in every if s.facts["question_id"] <= 4]
    assert {s.key: s for s in few}.items() <= {s.key: s for s in every}.items()


def test_question_files_are_used_as_they_are(settings: Settings, tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "image": "000030000001.png", "text": "Is there a cup?", "label": "yes"},
        {"question_id": 2, "image": "000030000002.png", "text": "Is there a tv?", "label": "no"},
    ]
    for strategy in ("random", "popular"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"coco_pope_{strategy}.json").write_text(lines)
    files = str(tmp_path / "coco_pope_{strategy}.json")
    task = {"questions": files, "strategies": ["random", "popular"], "prompt": "{question} Answer:"}
    found = samples.samples(settings(tasks=["pope"], pope=task), tmp_path)
    assert [s.id for s in found] == ["random-1", "random-2", "popular-1", "popular-2"]
    assert found[1].prompt == "Is there a tv? Answer:"
    assert found[1].image.name == "000030000002.png"
    rows[1]["image"] = "COCO_val2014_000000000042.jpg"
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(EvalError, match=r"no image .*COCO_val2014_000000000042\.jpg"):
        samples.samples(settings(tasks=["pope"], pope=task), tmp_path)


def test_pocket_scenes_are_drawn_for_each_split(tmp_path: Path) -> None:
    small = {"chair": {"images": 3}, "pope": {"images": 2, "per_image": 1}}
    found = samples.samples(from_settings(small), tmp_path)
    assert [s.split for s in found if s.task == "chair"] == ["test"] * 3 + ["break"] * 3
    assert all(s.image.parent == tmp_path / s.split / "images" for s in found)
    assert all(s.image.is_file() for s in found)
    with pytest.raises(EvalError, match=r"chair\.images: the pocket world is drawn"):
        samples.samples(from_settings({"chair": {"images": "ids.txt"}}), tmp_path)


def test_a_folder_with_several_splits_wants_one_named(
    settings: Settings, coco: Path, tmp_path: Path
) -> None:
    for kind in ("instances", "captions"):
        text = (coco / "annotations" / f"{kind}_test.json").read_text()
        for split in ("val2014", "train2014"):
            (tmp_path / f"{kind}_{split}.json").write_text(text)
    with pytest.raises(EvalError, match=r"several splits \(train2014, val2014\): name those"):
        samples.samples(settings(data=str(tmp_path)), tmp_path)
    with pytest.raises(EvalError, match="no split test; it has train2014, val2014"):
        samples.samples(settings(data=str(tmp_path), splits=["test"]), tmp_path)
    with pytest.raises(
        EvalError, match=r"no image of val2014 found, for example 000030000001\.png"
    ):
        samples.samples(settings(data=str(tmp_path), splits=["val2014"]), tmp_path)


def test_missing_data_is_explained(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"data: .* holds no instances_\*\.json.*--set data=DIR"):
        samples.samples(settings(data=str(tmp_path)), tmp_path)
    with pytest.raises(EvalError, match="splits: pocket has no split val; it has train"):
        samples.samples(from_settings({"splits": ["val"]}), tmp_path)
    with pytest.raises(EvalError, match=r"asks for 13 images of test, but .* has 12"):
        samples.samples(settings(chair={"images": 13}), tmp_path)
    (tmp_path / "instances_x.json").write_text('{"images": []}')
    with pytest.raises(EvalError, match=r"instances_x\.json: expected the COCO format"):
        samples.samples(settings(data=str(tmp_path)), tmp_path)


def test_checksums_change_with_the_images_and_with_what_is_asked() -> None:
    one = Sample("chair", "test", "1", Path("a/1.png"), "Hello", {"truth": ["cup"]})
    base = samples.describe([one])
    assert (base["samples"], base["images"]["test"]["count"]) == (1, 1)
    moved = Sample("chair", "test", "1", Path("b/1.png"), "Hello", {"truth": ["cup"]})
    assert samples.describe([moved]) == base
    truth = samples.describe([Sample("chair", "test", "1", one.image, "Hello", {"truth": []})])
    assert truth["samples_sha256"] != base["samples_sha256"]
    assert truth["images"] == base["images"]
    image = samples.describe([Sample("chair", "test", "1", Path("2.png"), "Hello", one.facts)])
    assert image["images"] != base["images"]


@shared
def test_real_photos_with_real_annotations(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six of the 50 annotated COCO images have a file; their truth is the published one."""
    data = {"data": str(SHARED / "coco"), "chair": {"images": None}}
    found = samples.samples(settings(tasks=["chair"], **data), tmp_path)
    assert "6 of the 50 images" in capsys.readouterr().err
    published = json.loads((SHARED / "chair" / "objects_pattern.json").read_text())
    assert len(found) == 6
    for sample in found:
        assert sample.split == "mini"
        assert sorted(sample.facts["truth"]) == published[sample.id]

"""The command line."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from eval.__main__ import main
from eval.pocket import world
from tests.support.shared_data import SHARED, shared


@pytest.fixture
def config(checkpoint: Path, coco: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    small = {
        "model": str(checkpoint),
        "data": str(coco),
        "dtype": "float32",
        "chair": {"max_new_tokens": 3},
        "pope": {"max_new_tokens": 2, "images": 4, "per_image": 1},
    }
    path.write_text(yaml.safe_dump(small))
    return path


def test_run_score_and_table(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert main(["run", str(config), "--out", one, "--limit", "3"]) == 0
    shown, bar = capsys.readouterr()
    assert re.search(r"one: 100%.* 21/21 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ answers/s\]", bar)
    assert "| split | measure" in shown
    assert "- test: 3 captions, 6 questions a POPE strategy" in shown
    gift = ["--set", "methods=[gift]", "--set", "gift.alpha=2", "--set", "tasks=[chair]"]
    assert main(["run", str(config), "--out", two, "--limit", "3", *gift]) == 0
    record = yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())
    assert record["settings"]["gift"] == {"alpha": 2.0}
    assert record["settings"]["limit"] == 3
    before = (tmp_path / "one" / "metrics.json").read_bytes()
    capsys.readouterr()
    assert main(["score", one]) == 0
    assert capsys.readouterr().out == shown
    assert (tmp_path / "one" / "metrics.json").read_bytes() == before
    assert main(["table", one, two]) == 0
    assert "| one " in (table := capsys.readouterr().out)
    assert "| two " in table


def test_a_full_disk_is_said_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever file it was that found no room: here the scenes of the pocket world."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(world, "write", full)
    path = tmp_path / "pocket.yaml"
    path.write_text("model: pocket\n")
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "No space left on device: what was written is kept; make room and give the same" in said


def test_captions_made_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions, truth = tmp_path / "captions.jsonl", tmp_path / "objects.json"
    captions.write_text('{"image_id": 1, "caption": "A dog and a cup."}\n')
    truth.write_text('{"1": ["cup", "bowl"]}')
    files = ["--captions", str(captions), "--truth", str(truth)]
    assert main(["score", "chair", *files, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["chair_s"], result["chair_i"], result["recall"]) == (1.0, 0.5, 0.5)
    assert main(["score", "chair", *files, "--rules", "lemma"]) == 1
    assert "error: " in capsys.readouterr().err


def test_answers_made_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers, questions = tmp_path / "answers.jsonl", tmp_path / "questions.jsonl"
    asked = {"question_id": 1, "image": "1.jpg", "text": "Is there a cup in the image?"}
    questions.write_text(json.dumps(asked | {"label": "yes"}) + "\n")
    answers.write_text(json.dumps({"question": asked["text"], "answer": "No."}) + "\n")
    files = ["--answers", str(answers), "--questions", str(questions)]
    assert main(["score", "pope", *files, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["fn"], result["accuracy"], result["yes_ratio"]) == (1, 0.0, 0.0)


def test_errors_are_one_line_and_a_status(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["run", str(config), *out, "--set", "methods=[gfit]"]) == 1
    shown = capsys.readouterr()
    assert (
        shown.err
        == "error: unknown name in methods: gfit; did you mean gift? Known: deco, dola, gift, icd, "
        "m3id, paint, var, vcd, vhr\n"
    )
    assert shown.out == ""
    assert main(["run", str(tmp_path / "none.yaml"), *out]) == 1
    assert main(["score", str(tmp_path)]) == 1
    assert main(["table", str(tmp_path)]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["run"], ["score"], ["score", "chair"], ["walk"]])
def test_a_wrong_command_line_shows_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m eval" in capsys.readouterr().err


def test_the_user_can_stop_a_run(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.runs.runner.generate.ask", stop)
    assert main(["run", str(config), "--out", str(tmp_path / "out")]) == 130
    assert "the same command resumes where this one ended" in capsys.readouterr().err


@shared
def test_real_photos_go_through_the_config_of_a_real_model(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaVA-1.5-7B's VHR config on six COCO photos, with a tiny checkpoint in the model's place."""
    config = Path(__file__).parents[3] / "configs" / "llava-1.5-7b" / "vhr.yaml"
    changes = [
        f"model={checkpoint}",
        f"data={SHARED / 'coco'}",
        "splits=[mini]",
        "dtype=float32",
        "vhr.layers=[1, 2, 3]",
        "chair.images=6",
        "chair.max_new_tokens=4",
        "pope={images: 4, per_image: 2, max_new_tokens: 2}",
    ]
    sets = [word for change in changes for word in ("--set", change)]
    out = tmp_path / "run"
    assert main(["run", str(config), "--out", str(out), *sets]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    truth = json.loads((SHARED / "chair" / "objects_pattern.json").read_text())
    photos = [str(int(path.stem)) for path in (SHARED / "coco" / "images").iterdir()]
    counts = metrics["chair"]["mini"]["counts"]
    assert counts["gt_objects"] == sum(len(truth[photo]) for photo in photos)
    assert metrics["pope"]["mini"]["popular"]["questions"] == 4 * 2 * 2
    assert "| mini  | CHAIR_S %" in capsys.readouterr().out


def test_pope_questions_of_a_coco_folder(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "questions"
    command = ["questions", "--truth", str(coco), "--to", str(to), "--images", "4"]
    assert main([*command, "--per-image", "1", "--seed", "3"]) == 0
    assert "coco_pope_adversarial.json: 8 questions on 4 images" in capsys.readouterr().out
    rows = [json.loads(line) for line in (to / "coco_pope_popular.json").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["yes", "no"] * 4
    known = json.loads((coco / "annotations" / "instances_test.json").read_text())["images"]
    assert {row["image"] for row in rows} <= {record["file_name"] for record in known}
    before = (to / "coco_pope_random.json").read_bytes()
    assert main([*command, "--per-image", "1", "--seed", "3"]) == 0
    assert (to / "coco_pope_random.json").read_bytes() == before


@pytest.mark.parametrize(
    "name",
    ["chair", "pope", "amber", "mme", "hallusionbench", "mmvp", "object-halbench", "mmhal"],
)
def test_every_scorer_names_a_missing_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = str(tmp_path / "gone")
    flags = {
        "chair": ["--captions", "--truth"],
        "amber": ["--responses", "--data"],
        "mme": ["--answers"],
        "object-halbench": ["--responses", "--truth"],
    }
    given = [
        word for flag in flags.get(name, ["--answers", "--questions"]) for word in (flag, gone)
    ]
    assert main(["score", name, *given, "--json"]) == 1
    assert gone in (said := capsys.readouterr().err)
    assert said.startswith("error: ")

"""Object HalBench by rules: response level and mention level."""

import json
from pathlib import Path

import pytest

from eval.benchmarks.chair.files import score_files as score_chair
from eval.benchmarks.coco import Vocabulary
from eval.benchmarks.judge import TemplateOptions
from eval.benchmarks.object_halbench import phrases, score, score_files
from eval.errors import EvalError
from tests.support.local_server import Chat
from tests.support.shared_data import SHARED, shared

TRUTH = {1: ["dog"], 2: ["cup", "person"], 3: ["car"], 4: ["car"]}


def test_formulas() -> None:
    responses = [
        (1, "A dog, another dog and a cat, a cat."),
        (2, "There is a man with a cup."),
        (3, "Nothing can be said here."),
        (4, "A red bench."),  # three words name nothing
    ]
    result = score(responses, TRUTH, Vocabulary.load())
    assert result["counts"] == {
        "responses": 4,
        "responses_with_objects": 2,
        "responses_hallucinated": 1,
        "objects": 4,
        "objects_hallucinated": 1,
        "gt_objects": 5,
        "gt_objects_recalled": 3,
        "words": 9 + 7 + 5 + 3,
    }
    assert (result["response_level"], result["mention_level"]) == (0.5, 0.25)
    assert (result["recall"], result["no_object_share"]) == (0.6, 0.5)
    assert result["flags"] == []
    silent = score([(1, "No.")], TRUTH, Vocabulary.load())
    assert (silent["response_level"], silent["mention_level"]) == (0.0, 0.0)
    assert [flag.split(":")[0] for flag in silent["flags"]] == ["response_level", "mention_level"]
    with pytest.raises(EvalError, match="no responses"):
        score([], TRUTH, Vocabulary.load())


def test_files(tmp_path: Path) -> None:
    responses, truth = tmp_path / "responses.jsonl", tmp_path / "objects.json"
    responses.write_text('{"image_id": 1, "answer": "This is a dog and a cat."}\n')
    truth.write_text(json.dumps({"1": ["dog"]}))
    result = score_files(responses, truth)
    assert (result["response_level"], result["mention_level"]) == (1.0, 0.5)
    responses.write_text('{"image_id": 7, "answer": "This is a dog."}\n')
    with pytest.raises(EvalError, match=r"responses\.jsonl, line 1: image 7 is not in the truth"):
        score_files(responses, truth)


def test_a_judge_lists_the_objects(chat: Chat, tmp_path: Path) -> None:
    """The cat is denied and not listed; one reply is no list, and three words ask nobody."""
    responses, truth = tmp_path / "responses.jsonl", tmp_path / "objects.json"
    rows = [(1, "A dog sits here. There is no cat."), (2, "Two men share a wine glass.")]
    rows += [(3, "It is hard to say."), (4, "A red bench.")]
    lines = [json.dumps({"image_id": image, "answer": text}) + "\n" for image, text in rows]
    responses.write_text("".join(lines))
    truth.write_text(json.dumps(TRUTH))
    says = {"A dog": 'The list: ["dog"]', "Two men": '["man", "wine glass"]', "It is": "None."}
    chat.says = lambda prompt: next(
        (200, said) for key, said in says.items() if f"Description: {key}" in prompt
    )
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    result = score_files(responses, truth, judging=TemplateOptions(**options))  # type: ignore[arg-type]
    assert len(chat.asked) == 3
    assert (result["counts"]["objects"], result["counts"]["objects_hallucinated"]) == (3, 1)
    assert (result["response_level"], result["mention_level"]) == (0.5, 1 / 3)
    assert result["counts"]["words"] == 8 + 6 + 5 + 3
    assert (result["objects_by"], result["judge"]) == ("judge", "j")
    assert result["template"].startswith("object_halbench.txt (sha256")
    assert result["flags"] == ["1 replies of the judge hold no list: they name no object"]
    again = score_files(responses, truth, judging=TemplateOptions(verdicts=tmp_path / "v.jsonl"))
    assert (again["mention_level"], len(chat.asked)) == (1 / 3, 3)
    assert score_files(responses, truth)["counts"]["objects_hallucinated"] == 2, "cat, wine glass"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('["dog", "red car"]', ["dog", "red car"]),
        ("```json\n[]\n```", []),
        ('["dog", 3]', None),
        ("dog, car", None),
        ('["dog"', None),
        ("]dog[", None),
    ],
)
def test_the_list_in_a_reply(reply: str, expected: list[str] | None) -> None:
    assert phrases(reply) == expected


@shared
def test_the_refined_list_on_published_captions() -> None:
    captions = SHARED / "chair" / "captions" / "opera_llava-1.5_greedy.jsonl"
    truth, refined = SHARED / "chair" / "objects_pattern.json", SHARED / "obj_halbench"
    result = score_files(captions, truth, refined / "synonyms_refine.txt")
    same = score_chair(captions, truth, refined / "synonyms_refine.txt")
    assert result["vocabulary"].startswith("synonyms_refine.txt (sha256")
    assert result["mention_level"] == same["chair_i_distinct"]
    assert result["recall"] == same["recall"]
    # the refined list has "brother" and "pedestrian", "motor bike" and "cheesecake"
    words = Vocabulary.load(refined / "synonyms_refine.txt").mentions
    assert words("A pedestrian on a motor bike eats cheesecake on a coffee table.") == [
        ("pedestrian", "person"),
        ("motor bike", "motorcycle"),
        ("cheesecake", "cake"),
        ("table", "dining table"),
    ]

"""CHAIR: judging one caption, scoring many."""

import json
from typing import Any

import pytest

from eval.benchmarks.chair import alarm, judge, score
from eval.benchmarks.chair.files import score_files as score_chair
from eval.benchmarks.coco import Vocabulary, read_truth
from eval.errors import EvalError
from tests.support.shared_data import SHARED, shared

CHAIR = SHARED / "chair"
CAPTION_FILES = [
    "opera_instructblip_greedy.jsonl",
    "opera_llava-1.5_beam5.jsonl",
    "opera_llava-1.5_greedy.jsonl",
    "opera_llava-1.5_opera.jsonl",
    "pope-paper_instructblip_brief.jsonl",
    "pope-paper_instructblip_short.jsonl",
    "pope-paper_llava_short.jsonl",
    "selective-eos_llava-1.5-7b.jsonl",
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load()


def test_one_caption(vocabulary: Vocabulary) -> None:
    judged = judge("Two men walk a puppy past a bench and a dog.", ["person", "dog"], vocabulary)
    assert judged.objects == ["person", "dog", "bench", "dog"]
    assert judged.mentions[1] == ("puppy", "dog")
    assert judged.hallucinated == (("bench", "bench"),)
    assert judged.missed == ()
    assert judged.tokens == 12
    assert (judged.four_grams, judged.distinct_four_grams) == (9, 9)
    assert judged.counts.distinct_objects_mentioned == 3


def test_looping_text_repeats_its_four_grams(vocabulary: Vocabulary) -> None:
    judged = judge("a red car " * 4, ["car"], vocabulary)
    assert (judged.four_grams, judged.distinct_four_grams) == (9, 3)


CAPTIONS = [
    (1, "A dog and a dog and a cat."),  # the cat is not there
    (2, "A man with a hot dog."),
    (3, "Nothing much."),
    (4, "A bench, a bench, a bench."),  # none of it is there
]
TRUTH = {1: ["dog"], 2: ["person", "hot dog", "cup"], 3: [], 4: ["car", "bus"]}


def test_formulas(vocabulary: Vocabulary) -> None:
    result = score(CAPTIONS, TRUTH, vocabulary)
    assert result["counts"] == {
        "captions": 4,
        "captions_hallucinated": 2,
        "object_mentions": 8,
        "object_mentions_hallucinated": 4,
        "gt_objects": 6,
        "gt_objects_recalled": 3,
        "distinct_objects_mentioned": 5,
        "tokens": 9 + 6 + 3 + 9,
        "captions_without_objects": 1,
    }
    assert result["chair_s"] == 0.5
    assert result["chair_i"] == 0.5
    assert result["recall"] == 0.5
    assert result["precision"] == 0.6
    assert result["f1"] == pytest.approx(2 * 0.6 * 0.5 / 1.1, abs=1e-15)
    assert result["mean_tokens"] == 27 / 4
    assert result["chair_i_distinct"] == 0.4
    assert result["no_object_share"] == 0.25
    # twice: "a dog and a" in the first caption, "a bench , a" and "bench , a bench" in the last
    assert result["distinct_4gram_share"] == (5 + 3 + 0 + 4) / (6 + 3 + 0 + 6)
    assert result["rules"] == "pattern"
    assert result["vocabulary"] == vocabulary.name
    assert result["flags"] == []


def test_intervals_hold_the_value_and_come_from_the_seed(vocabulary: Vocabulary) -> None:
    captions, truth = CAPTIONS * 10, TRUTH
    result = score(captions, truth, vocabulary)
    for name, (low, high) in result["intervals"].items():
        assert low <= result[name] <= high
        assert low < high
    assert set(result["intervals"]) >= {"chair_s", "chair_i", "recall"}
    assert result["intervals"] == score(captions, truth, vocabulary)["intervals"]
    assert result["intervals"] != score(captions, truth, vocabulary, seed=1)["intervals"]


def test_the_result_is_json(vocabulary: Vocabulary) -> None:
    result = score(CAPTIONS, TRUTH, vocabulary)
    assert json.loads(json.dumps(result)) == result


def test_division_by_zero_is_zero_and_flagged(vocabulary: Vocabulary) -> None:
    result = score([(3, "")], TRUTH, vocabulary)
    assert (result["chair_s"], result["chair_i"], result["recall"]) == (0.0, 0.0, 0.0)
    assert result["no_object_share"] == 1.0
    flagged = {flag.split(":")[0] for flag in result["flags"]}
    assert flagged == {
        "chair_i",
        "recall",
        "precision",
        "f1",
        "chair_i_distinct",
        "distinct_4gram_share",
    }


def test_repeated_images_and_unknown_objects_are_flagged(vocabulary: Vocabulary) -> None:
    result = score(
        [(1, "there is a dog"), (1, "there is a cat")], {1: ["dog", "zeppelin"]}, vocabulary
    )
    assert result["flags"] == [
        "1 images have more than one caption; each counts",
        "objects of the truth that the vocabulary has no word for: ['zeppelin']",
    ]


@pytest.mark.parametrize(
    ("captions", "rules", "message"),
    [
        ([], "pattern", "no captions to score"),
        ([(1, "a"), (9, "a"), (8, "a")], "pattern", r"no image 8, 9 \(2 of 3 images are missing"),
        (CAPTIONS, "lemma", "rules .lemma.: expected pattern or wordnet"),
    ],
)
def test_bad_input(
    vocabulary: Vocabulary, captions: list[tuple[int, str]], rules: str, message: str
) -> None:
    with pytest.raises(EvalError, match=message):
        score(captions, TRUTH, vocabulary, rules)


def reference(name: str) -> dict[str, Any]:
    scores = json.loads((SHARED / "reference_scores.json").read_text())["chair"]
    return scores[name]["pattern"]  # type: ignore[no-any-return]


@shared
def test_the_list_of_caption_files_is_complete() -> None:
    assert sorted(path.name for path in (CHAIR / "captions").iterdir()) == CAPTION_FILES


@pytest.mark.parametrize("name", CAPTION_FILES)
@shared
def test_every_raw_count_of_the_published_captions(name: str) -> None:
    expected = reference(name)
    result = score_chair(
        CHAIR / "captions" / name, CHAIR / "objects_pattern.json", CHAIR / "synonyms.txt"
    )
    assert result["counts"] == expected["counts"]
    assert result["chair_s"] == expected["CHAIRs"]
    assert result["chair_i"] == expected["CHAIRi"]
    assert result["recall"] == expected["Recall"]
    assert result["mean_tokens"] == expected["mean_tokens"]
    assert result["flags"] == []


@shared
def test_every_published_sentence() -> None:
    standard = Vocabulary.load(CHAIR / "synonyms.txt")
    truth = read_truth(CHAIR / "objects_pattern.json", standard)
    name = "opera_llava-1.5_greedy.jsonl"
    captions = (CHAIR / "captions" / name).read_text().splitlines()
    sentences = (CHAIR / f"sentences_pattern_{name}").read_text().splitlines()
    for line, wanted in zip(captions, map(json.loads, sentences), strict=True):
        judged = judge(json.loads(line)["caption"], truth[wanted["image_id"]], standard)
        assert judged.objects == wanted["objects"]
        assert [list(pair) for pair in judged.hallucinated] == wanted["hallucinated"]
        assert judged.tokens == wanted["tokens"]


@shared
def test_the_published_example_end_to_end() -> None:
    outputs = json.loads((CHAIR / "example_outputs.json").read_text())
    result = score_chair(
        CHAIR / "example_inputs.jsonl", CHAIR / "objects_pattern.json", CHAIR / "synonyms.txt"
    )
    published = outputs["overall_metrics"]
    assert result["chair_s"] == published["CHAIRs"]
    assert result["chair_i"] == published["CHAIRi"]
    assert result["recall"] == pytest.approx(published["Recall"], abs=1e-15)
    standard = Vocabulary.load(CHAIR / "synonyms.txt")
    for sentence in outputs["sentences"]:
        judged = judge(sentence["caption"], sentence["mscoco_gt_words"], standard)
        assert judged.objects == sentence["mscoco_generated_words"]
        assert standard.read(sentence["caption"]).tokens == tuple(sentence["words"])


@pytest.mark.parametrize("name", CAPTION_FILES)
@shared
def test_the_shipped_words_score_within_0_3_points_of_the_standard_list(name: str) -> None:
    result = score_chair(CHAIR / "captions" / name, CHAIR / "objects_pattern.json")
    expected = reference(name)
    assert abs(result["chair_s"] - expected["CHAIRs"]) <= 0.003
    assert abs(result["chair_i"] - expected["CHAIRi"]) <= 0.003
    assert abs(result["recall"] - expected["Recall"]) <= 0.003
    assert result["vocabulary"].startswith("coco.yaml")


WORDS = "there is a long wall and then some more of it "


def test_chair_of_the_first_words_is_that_of_captions_cut_there(vocabulary: Vocabulary) -> None:
    """An invented cat behind 44 words counts at 60 and 100 words, not at 40."""
    captions = [(1, f"A dog. {WORDS * 4}A cat."), (2, "A person and a bench.")]
    result = score(captions, TRUTH, vocabulary)
    assert (result["chair_s"], result["chair_s_at_40"], result["chair_s_at_60"]) == (1.0, 0.5, 1.0)
    assert result["chair_i_at_40"] == pytest.approx(1 / 3)
    assert result["chair_i_at_60"] == result["chair_i_at_100"] == result["chair_i"] == 0.5
    assert result["recall_at_40"] == result["recall"] == 0.5
    cut = [(image, " ".join(text.split()[:40])) for image, text in captions]
    again = score(cut, TRUTH, vocabulary)
    for name in ("chair_s", "chair_i", "recall"):
        assert result[f"{name}_at_40"] == again[name]
        assert result["intervals"][f"{name}_at_40"] == again["intervals"][name]


def test_captions_that_loop_are_counted(vocabulary: Vocabulary) -> None:
    loop = (1, "a dog on a wall " + "and a red ball " * 9)
    result = score([loop, (1, "A dog on a wall and a red ball."), (2, "")], TRUTH, vocabulary)
    assert result["looping_share"] == pytest.approx(1 / 3)
    assert result["distinct_4gram_share"] < 0.5


def test_the_alarm_rings_when_chair_is_low_because_nothing_is_said(
    vocabulary: Vocabulary,
) -> None:
    """CHAIR_S 1 % while 84 of 100 captions name nothing."""
    said = ["It is a nice day."] * 84 + ["A dog."] * 15 + ["A cat."]
    result = score([(1, text) for text in said], TRUTH, vocabulary)
    assert (result["chair_s"], result["no_object_share"]) == (0.01, 0.84)
    (text,) = result["alarms"]
    assert text.startswith("degeneration alarm, silence: 84.0 % of the captions name no object")
    looping = score([(1, "a dog and " * 20)] * 4 + [(1, "A dog.")] * 6, TRUTH, vocabulary)
    (text,) = looping["alarms"]
    assert text.startswith("degeneration alarm, looping: 40.0 % of the captions repeat themselves")


@pytest.mark.parametrize(
    ("chair_s", "chair_i", "rung"),
    [
        (0.01, 0.01, ["silence", "looping"]),
        (0.59, 0.3, ["silence", "looping"]),
        (0.9, 0.05, ["silence", "looping"]),  # a loop of true objects lowers CHAIR_I alone
        (0.9, 0.3, []),
    ],
)
def test_the_alarm_is_about_a_low_chair(chair_s: float, chair_i: float, rung: list[str]) -> None:
    shares = {"chair_s": chair_s, "chair_i": chair_i, "no_object_share": 0.2, "looping_share": 0.1}
    assert [*alarm.ringing(shares)] == rung
    healthy = shares | {"no_object_share": 0.19, "looping_share": 0.09}
    assert alarm.ringing(healthy) == {}


@shared
@pytest.mark.parametrize("name", CAPTION_FILES)
def test_the_alarm_does_not_ring_for_published_captions(name: str) -> None:
    result = score_chair(CHAIR / "captions" / name, CHAIR / "objects_pattern.json")
    assert result["alarms"] == []
    assert result["looping_share"] < 0.001

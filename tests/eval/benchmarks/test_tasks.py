"""Benchmarks in folders of their own as tasks of a run: what is asked, how it is scored."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.benchmarks import mme
from eval.benchmarks.amber.nouns import LEXICON
from eval.benchmarks.mme import Mme, MmeSettings
from eval.errors import EvalError
from eval.reports import compare, table
from eval.runs import runner, samples
from eval.runs.folder import RunFolder
from tests.eval.conftest import Settings

CSV = """Index,Question,Options,Correct Answer
1,Is it open?,(a) Open (b) Closed,(a)
2,Is it open?,(a) Open (b) Closed,(b)
"""
HALLUSION = {
    "category": "VD",
    "subcategory": "illusion",
    "set_id": "0",
    "question_id": "0",
    "question": "Are they of one size?",
    "gt_answer_details": "They are.",
    "gt_answer": "1",
}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "gray").save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All four benchmarks, two images each, in one folder."""
    data = tmp_path / "data"
    for name in ("image/AMBER_1.jpg", "image/AMBER_2.jpg", "existence/a.jpg", "existence/b.jpg"):
        picture(data / name)
    for name in ("MMVP Images/1.jpg", "MMVP Images/2.jpg", "VD/illusion/0_0.png"):
        picture(data / name)
    picture(data / "hallusion_bench/VD/illusion/0_1.png")
    described = {"type": "generative", "truth": ["dog", "sky"], "hallu": ["cat"]}
    asked = {"type": "relation", "truth": "no"}
    items = [{"id": 1, **described}, {"id": 2, **described}, {"id": 3, **asked}]
    queries = [
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        {"id": 2, "image": "AMBER_2.jpg", "query": "Describe this image."},
        {"id": 3, "image": "AMBER_1.jpg", "query": "Is there a cat?"},
    ]
    (data / "annotations.json").write_text(json.dumps(items))
    (data / "query_all.json").write_text(json.dumps(queries))
    (data / "relation.json").write_text('{"dog": [], "sky": [], "cat": []}')
    (data / "safe_words.txt").write_text("line")
    lines = [f"{name}.jpg\tIs it?\t{label}\n" for name in "ab" for label in ("Yes", "No")]
    (data / "existence.txt").write_text("".join(lines))
    (data / "Questions.csv").write_text(CSV)
    rows = [
        {**HALLUSION, "figure_id": figure, "visual_input": visual}
        for figure, visual in (("0", "1"), ("1", "2"), ("2", "0"))
    ]
    (data / "HallusionBench.json").write_text(json.dumps(rows))
    return data


def sections(folder: Path, *names: str) -> dict[str, Any]:
    own = {name: {"data": str(folder), "max_new_tokens": 3} for name in names}
    if "amber" in own:
        own["amber"] |= {"nouns": "approximate", "parser": "strict"}
    return {"tasks": list(names), **own}


ALL = ("amber", "mme", "mmvp", "hallusionbench")


def test_what_is_asked(settings: Settings, folder: Path, tmp_path: Path) -> None:
    found = samples.samples(settings(**sections(folder, *ALL)), tmp_path)
    assert [(s.task, s.id, s.image.name) for s in found] == [
        ("amber", "1", "AMBER_1.jpg"),
        ("amber", "2", "AMBER_2.jpg"),
        ("amber", "3", "AMBER_1.jpg"),
        ("mme", "existence-0000", "a.jpg"),
        ("mme", "existence-0001", "a.jpg"),
        ("mme", "existence-0002", "b.jpg"),
        ("mme", "existence-0003", "b.jpg"),
        ("mmvp", "001", "1.jpg"),
        ("mmvp", "002", "2.jpg"),
        ("hallusionbench", "VD-illusion-0-0-0", "0_0.png"),
        ("hallusionbench", "VD-illusion-0-1-0", "0_1.png"),
    ]
    assert [found[place].prompt for place in (0, 3, 7)] == [
        "Describe this image.",
        "Is it?",
        "Is it open? (a) Open (b) Closed",
    ]
    changed = sections(folder, "mme")
    changed["mme"]["prompt"] = "{question} One word."
    assert samples.samples(settings(**changed), tmp_path)[0].prompt == "Is it? One word."
    (folder / "image" / "AMBER_2.jpg").unlink()
    limited = samples.samples(settings(**sections(folder, "amber"), limit=1), tmp_path)
    assert [sample.id for sample in limited] == ["1", "3"]
    both = samples.samples(settings(**sections(folder, "chair", "mme") | {"chair": {}}), tmp_path)
    assert {sample.task for sample in both} == {"chair", "mme"}


def test_a_run_is_scored_from_its_folder_alone(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    metrics = runner.run(settings(**sections(folder, *ALL)), out)
    assert metrics["answered"] == 11
    assert metrics["amber"]["all"]["generative"]["counts"]["descriptions"] == 2
    assert metrics["mme"]["all"]["subtasks"]["existence"]["n"] == 2
    assert metrics["mmvp"]["all"]["counts"]["pairs"] == 1
    assert metrics["hallusionbench"]["all"]["counts"]["pairs"] == 1
    assert all((out / name).is_file() for name in LEXICON)
    before = (out / "metrics.json").read_bytes()
    folder.rename(tmp_path / "gone")
    assert runner.score(out) == metrics
    assert (out / "metrics.json").read_bytes() == before
    shown = table.markdown([out])
    assert "| amber generative, mean_words " in shown
    for row in ("amber generative, chair %", "mme subtasks existence, accuracy_plus %"):
        assert row in shown
    assert "- all: amber, mme, mmvp, hallusionbench" in shown


def answered(out: Path, said: dict[str, str]) -> dict[str, Any]:
    """Scores after the answers to these samples are replaced."""
    file = RunFolder(out).answers
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [row | {"answer": said[row["id"]]} for row in rows if row["id"] in said]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return runner.score(out)


def test_the_answers_count(settings: Settings, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    runner.run(settings(**sections(folder, *ALL)), out)
    said = {"1": "A dog.", "2": "A cat.", "3": "No, there is none."}
    said |= {"existence-0000": "Yes", "existence-0001": "No", "existence-0002": "Yes"}
    said |= {"001": "(a)", "002": "closed"}
    said |= {"VD-illusion-0-0-0": "Yes.", "VD-illusion-0-1-0": "No."}
    metrics = answered(out, said)
    generative = metrics["amber"]["all"]["generative"]
    assert (generative["chair"], generative["cover"], generative["cog"]) == (0.5, 0.25, 0.5)
    assert metrics["amber"]["all"]["discriminative"]["all"]["accuracy"] == 1.0
    # the second image has one answer only: no pair
    assert metrics["mme"]["all"]["subtasks"]["existence"]["accuracy_plus"] == 1.0
    assert metrics["mme"]["all"]["subtasks"]["existence"]["n"] == 1
    assert metrics["mmvp"]["all"]["pair_accuracy"] == 1.0
    assert metrics["hallusionbench"]["all"]["a_acc"] == 0.5
    assert metrics["hallusionbench"]["all"]["q_acc"] == 0.0


STOCK = {"1": "A dog.", "2": "A cat.", "3": "No, there is none."}
STOCK |= {f"existence-000{n}": text for n, text in enumerate(("Yes", "Yes", "No", "Maybe"))}
STOCK |= {"001": "(a)", "002": "(a)", "VD-illusion-0-0-0": "Yes.", "VD-illusion-0-1-0": "No."}
EDITED = STOCK | {"2": "A dog in the sky.", "3": "Yes.", "existence-0001": "No"}
EDITED |= {"existence-0002": "Yes", "002": "(b)", "VD-illusion-0-1-0": "Yes."}


def test_two_runs_are_compared_sample_by_sample(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    """Before, after and McNemar's counts by hand; the rest is what each run's metrics say."""
    one, two = tmp_path / "one", tmp_path / "two"
    runner.run(settings(**sections(folder, *ALL)), one)
    shutil.copytree(one, two)
    metrics = [answered(path, said)["amber"]["all"] for path, said in ((one, STOCK), (two, EDITED))]
    found = compare.compare(one, two)
    described, asked = (
        found["amber"]["all"][part] for part in ("generative", "discriminative relation")
    )
    for key in ("chair", "cover", "hal", "cog", "mean_words"):
        sides = [described[key][side] for side in ("before", "after")]
        assert sides == [found["generative"][key] for found in metrics]
    assert (described["chair"]["difference"], described["n"]) == (-0.5, 2)
    assert "mcnemar" not in described
    assert asked["accuracy"]["difference"] == -1.0
    assert asked["mcnemar"] == {"turned_right": 0, "turned_wrong": 1, "p": 1.0}
    existence = found["mme"]["all"]["subtasks existence"]
    assert [existence["accuracy"][side] for side in ("before", "after")] == [0.25, 0.75]
    assert [existence["accuracy_plus"][side] for side in ("before", "after")] == [0.0, 0.5]
    assert existence["mcnemar"]["turned_right"] == 2
    assert existence["n"] == 4
    assert found["mmvp"]["all"]["pair_accuracy"]["difference"] == 1.0
    assert found["mmvp"]["all"]["mcnemar"]["turned_right"] == 1
    assert found["hallusionbench"]["all"]["a_acc"]["difference"] == 0.5
    assert found["hallusionbench"]["all"]["mcnemar"]["turned_right"] == 1
    assert found["unpaired"] == 0
    shown = compare.markdown(found)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in shown.splitlines()]
    row = ["all", "mme subtasks existence, accuracy %", "25.0", "75.0"]
    assert [*row, "+50.0 [+50.0, +50.0] *", "+2 -0, p = 0.5"] in cells
    words = ["all", "amber generative, mean_words", "2.0", "3.5", "+1.5 [+0.0, +3.0]", ""]
    assert words in cells


def test_a_chair_gain_of_amber_that_is_paid_for_is_said(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    runner.run(settings(**sections(folder, "amber")), one)
    shutil.copytree(one, two)
    answered(one, {"1": "A dog and a cat.", "2": "A dog and a cat.", "3": "No"})
    answered(two, {"1": "A wall.", "2": "A wall.", "3": "No"})
    (warning,) = compare.compare(one, two)["warnings"]
    paid = "fewer true words are covered and descriptions got shorter"
    assert warning == (
        f"amber: CHAIR fell while {paid}; captions that say less lower CHAIR for free"
    )
    assert compare.compare(two, one)["warnings"] == []


def test_a_run_does_not_differ_from_itself(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    runner.run(settings(**sections(folder, *ALL)), out)
    found = compare.compare(out, out)
    parts = [found[task]["all"] for task in ("mmvp", "hallusionbench")]
    parts += [*found["amber"]["all"].values(), *found["mme"]["all"].values()]
    for changes in parts:
        measures = [value for key, value in changes.items() if key not in ("n", "mcnemar")]
        assert {(c["difference"], *c["interval"]) for c in measures} == {(0.0, 0.0, 0.0)}
        assert changes.get("mcnemar", {"p": 1.0})["p"] == 1.0


def test_the_totals_of_mme_pool_their_subtasks() -> None:
    """Three subtasks with one image each that is right, and one that is wrong."""
    said = dict.fromkeys(mme.HALLUCINATION, "No") | {"color": "Yes"}
    rows = [
        {"subtask": name, "pair": 0, "image": "a", "label": label, "answer": answer}
        for name, second in said.items()
        for label, answer in (("yes", "Yes"), ("no", second))
    ]
    found = Mme().tallies(rows, MmeSettings(), Path())
    assert [*found] == [*(f"subtasks {name}" for name in mme.HALLUCINATION), "totals hallucination"]
    total = found["totals hallucination"].report()
    assert (total["accuracy"], total["accuracy_plus"], total["n"]) == (7 / 8, 3 / 4, 4)
    scored = Mme().score(rows, MmeSettings(), Path())
    assert total["score"] == scored["totals"]["hallucination"] == 650.0


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("amber", {"max_new_tokens": 4}, "the token limit of amber is 3 and 4 tokens"),
        ("mme", {"max_new_tokens": 4}, "the token limit of mme is 3 and 4 tokens"),
        ("mmvp", {"prompt": "{question}?"}, r"the prompts of mmvp differ, for example 'Is it open"),
        ("mmvp", {"labels": "corrected"}, "the annotations behind mmvp differ"),
        ("hallusionbench", {"max_new_tokens": 4}, "the token limit of hallusionbench is 3 and 4"),
        ("amber", {"parts": ["generative"]}, "the prompts of amber differ"),
    ],
)
def test_runs_that_were_asked_different_things_are_refused(
    settings: Settings,
    folder: Path,
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    reason: str,
) -> None:
    (folder / "Questions.csv").write_text(CSV.replace("\n1,", "\n99,").replace("\n2,", "\n100,"))
    for index in (99, 100):
        picture(folder / f"MMVP Images/{index}.jpg")
    one, two = sections(folder, name), sections(folder, name)
    two[name] |= changes
    for path, given in (("one", one), ("two", two)):
        runner.run(settings(**given), tmp_path / path)
    with pytest.raises(EvalError, match=reason):
        compare.compare(tmp_path / "one", tmp_path / "two")


def test_other_rules_for_nouns_are_refused(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    runner.run(settings(**sections(folder, "amber")), one)
    shutil.copytree(one, tmp_path / "two")
    file = tmp_path / "two" / "config.yaml"
    file.write_text(file.read_text().replace("nouns: approximate", "nouns: nltk"))
    with pytest.raises(EvalError, match=r"amber is read by approximate rules .* and by nltk rules"):
        compare.compare(one, tmp_path / "two")


def test_no_pair_yet(settings: Settings, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    runner.run(settings(**sections(folder, "mme")), out)
    with pytest.raises(EvalError, match="no pair of questions has both its answers"):
        answered(out, {"existence-0000": "Yes"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["mme"]}, r"mme\.data: name the folder of mme, .*python -m eval data mme"),
        ({"amber": {"nouns": "spacy"}}, r"amber\.nouns"),
        ({"amber": {"parts": ["captions"]}}, r"amber\.parts"),
        ({"mmvp": {"prompt": "Look."}}, r"prompt 'Look\.': it must hold \{question\}"),
        ({"mmvp": {"labels": "mine"}}, r"unknown name in mmvp\.labels: mine"),
        ({"mme": {"max_new_tokens": 0}}, r"mme\.max_new_tokens: .*at least 1"),
    ],
)
def test_bad_settings(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("amber", "image/AMBER_2.jpg", r"image/AMBER_2\.jpg: no such image \(1 of the 2 images"),
        ("mme", "existence/b.jpg", r"existence/b\.jpg: no such image .*eval data mme"),
        ("mme", "existence.txt", r"no file of MME in it"),
        ("mmvp", "Questions.csv", r"Questions\.csv: no such file"),
        ("hallusionbench", "VD/illusion/0_0.png", r"hallusion_bench/VD/illusion/0_0\.png: no such"),
    ],
)
def test_a_missing_file_is_named(
    settings: Settings, folder: Path, tmp_path: Path, name: str, file: str, message: str
) -> None:
    (folder / file).unlink()
    with pytest.raises(EvalError, match=message):
        samples.samples(settings(**sections(folder, name)), tmp_path)


@pytest.mark.parametrize(
    ("parser", "accuracy", "flags"), [("official", 0.0, 2), ("strict", 1.0, 0)]
)
def test_a_run_reads_answers_as_score_does(
    settings: Settings, folder: Path, tmp_path: Path, parser: str, accuracy: float, flags: int
) -> None:
    """The parser that the setting names, by default the official one, and what it leaves unread."""
    given = sections(folder, "amber", "mme", "hallusionbench")
    for name in given["tasks"]:
        given[name]["parser"] = parser
    runner.run(settings(**given), tmp_path / "run")
    said = STOCK | {"existence-0000": "The answer is yes", "existence-0001": "It says: no"}
    metrics = answered(tmp_path / "run", said | {"1": "Describe this image. A dog."})
    asked = metrics["amber"]["all"]["discriminative"]["all"]
    assert (asked["accuracy"], asked["parser"], len(asked["flags"])) == (accuracy, parser, flags)
    part = metrics["mme"]["all"]["subtasks"]["existence"]
    assert (part["counts"]["right"], metrics["mme"]["all"]["parser"]) == (
        2 * accuracy,
        parser,
    )
    assert metrics["hallusionbench"]["all"]["parser"] == parser
    shown = table.markdown([tmp_path / "run"])
    assert "amber generative, 1 of 2 captions hold their own prompt" in shown
    unread = (
        "amber discriminative all, 1 of 1 answers are neither yes nor no to the official parser"
    )
    assert (unread in shown) is (parser == "official")


def test_official_is_the_default_and_other_parsers_do_not_compare(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    given = sections(folder, "mme")
    one = settings(**given)
    parsers = [one.sections[name].parser for name in ("amber", "mme", "hallusionbench")]
    assert parsers == [
        "official",
        "official",
        "strict",
    ]
    runner.run(one, tmp_path / "one")
    given["mme"]["parser"] = "strict"
    runner.run(settings(**given), tmp_path / "two")
    with pytest.raises(EvalError, match=r"mme is read by .*official parser and by .*strict parser"):
        compare.compare(tmp_path / "one", tmp_path / "two")
    given["mme"]["parser"] = "mine"
    with pytest.raises(EvalError, match=r"unknown name in mme\.parser: mine"):
        settings(**given)


def test_captions_of_a_run_that_hold_their_prompt_are_flagged(
    settings: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    runner.run(settings(tasks=["chair"], limit=2, chair={"max_new_tokens": 2}), out)
    first, second = (row["id"] for row in RunFolder(out).rows())
    said = {
        first: "USER: Please describe this image in detail. ASSISTANT: A dog.",
        second: "A dog.",
    }
    (split,) = answered(out, said)["chair"].values()
    assert [flag.partition(" hold")[0] for flag in split["flags"]] == ["1 of 2 captions"]
    answered(out, {first: "A cat.", second: "A dog."})
    assert "hold their own prompt" not in table.markdown([out])

"""The frontier of made-up runs, by values worked out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.__main__ import main
from eval.errors import EvalError
from eval.runs.config import from_settings
from eval.runs.folder import RunFolder
from eval.studies.frontier import frontier, trivial_cost, verdict
from vlm_patch.models.chat import GREEDY

IMAGES = 8
TRUTH = ["dog", "cup"]
LONG, SHORT, CALM = "A dog, a cup and a cat.", "A dog.", "There is a dog beside a cup."


def run(path: Path, captions: list[str], **changes: Any) -> Path:
    """A finished run of one caption an image, all of which show a dog and a cup."""
    path.mkdir(parents=True)
    given = {"splits": ["test"], "tasks": ["chair"]} | changes
    settings = from_settings(given).settings()
    record = {
        "settings": settings,
        "data": {"samples": len(captions), "images": {"test": {"count": 8, "sha256": "a"}}},
        **{"decoding": dict(GREEDY), "environments": [], "patches": [], "notes": []},
    }
    rows = [
        {
            **{"task": "chair", "split": "test", "id": str(n), "image": f"{n}.png"},
            **{"prompt": settings["chair"]["prompt"], "answer": text, "ended": True},
            **{"image_id": n, "truth": TRUTH},
        }
        for n, text in enumerate(captions)
    ]
    folder = RunFolder(path)
    folder.config.write_text(json.dumps(record))
    folder.answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(path)]) == 0
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """The stock model invents a cat every time; cut short it says half; the method invents none."""
    cut = {"chair": {"max_new_tokens": 3}}
    return [
        run(tmp_path / "calm", [CALM] * 8, methods=["vhr"]),
        run(tmp_path / "stock", [LONG] * 8),
        run(tmp_path / "cut", [LONG] * 4 + [SHORT] * 4, **cut),
    ]


def test_a_frontier_by_hand(runs: list[Path]) -> None:
    found = frontier(runs)["chair"]["test"]
    assert (found["n"], found["stock"]) == (8, "stock")
    assert list(found["runs"]) == ["stock", "cut", "calm"]
    assert [one["trivial"] for one in found["runs"].values()] == [True, True, False]
    values = {
        name: (one["recall"]["value"], one["chair_i"]["value"])
        for name, one in found["runs"].items()
    }
    # cut: 4 x 2 + 4 x 1 of 16 objects; 4 inventions of 4 x 3 + 4 x 1 mentions
    assert values == {"stock": (1.0, 1 / 3), "cut": (0.75, 0.25), "calm": (1.0, 0.0)}
    calm, cut = (found["runs"][name] for name in ("calm", "cut"))
    # all 8 pairs differ one way: 2 of 256 exchanges; of 4 tests it is the smallest
    assert calm["changes"]["chair_i"]["p"] == 2 / 256
    assert calm["changes"]["chair_i"]["holm"] == 4 * 2 / 256
    assert calm["changes"]["chair_i"]["difference"] == pytest.approx(-1 / 3)
    assert calm["changes"]["recall"] == {
        **{"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0, "holm": 1.0, "smallest": 0.0}
    }
    # cut: 4 of 8 pairs differ, 2 of 16 signs are as extreme
    assert cut["changes"]["recall"]["p"] == 2 / 16
    assert cut["changes"]["recall"]["difference"] == -0.25
    assert cut["verdict"] == "no difference shown"
    # at the same recall the trivial runs reach the stock model's own third
    assert calm["over_trivial"]["difference"] == pytest.approx(-1 / 3)
    assert calm["verdict"] == "better; beats the trivial baselines"
    assert calm["adjusted"] is None, "nothing is wrong in it"
    assert "over_trivial" not in found["runs"]["stock"]
    assert cut["over_trivial"] is None


def test_the_same_captions_elsewhere_are_no_better_at_equal_length(tmp_path: Path) -> None:
    """The same captions on other images: at any length one mention in three is wrong."""
    longer = ["A dog, a cup and a cat. " + " ".join(["It is big."] * n) for n in range(8)]
    stock = run(tmp_path / "stock", longer)
    other = run(tmp_path / "other", longer[::-1], methods=["vhr"])
    found = frontier([stock, other])["chair"]["test"]["runs"]["other"]
    assert found["chair_i"]["value"] == pytest.approx(1 / 3)
    assert found["adjusted"]["value"] == pytest.approx(1 / 3)
    assert found["adjusted"]["ratio"] == pytest.approx(1)
    assert found["over_trivial"] is None, "there is no trivial baseline but the stock model"


def test_where_in_a_caption_it_is_wrong(tmp_path: Path) -> None:
    """Ten words, then a cat in the second ten."""
    text = "A dog and a cup on a big brown table. Then a cat."
    stock = run(tmp_path / "stock", [text] * 8)
    other = run(tmp_path / "other", ["A dog."] * 8, methods=["vhr"])
    runs = frontier([stock, other])["chair"]["test"]["runs"]
    places = runs["stock"]["by_place"]
    assert list(places)[:3] == ["1-10", "11-20", "21-40"]
    first, second = places["1-10"], places["11-20"]
    assert (first["counts"]["object_mentions"], first["chair_i"]) == (24, 1 / 3)
    assert (second["counts"]["object_mentions"], second["chair_i"]) == (8, 1.0)
    assert runs["other"]["by_place"]["1-10"]["counts"]["object_mentions"] == 8


def test_what_trivial_baselines_reach_by_hand() -> None:
    """Stock (0.8, 0.4), a cut (0.4, 0.2): at 0.6 half of the way; beyond its ends, the ends. A run
    that says less and invents more never counts.
    """
    stock, cut, hot = (0.8, 0.4), (0.4, 0.2), (0.5, 0.6)
    gains = np.array([0.9, 0.8, 0.6, 0.4, 0.1])
    expected = [0.4, 0.4, 0.3, 0.2, 0.2]
    assert trivial_cost(gains, stock, [cut]).tolist() == pytest.approx(expected)
    assert trivial_cost(gains, stock, [hot, cut]).tolist() == pytest.approx(expected)
    assert trivial_cost(gains, stock, [(0.8, 0.3)]).tolist() == pytest.approx([0.4] * 5)


@pytest.mark.parametrize(
    ("gain", "cost", "over", "expected"),
    [
        ((-0.1, 0.9), (-0.1, 0.01), None, "better"),
        ((-0.1, 0.01), (-0.1, 0.01), 0.1, "better, but says less; does not beat the trivial base"),
        ((0.1, 0.01), (-0.1, 0.9), -0.1, "better: says more; beats the trivial baselines"),
        ((0.1, 0.01), (0.1, 0.01), -0.1, "worse, but says more"),
        ((-0.1, 0.01), (-0.1, 0.05), None, "worse: says less"),
        ((0.1, 0.9), (0.1, 0.9), None, "no difference shown"),
    ],
)
def test_verdicts(gain: Any, cost: Any, over: float | None, expected: str) -> None:
    changes = [{"difference": d, "holm": p} for d, p in (gain, cost)]
    above = None if over is None else {"difference": over, "interval": [over - 0.01, over + 0.01]}
    assert verdict(*changes, above).startswith(expected)


def test_the_command_prints_writes_and_draws(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["frontier", *map(str, runs), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert (out / "frontier.md").read_text() == shown
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in shown.splitlines()]
    (calm,) = [line for line in lines if line[0] == "calm" and len(line) == 12]
    assert calm[1:4] == ["100.0", "+0.0 [+0.0, +0.0]", "1"]
    assert calm[4:7] == ["0.0", "-33.3 [-33.3, -33.3]", "0.0312"]
    assert calm[11] == "better; beats the trivial baselines"
    assert ["cut", "25.0 of 16", "-", "-", "-", "-", "-"] in lines
    assert main(["frontier", *map(str, runs), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chair"]["test"]["n"] == 8


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    stock = run(tmp_path / "stock", [LONG] * 8)
    method = run(tmp_path / "method", [LONG] * 8, methods=["vhr"])
    fewer = run(tmp_path / "fewer", [LONG] * 7, methods=["vhr"])
    other = run(tmp_path / "other", [LONG] * 8, model="other/model")
    with pytest.raises(EvalError, match="found 1 runs, 0 of them without methods"):
        frontier([method])
    with pytest.raises(EvalError, match=r"the images of test differ \(8 and 7, 7 in common\)"):
        frontier([stock, fewer])
    with pytest.raises(EvalError, match=r"different models \(pocket, other/model\)"):
        frontier([stock, other])


def test_lengths_that_differ_are_taken_out(tmp_path: Path) -> None:
    """Short captions are wrong in one of two, long ones in two of three, in both runs; but one of
    them has short ones alone.
    """
    short, long = "A dog and a cat.", "A dog, and so wide and so big and so on, a cat and a cat."
    stock = run(tmp_path / "stock", [short] * 4 + [long] * 4)
    other = run(tmp_path / "other", [short] * 8, methods=["vhr"])
    runs = frontier([stock, other])["chair"]["test"]["runs"]
    plain = runs["other"]["chair_i"]["value"] / runs["stock"]["chair_i"]["value"]
    assert plain == pytest.approx((8 / 16) / (12 / 20))
    assert runs["other"]["adjusted"]["ratio"] == pytest.approx(1, abs=1e-6)

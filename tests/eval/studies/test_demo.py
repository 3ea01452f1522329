"""The demo: marked captions, the picture, and the whole of it with a tiny model."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from eval.benchmarks.coco import Vocabulary
from eval.studies import demo, picture
from eval.studies.demo import caption
from eval.studies.picture import Caption, Scene
from eval.support import pages

RED = (215, 0, 21)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load()


def invented(text: str, truth: set[str], vocabulary: Vocabulary) -> list[str]:
    said = caption("stock", text, truth, vocabulary)
    assert "".join(piece for piece, _ in said.pieces) == text
    return [piece for piece, marked in said.pieces if marked]


@pytest.mark.parametrize(
    ("text", "truth", "marked"),
    [
        ("There is a cup and a dog.", {"cup"}, ["dog"]),
        ("Dogs, a dog and a puppy.", set(), ["Dogs", "dog", "puppy"]),
        ("A traffic light above a car.", {"car"}, ["traffic light"]),
        ("A hot dog next to a dog.", {"hot dog"}, ["dog"]),
        ("A hot dog next to a dog.", {"dog"}, ["hot dog"]),
        ("Two wine glasses and a cup", {"cup"}, ["wine glasses"]),
        ("a baby elephant", set(), ["elephant"]),
        ("Nothing is here.", set(), []),
        ("A cup.", {"cup"}, []),
        ("", set(), []),
    ],
)
def test_invented_objects_are_marked_where_they_stand(
    text: str, truth: set[str], marked: list[str], vocabulary: Vocabulary
) -> None:
    assert invented(text, truth, vocabulary) == marked


def test_a_caption_is_summed_up(vocabulary: Vocabulary) -> None:
    said = caption("stock", "A dog, a dog and a cup.", {"cup", "bowl"}, vocabulary)
    assert said.text == "A *dog*, a *dog* and a cup."
    assert said.summary == "invented: dog; named 1 of the 2 objects that are there"
    assert "invented: nothing" in caption("stock", "A cup.", {"cup"}, vocabulary).summary


def scene(folder: Path, captions: list[Caption]) -> Scene:
    path = folder / "scene.png"
    Image.new("RGB", (96, 96), (0, 128, 0)).save(path)
    return Scene("test", path, ["cup"], captions)


def colors(path: Path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(1 << 24) or []
    return {(int(r), int(g), int(b)): count for count, (r, g, b) in found}


def test_the_picture_shows_the_scene_and_invented_words_in_red(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    texts = ("There is a dog. " * 30, "There is a cup.")
    said = [caption("stock", text, {"cup"}, vocabulary) for text in texts]
    drawn, plain = tmp_path / "drawn.png", tmp_path / "plain.png"
    picture.draw([scene(tmp_path, said)], "A choice.", "A caveat.", drawn)
    picture.draw([scene(tmp_path, [said[1]] * 2)], "A choice.", "A caveat.", plain)
    assert colors(drawn)[0, 128, 0] > 250 * 250
    assert colors(drawn)[RED] > 100
    assert RED not in colors(plain)
    with Image.open(drawn) as tall, Image.open(plain) as short:
        assert tall.width == short.width == picture.WIDTH
        assert tall.height > short.height


def test_lines_fit_and_keep_every_word() -> None:
    pieces = [
        ("There is a very long sentence about a ", False),
        ("dog", True),
        (", and so on", False),
    ]
    lines = list(picture._wrap(pieces * 5, 300, picture.TEXT))
    assert "".join(text for line in lines for text, _ in line) == "".join(t for t, _ in pieces * 5)
    for line in lines:
        assert sum(picture.TEXT.getlength(text) for text, _ in line) <= 300
        assert not line[0][0].startswith(","), "a comma stays with its word"


def test_the_demo_from_start_to_end(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a tiny random model, whose captions are noise; then once more, which changes nothing."""
    for name in demo.RUNS:
        methods = {"baseline": [], "all": ["var", "gift", "vhr"]}.get(name, [name])
        small = {
            "model": str(checkpoint),
            "dtype": "float32",
            "methods": methods,
            "chair": {"images": 4, "max_new_tokens": 4},
            "pope": {"images": 2, "max_new_tokens": 2, "per_image": 1},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.setattr(demo, "CONFIGS", tmp_path)
    out = tmp_path / "out"
    demo.demo(out)
    printed = capsys.readouterr().out
    written = (out / "table.md").read_text()
    assert written not in printed
    shown = [line for line in printed.splitlines() if line.startswith(("| test", "| break"))]
    assert len(shown) == 12
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown]
    assert [row[:2] for row in cells[:6]] == [
        ["test", "degeneration alarm"],
        ["test", "CHAIR_S %"],
        ["test", "CHAIR_I %"],
        ["test", "recall %"],
        ["test", "length in tokens"],
        ["test", "POPE adversarial, accuracy %"],
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines()]
    assert all(row in rows for row in cells), "what is printed stands in table.md too"
    header = next(line for line in written.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.strip("|").split("|")][2:] == [*demo.RUNS]
    for split in ("test", "break"):
        for measure in ("CHAIR_S %", "recall %", "POPE adversarial, F1 %"):
            assert f"| {split.ljust(5)} | {measure}" in written
    assert "no evidence about 7B models" in written
    assert "- vhr: " in written
    assert " answers differ from the baseline's" in written
    with Image.open(out / "scenes.png") as image:
        assert image.width == picture.WIDTH
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n")
    demo.demo(out, every_row=True, docs=True)
    before, _, header, _, *documented, _, after = page.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert header.replace("|", " ").split() == ["split", "measure", *demo.RUNS]
    assert len(documented) == 2 * 8
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in documented]
    assert all(row in rows for row in found)
    assert written in capsys.readouterr().out
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

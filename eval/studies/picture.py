"""The demo's picture: each scene enlarged beside its captions, invented objects in red."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from eval.runs.images import read_image

WIDTH, MARGIN, GAP = 1400, 40, 24
SIDE = 300
COLUMN = (WIDTH - 2 * MARGIN - SIDE - 2 * GAP) // 2
PAPER, INK, FAINT, RED, RULE = "#ffffff", "#1d1d1f", "#6e6e73", "#d70015", "#d2d2d7"
TITLE, TEXT, SMALL = (ImageFont.load_default(size) for size in (30, 21, 16))
Font: TypeAlias = "ImageFont.FreeTypeFont | ImageFont.ImageFont"
LINE = 30


@dataclass(frozen=True)
class Caption:
    """The caption that one run gives a scene.

    run: name of the run
    pieces: the text in pieces; True marks an object that is not there
    summary: what was invented and what was named, in words
    """

    run: str
    pieces: Sequence[tuple[str, bool]]
    summary: str

    @property
    def text(self) -> str:
        """The caption with invented objects between stars."""
        return "".join(f"*{text}*" if invented else text for text, invented in self.pieces)


@dataclass(frozen=True)
class Scene:
    """One scene of the picture.

    split: of the data
    image: its file
    truth: its objects
    captions: to be compared
    """

    split: str
    image: Path
    truth: Sequence[str]
    captions: Sequence[Caption]


def draw(scenes: Sequence[Scene], choice: str, caveat: str, path: Path) -> None:
    """Write the picture of these scenes as PNG, as tall as its content.

    `choice` says which scenes these are, `caveat` what they cannot show.
    """
    sheet = Image.new("RGB", (WIDTH, 260 + len(scenes) * 900), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), "Captions of the pocket model", INK, TITLE)
    legend = "Same prompt, greedy. Words in red name objects that are not in the picture."
    pen.text((MARGIN, MARGIN + 42), f"{choice}\n{legend}", FAINT, TEXT, spacing=8)
    top = MARGIN + 122
    for scene in scenes:
        top = _scene(sheet, pen, scene, top)
    for line in _wrap([(caveat, False)], WIDTH - 2 * MARGIN, SMALL):
        pen.text((MARGIN, top), "".join(word for word, _ in line), FAINT, SMALL)
        top += 22
    sheet.crop((0, 0, WIDTH, top + MARGIN)).save(path)


def _scene(sheet: Image.Image, pen: ImageDraw.ImageDraw, scene: Scene, top: int) -> int:
    """One scene at height `top`; returns the height where the next begins."""
    pen.line((MARGIN, top, WIDTH - MARGIN, top), RULE, 1)
    top += GAP
    image = read_image(scene.image)
    sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (MARGIN, top))
    pen.text((MARGIN, top + SIDE + 8), f"{scene.split} / {scene.image.name}", FAINT, SMALL)
    left = MARGIN + SIDE + GAP
    truth = [(f"In the picture: {', '.join(scene.truth)}", False)]
    below = _paragraph(pen, truth, left, top - 4, 2 * COLUMN + GAP) + 10
    ends = [
        _caption(pen, caption, left + index * (COLUMN + GAP), below)
        for index, caption in enumerate(scene.captions)
    ]
    return max(*ends, top + SIDE + 34) + GAP


def _caption(pen: ImageDraw.ImageDraw, caption: Caption, left: int, top: int) -> int:
    pen.text((left, top), caption.run, FAINT, TEXT)
    end = _paragraph(pen, caption.pieces, left, top + LINE, COLUMN)
    for line in _wrap([(caption.summary, False)], COLUMN, SMALL):
        pen.text((left, end + 8), "".join(word for word, _ in line), FAINT, SMALL)
        end += 22
    return end + 8


def _paragraph(
    pen: ImageDraw.ImageDraw, pieces: Sequence[tuple[str, bool]], left: int, top: int, width: int
) -> int:
    """Wrapped text with invented objects in red; returns the height below it."""
    for line in _wrap(pieces, width, TEXT):
        x = float(left)
        for word, invented in line:
            pen.text((x, top), word, RED if invented else INK, TEXT, stroke_width=0.4 * invented)
            x += TEXT.getlength(word)
        top += LINE
    return top


def _wrap(
    pieces: Sequence[tuple[str, bool]], width: int, font: Font
) -> Iterator[list[tuple[str, bool]]]:
    """Lines of (text, invented) that fit `width` pixels, broken at blanks only."""
    words = [
        (word, invented)
        for text, invented in pieces
        for word in text.replace(" ", " \n").split("\n")
        if word
    ]
    line: list[tuple[str, bool]] = []
    start = 0
    for end, (word, _) in enumerate(words, 1):
        if not word.endswith(" ") and end < len(words):
            continue
        unit, start = words[start:end], end
        if line and sum(font.getlength(text) for text, _ in [*line, *unit]) > width:
            yield line
            line = []
        line += unit
    yield line

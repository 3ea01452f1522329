"""python -m eval demo: the pocket model as it is, with VAR, GIFT or VHR, and with all three.

Leaves a run folder for each, `table.md`, and `scenes.png`, which shows a few scenes with the
captions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from eval.benchmarks import chair
from eval.benchmarks.coco import Vocabulary
from eval.reports import table
from eval.runs import config, generate, runner
from eval.runs.folder import RunFolder, row_key
from eval.runs.samples import POCKET_SPLITS
from eval.studies import picture

CONFIGS = Path(__file__).parents[2] / "configs" / "pocket"
RUNS = ("baseline", "var", "gift", "vhr", "all")
SHOWN = 2
CHOICE = (
    f"The first {SHOWN} scenes of each split where the captions differ and one invents an object."
)
CAVEAT = (
    "The pocket model is a small model made for this project. These numbers show that the "
    "machinery works and what it does to this one model; they are no evidence about 7B models."
)


@dataclass(frozen=True)
class Caption:
    """The caption that one run gives a scene.

    pieces: its text in order; True marks the name of an object that is not in the scene.
    """

    run: str
    pieces: list[tuple[str, bool]]
    score: chair.CaptionScore

    @property
    def text(self) -> str:
        """The caption with invented objects between stars."""
        return "".join(f"*{text}*" if invented else text for text, invented in self.pieces)

    @property
    def summary(self) -> str:
        invented = ", ".join(dict.fromkeys(name for _, name in self.score.hallucinated))
        counts = self.score.counts
        return (
            f"invented: {invented or 'nothing'}; named {counts.gt_objects_recalled} of the "
            f"{counts.gt_objects} objects that are there"
        )


@dataclass(frozen=True)
class Scene:
    """One scene of the picture: its file, its objects, and the captions to compare."""

    split: str
    image: Path
    truth: list[str]
    captions: list[Caption]


def demo(out: Path, device: str | None = None) -> None:
    """Run (or resume) everything; print and write the table and the scenes.

    device: None for the accelerator of this machine, or the CPU.
    """
    chosen = [] if device is None else [f"device={device}"]
    configs = {name: config.load(CONFIGS / f"{name}.yaml", chosen) for name in RUNS}
    load = functools.cache(lambda: generate.load_model(configs["baseline"]))
    for name in RUNS:
        runner.run(configs[name], out / name, out / "scenes", lambda _: load())
    text = f"{table.markdown([out / name for name in RUNS])}{_changes(out)}\n{CAVEAT}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    scenes = sorted(_scenes(out), key=lambda scene: POCKET_SPLITS.index(scene.split))
    picture.draw(scenes, CHOICE, CAVEAT, out / "scenes.png")
    print(f"\n{text}\n{_as_text(scenes)}\n")
    print(f"{out} holds table.md, scenes.png and a folder for each run.")


def _changes(out: Path) -> str:
    """How many answers each run changed: a method that changed none did not act here."""
    stock = {row_key(row): row["answer"] for row in RunFolder(out / RUNS[0]).rows()}
    lines = []
    for name in RUNS[1:]:
        rows = RunFolder(out / name).rows()
        changed = sum(row["answer"] != stock[row_key(row)] for row in rows)
        lines.append(f"- {name}: {changed} of {len(rows)} answers differ from the baseline's\n")
    return "".join(lines)


def _scenes(out: Path) -> Iterator[Scene]:
    """The first scenes of each split whose captions differ and where one invents an object."""
    vocabulary = Vocabulary.load()
    patched = {row_key(row): row["answer"] for row in RunFolder(out / RUNS[-1]).rows()}
    taken = dict.fromkeys(POCKET_SPLITS, 0)
    for row in RunFolder(out / RUNS[0]).rows():
        split, other = row["split"], patched[row_key(row)]
        if row["task"] != "chair" or taken[split] == SHOWN or row["answer"] == other:
            continue
        captions = [
            caption("stock", row["answer"], row["truth"], vocabulary),
            caption("VAR + GIFT + VHR", other, row["truth"], vocabulary),
        ]
        if any(shown.score.hallucinated for shown in captions):
            taken[split] += 1
            image = out / "scenes" / split / "images" / row["image"]
            yield Scene(split, image, row["truth"], captions)


def caption(run: str, text: str, truth: Collection[str], vocabulary: Vocabulary) -> Caption:
    """The caption `text` scored against the objects in `truth`."""
    score = chair.judge(text, truth, vocabulary)
    pieces, start = [], 0
    for span in _invented(text, score, truth, vocabulary):
        pieces += [(text[start : span[0]], False), (text[span[0] : span[1]], True)]
        start = span[1]
    return Caption(run, [piece for piece in [*pieces, (text[start:], False)] if piece[0]], score)


def _invented(
    text: str, score: chair.CaptionScore, truth: Collection[str], vocabulary: Vocabulary
) -> Iterator[tuple[int, int]]:
    """Spans of `text` that name objects which are not in the scene.

    Mentions come in order, and each is one or two words long.
    """
    words = list(re.finditer(r"[\w'-]+", text))
    index = 0
    for word, name in score.mentions:
        size = 1 + word.count(" ")
        for first in range(index, len(words) - size + 1):
            start, end = words[first].start(), words[first + size - 1].end()
            if vocabulary.mentions(text[start:end]) == [(word, name)]:
                index = first + size
                if name not in truth:
                    yield start, end
                break


def _as_text(scenes: list[Scene]) -> str:
    """The scenes for the terminal."""
    lines = [f"{CHOICE} Between stars: not there."]
    for scene in scenes:
        lines += ["", f"{scene.image} ({scene.split})", f"  truth: {', '.join(scene.truth)}"]
        for shown in scene.captions:
            lines += [f"  {shown.run}: {shown.text}", f"    ({shown.summary})"]
    return "\n".join(lines)

"""python -m eval demo: the pocket model as it is, with VAR, GIFT or VHR, and with all three.

Leaves a run folder for each, `table.md` with every measure, and `scenes.png`, which shows a few
scenes with their captions. What is printed is at most twelve rows of the table.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from eval.benchmarks import chair
from eval.benchmarks.coco import Vocabulary
from eval.benchmarks.pope import STRATEGIES
from eval.reports import table
from eval.runs import config, generate, runner, workers
from eval.runs.folder import RunFolder, row_key
from eval.runs.samples import POCKET_SPLITS
from eval.runs.workers import Engine, answer_here
from eval.studies import picture
from eval.studies.picture import Caption, Scene
from eval.support import pages

CONFIGS = Path(__file__).parents[2] / "configs" / "pocket"
RUNS = ("baseline", "var", "gift", "vhr", "all")
PRINTED = (
    *(table.ALARM, "chair_s", "chair_i", "recall", "mean_tokens"),
    "pope_adversarial_accuracy",
)
"""The rows of each of the two splits that are printed."""
DOCUMENTED = (
    *("chair_s", "chair_i", "recall", "mean_tokens", "distinct_4gram_share"),
    *(f"pope_{strategy}_accuracy" for strategy in STRATEGIES),
)
"""The rows of each split that docs/results.md shows."""
SCENES = 2
CHOICE = (
    f"The first {SCENES} scenes of each split where the captions differ and one invents an object."
)
CAVEAT = (
    "The pocket model is a small model made for this project. These numbers show that the "
    "machinery works and what it does to this one model; they are no evidence about 7B models."
)


def demo(
    out: Path,
    device: str | None = None,
    every_row: bool = False,
    engine: Engine = answer_here,
    docs: bool = False,
) -> None:
    """Run (or resume) everything; write the table and the scenes, and print them.

    device: None for the accelerator of this machine, or the CPU
    every_row: print the whole table
    engine: what answers the batches
    docs: write the rows that documentation shows into docs/results.md
    """
    chosen = [] if device is None else [f"device={device}"]
    configs = {name: config.load(CONFIGS / f"{name}.yaml", chosen) for name in RUNS}
    load = workers.once(generate.load_model, engine)
    for name in RUNS:
        runner.run(configs[name], out / name, out / "scenes", load, engine=engine)
    whole, short = (_table(out, keys) for keys in (None, PRINTED))
    (out / "table.md").write_text(whole, encoding="utf-8")
    if docs:
        pages.write("results", "demo", _rows(out, DOCUMENTED))
    scenes = sorted(_scenes(out), key=lambda scene: POCKET_SPLITS.index(scene.split))
    picture.draw(scenes, CHOICE, CAVEAT, out / "scenes.png")
    print(f"\n{whole if every_row else short}\n{_as_text(scenes)}\n")
    rest = "" if every_row else " with every measure (also printed with --all)"
    print(f"{out} holds table.md{rest}, scenes.png and a folder for each run.")


def _table(out: Path, keys: Collection[str] | None) -> str:
    text = table.markdown([out / name for name in RUNS], keys)
    return f"{text}{_changes(out)}\n{CAVEAT}\n"


def _rows(out: Path, keys: Collection[str]) -> str:
    """The rows of these measures alone."""
    columns = table.read([out / name for name in RUNS])
    return table.layout(["split", "measure", *RUNS], table.lines(columns, keys))


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
        if row["task"] != "chair" or taken[split] == SCENES or row["answer"] == other:
            continue
        captions = [
            caption("stock", row["answer"], row["truth"], vocabulary),
            caption("VAR + GIFT + VHR", other, row["truth"], vocabulary),
        ]
        if any(invented for shown in captions for _, invented in shown.pieces):
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
    pieces = [piece for piece in [*pieces, (text[start:], False)] if piece[0]]
    return Caption(run, pieces, _summary(score))


def _summary(score: chair.CaptionScore) -> str:
    invented = ", ".join(dict.fromkeys(name for _, name in score.hallucinated))
    counts = score.counts
    return (
        f"invented: {invented or 'nothing'}; named {counts.gt_objects_recalled} of the "
        f"{counts.gt_objects} objects that are there"
    )


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

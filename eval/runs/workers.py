"""The part of a run that needs the model: this process's share of the answers, into the folder."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

import vlm_patch
from eval.runs import batches, jsonl
from eval.runs.batches import Asker, Batch, Found
from eval.runs.config import Config
from eval.runs.crew import Member
from eval.runs.samples import Sample, notice
from eval.runs.provenance import environment
from eval.errors import EvalError
from eval.runs.folder import RunFolder
from eval.runs.generate import Answer

OURS = (Path(vlm_patch.__file__).parent, Path(__file__).parents[1])
PAUSE = 0.5
"""Seconds between two looks at what the other processes have done."""

Load: TypeAlias = Callable[[Config], tuple[Any, Any]]


@dataclass(frozen=True)
class Desk:
    """One process's place in a run: one keeps the files of the run, the others write parts.

    `together`: several processes hold one model between them (tensor parallelism), so each goes
    through all batches, and only the first writes.
    """

    folder: RunFolder
    member: Member
    keeper: bool
    together: bool = False

    def write(self, found: Sequence[Found]) -> None:
        """Put down what came of some samples."""
        if self.together and not self.keeper:
            return
        said = [_line(sample, it) for sample, it in found if isinstance(it, Answer)]
        missed = [_skip(sample, it.reason) for sample, it in found if not isinstance(it, Answer)]
        for path, rows in ((self.folder.answers, said), (self.folder.skip_list, missed)):
            if rows:
                jsonl.append(self._own(path), rows)

    def _own(self, path: Path) -> Path:
        """The file of the run, unless another process keeps it, or has taken it over."""
        keeps = self.keeper and self.member.take(self.folder.answers.name)
        return path if keeps else self.folder.part(path, self.member.name)

    def shares(self, todo: Sequence[Batch], bar: Any) -> Iterator[Batch]:
        """The batches that fall to this process, until each sample is settled by somebody."""
        if self.together:
            for batch in todo:
                yield batch
                bar.update(len(batch))
            return
        while todo:
            taken = 0
            for batch in todo:
                if generation := self.member.take(batch.name):
                    taken += 1
                    # whoever had it before may have answered it, then died
                    known = self.folder.settled() if generation > 1 else ()
                    if mine := batch.without(known):
                        yield mine
                bar.update(min(len(batch), bar.total - bar.n))
            settled = self.folder.settled()
            todo = [rest for batch in todo if (rest := batch.without(settled))]
            if todo and not taken:
                time.sleep(PAUSE)


def answer(desk: Desk, config: Config, samples: Sequence[Sample], load: Load) -> None:
    """Answer what the folder lacks, together with whoever else is at work in it."""
    settled = desk.folder.settled(repair=desk.keeper)
    if len(settled) == len(samples):
        return
    if settled:
        out = desk.folder.path
        notice(f"{out}: {len(settled)} of {len(samples)} samples are answered, going on")
    if desk.keeper:
        desk.folder.metrics.unlink(missing_ok=True)
    elif not desk.together:
        notice(f"{desk.folder.path}: another process is at work there, doing a share of it")
    todo = [rest for batch in batches.divide(samples, config) if (rest := batch.without(settled))]
    model, processor = load(config)
    torch.manual_seed(config.seed)
    notes: list[str] = []
    with (
        _noting(notes),
        wrapped(model, processor, config) as patch,
        tqdm(
            desc=desk.folder.path.name,
            total=len(samples),
            initial=len(settled),
            unit=" answers",
            disable=not desk.keeper,
        ) as bar,
    ):
        asker = Asker(model, processor, config)
        try:
            for batch in desk.shares(todo, bar):
                for found in asker.answer(batch):
                    desk.write(found)
        finally:
            said = [] if patch is None else [patch.describe().splitlines()]
            made = {"environments": [environment(config)], "patches": said, "notes": notes}
            desk.folder.report(desk.member.name, made)


def wrapped(model: Any, processor: Any, config: Config) -> AbstractContextManager[Any]:
    """The model with the methods of the run on it; EvalError where they do not fit it."""
    methods = config.build_methods()
    if not methods:
        return nullcontext()
    try:
        patch: AbstractContextManager[Any] = vlm_patch.wrap(
            model, *methods, processor=processor, layers=config.layers, heads=config.heads
        )
    except (TypeError, ValueError) as error:
        raise EvalError(f"model {config.model} cannot be wrapped: {error}") from error
    return patch


@contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Warnings of this project are shown as notices and kept in `notes`, each once."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep(message: Any, category: Any, filename: str, *more: Any, **named: Any) -> None:
            if not any(Path(filename).is_relative_to(ours) for ours in OURS):
                show(message, category, filename, *more, **named)
            elif str(message) not in notes:
                notes.append(str(message))
                notice(f"note: {message}")

        warnings.showwarning = keep
        yield


def _line(sample: Sample, answer: Answer) -> dict[str, Any]:
    """One line of answers.jsonl."""
    shown = {"image": sample.image.name, "prompt": sample.prompt}
    said = {"answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
    return {**_asked(sample), **shown, **said, **sample.facts}


def _skip(sample: Sample, reason: str) -> dict[str, Any]:
    """One line of skipped.jsonl."""
    return {**_asked(sample), "image": sample.image.name, "reason": reason}


def _asked(sample: Sample) -> dict[str, Any]:
    return {"task": sample.task, "split": sample.split, "id": sample.id}

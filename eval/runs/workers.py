"""The part of a run that needs the model: batches in, answers out."""

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

import vlm_patch
from eval.errors import EvalError
from eval.runs.batches import Batch, BatchRunner, Outcome
from eval.runs.config import Config
from eval.runs.images import pixel_limit
from eval.runs.provenance import environment
from eval.runs.samples import notice

OURS = (Path(vlm_patch.__file__).parent, Path(__file__).parents[1])
Load: TypeAlias = Callable[[Config], tuple[Any, Any]]
Provenance: TypeAlias = Mapping[str, Sequence[Any]]
"""What config.yaml keeps of a worker: its `environments`, `patches`, and `notes` (warnings)."""
Answered: TypeAlias = tuple[list[Outcome], Provenance]
Answers: TypeAlias = Generator[Answered, None, None]
Engine: TypeAlias = Callable[[Sequence[Batch], Config, Load], Answers]
"""Answers batches, in any order; `answer_here` and `ray_engine.answer` are the two."""


@dataclass(frozen=True)
class Worker:
    """A loaded model with the methods of the run on it, and what is to be kept of both.

    runner: requests responses of the model
    patch: the handle of the methods, None without any
    provenance: what the run folder keeps; its notes grow while the worker is at work
    """

    runner: BatchRunner
    patch: Any
    provenance: Provenance

    def answer(self, batch: Batch) -> Answered:
        """What came of each sample of the batch, whichever batches were answered before."""
        torch.manual_seed(self.runner.config.seed)
        results = [it for part in self.runner.answer(batch) for it in part]
        # only now: a method may have inspected the model at its first prompt
        patches = [] if self.patch is None else [self.patch.describe().splitlines()]
        kept = {key: [*values] for key, values in self.provenance.items()}
        return results, {**kept, "patches": patches}


@contextmanager
def worker(config: Config, load: Load) -> Iterator[Worker]:
    """Load the model and keep the methods of the run on it until the end of the block."""
    model, processor = load(config)
    notes: list[str] = []
    with pixel_limit(config.max_pixels), _noting(notes), wrapped(model, processor, config) as patch:
        made: Provenance = {"environments": [environment(config)], "notes": notes}
        yield Worker(BatchRunner(model, processor, config), patch, made)


def answer_here(batches: Sequence[Batch], config: Config, load: Load) -> Answers:
    """The engine that loads the model into this process and answers one batch after another."""
    if not batches:  # more processes than batches
        return
    with worker(config, load) as own:
        for batch in batches:
            yield own.answer(batch)


def once(load: Load, engine: Engine) -> Load:
    """`load` for several runs on one model: here it is loaded at the first; engines with processes
    of their own load it at each."""
    loaded: list[tuple[Any, Any]] = []

    def first(config: Config) -> tuple[Any, Any]:
        if not loaded:
            loaded.append(load(config))
        return loaded[0]

    return first if engine is answer_here else load


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

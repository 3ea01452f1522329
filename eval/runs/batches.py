"""Samples divided into batches, and batches answered whatever happens to one of them.

The division depends on the samples and the batch size alone, so every process of a run, and every
later start of it, finds the same batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch

from eval.errors import EvalError
from eval.runs import generate
from eval.runs.config import Config
from eval.runs.generate import BrokenImageError
from eval.runs.images import pixel_count, pixel_limit
from eval.runs.samples import Sample, notice
from vlm_patch.models.chat import Response

PATCH = 28 * 28
"""Pixels behind one image token where their number depends on the picture (Qwen2-VL and later)."""

Outcome: TypeAlias = "tuple[Sample, Response | BrokenImageError]"


@dataclass(frozen=True)
class Batch:
    """The requests of one call of generate.

    groups: samples with one image and one prompt, which one request answers
    """

    groups: tuple[tuple[Sample, ...], ...]

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(chain(*self.groups))


def divide(samples: Sequence[Sample], config: Config) -> list[Batch]:
    """All samples in batches, task by task, those of like length together.

    Equal prompts on one image (yes/no questions that several splits share) are one request, and the
    answer goes to all of them.
    """
    same: dict[tuple[str, Path, str], list[Sample]] = {}
    for sample in samples:
        same.setdefault((sample.task, sample.image, sample.prompt), []).append(sample)
    with pixel_limit(config.max_pixels):
        pixels = {image: pixel_count(image) for image in {s.image for s in samples}}
    groups = [tuple(group) for group in same.values()]
    groups.sort(key=lambda group: _length(group[0], pixels))
    batches = []
    for benchmark in config.benchmarks:
        of_task = [group for group in groups if group[0].task == benchmark.name]
        for start in range(0, len(of_task), config.batch_size):
            batches.append(Batch(tuple(of_task[start : start + config.batch_size])))
    return batches


def _length(sample: Sample, pixels: Mapping[Path, int]) -> float:
    """About how many tokens image and prompt come to, so that little of a batch is padding."""
    return pixels[sample.image] / PATCH + len(sample.prompt) / 4


class BatchRunner:
    """Asks a model batch by batch; after an out-of-memory error with half as many at once."""

    def __init__(self, model: Any, processor: Any, config: Config) -> None:
        self.model, self.processor, self.config = model, processor, config
        self.at_once = config.batch_size

    def answer(self, batch: Batch) -> Iterator[list[Outcome]]:
        """What came of each sample, in as many parts as it takes: an answer, or a broken image.

        EvalError for a broken image if the configuration wants that, and for a single sample that
        does not fit into memory.
        """
        left = list(batch.groups)
        while left:
            groups = left[: self.at_once]
            if (results := self._fitting([group[0] for group in groups])) is None:
                continue
            yield [
                (sample, result)
                for group, result in zip(groups, results, strict=True)
                for sample in group
            ]
            left = left[len(groups) :]

    def _fitting(self, samples: Sequence[Sample]) -> list[Response | BrokenImageError] | None:
        """What came of these samples; None if they did not fit into memory together."""
        try:
            return self._readable(samples)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            self._halve(len(samples), str(error).partition("\n")[0])
        # only here, with the error gone, is nothing held that its frames held
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return None

    def _readable(self, samples: Sequence[Sample]) -> list[Response | BrokenImageError]:
        """The responses, with the error in the position of each sample whose image is broken."""
        broken: dict[tuple[str, ...], BrokenImageError] = {}
        limit = self.config.sections[samples[0].task].max_new_tokens
        while left := [sample for sample in samples if sample.key not in broken]:
            try:
                responses = iter(generate.ask(self.model, self.processor, left, limit))
            except BrokenImageError as error:
                if self.config.broken_images == "error":
                    raise
                broken[error.sample.key] = error
                notice(f"skipped: {error}")
                continue
            return [broken.get(sample.key) or next(responses) for sample in samples]
        return list(broken.values())

    def _halve(self, size: int, reason: str) -> None:
        if size == 1 or self.config.tp_plan is not None:
            raise EvalError(
                f"out of memory with {size} samples at once ({reason}); the answers so far are "
                f"kept: free memory, or choose a smaller max_new_tokens, dtype or batch_size"
            )
        self.at_once = size // 2
        notice(f"out of memory with {size} samples at once: resuming with {self.at_once}")


def _out_of_memory(error: Exception) -> bool:
    """The accelerator's error, Python's, or the one that torch raises on the CPU."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return known or any(word in str(error) for word in words)

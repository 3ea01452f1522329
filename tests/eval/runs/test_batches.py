"""Batches: how samples are divided, and what happens when one does not fit or has no image."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.errors import EvalError
from eval.runs import batches, generate
from eval.runs.batches import BatchRunner
from eval.runs.samples import Sample
from tests.eval.conftest import Settings
from vlm_patch.models import chat

PROMPTS = (
    "Is it ?",
    "Is there a dog ?",
    "What is on the table in the image ?",
    "Describe it all .",
)
CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: {}: you tried to"
Asked = list[list[str]]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """One sample a prompt, on images of one size."""
    paths = [tmp_path / f"{place}.png" for place in range(len(PROMPTS))]
    for path in paths:
        Image.new("RGB", (28, 28)).save(path)
    return [
        Sample("chair", "test", str(place), path, prompt, {})
        for place, (path, prompt) in enumerate(zip(paths, PROMPTS, strict=True))
    ]


def asking(
    monkeypatch: pytest.MonkeyPatch, fits: Callable[[list[Sample]], Exception | None]
) -> Asked:
    """Put a stand-in in the model's place that fails where `fits` says how; returns what it saw."""
    asked: Asked = []

    def ask(_model: Any, _processor: Any, batch: list[Sample], limit: int) -> list[Any]:
        asked.append([sample.id for sample in batch])
        if error := fits(batch):
            raise error
        return [chat.Response(f"{sample.prompt} {limit}", 1, True) for sample in batch]

    monkeypatch.setattr(generate, "ask", ask)
    return asked


def told(runner: BatchRunner, samples: list[Sample]) -> dict[str, str]:
    divided = batches.divide(samples, runner.config)
    found = [it for batch in divided for part in runner.answer(batch) for it in part]
    assert len(found) == len(samples), "each sample once"
    return {sample.id: getattr(said, "text", "broken") for sample, said in found}


def test_an_equal_prompt_on_an_image_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, samples: list[Sample]
) -> None:
    asked = asking(monkeypatch, lambda _: None)
    first, second, *_ = samples
    again = replace(first, id="again")
    question = replace(first, task="pope", id="question")
    runner = BatchRunner(None, None, settings(batch_size=1))
    assert told(runner, [second, first, again, question]) == {
        "0": f"{PROMPTS[0]} 6",
        "again": f"{PROMPTS[0]} 6",
        "1": f"{PROMPTS[1]} 6",
        "question": f"{PROMPTS[0]} 2",
    }
    assert asked == [["0"], ["1"], ["question"]]


def test_what_is_of_like_length_is_asked_together(
    settings: Settings, samples: list[Sample], tmp_path: Path
) -> None:
    """By prompt where pictures are of one size; a large picture outweighs a long prompt."""
    large = replace(samples[0], id="large", image=tmp_path / "large.png")
    Image.new("RGB", (560, 560)).save(large.image)
    lost = replace(samples[0], id="lost", image=tmp_path / "none.png")
    divided = batches.divide([large, *samples[::-1], lost], settings(batch_size=2))
    ids = [[group[0].id for group in batch.groups] for batch in divided]
    assert ids == [["lost", "0"], ["1", "3"], ["2", "large"]]


def test_batches_are_the_same_for_every_process(settings: Settings, samples: list[Sample]) -> None:
    one, two = batches.divide(samples, settings(batch_size=2))
    assert [one, two] == batches.divide(samples[::-1], settings(batch_size=2, seed=3))
    assert {sample.key for sample in (*one.samples, *two.samples)} == {s.key for s in samples}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 1 GiB"),
        RuntimeError(CPU_ERROR.format("not enough memory")),
        RuntimeError(CPU_ERROR.format("can't allocate memory")),
        MemoryError(),
    ],
    ids=["accelerator", "cpu, windows", "cpu, linux", "python"],
)
def test_a_batch_that_does_not_fit_is_halved_from_there_on(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    samples: list[Sample],
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = asking(monkeypatch, lambda batch: error if len(batch) > 2 else None)
    more = [replace(sample, split="more", id=f"m{sample.id}") for sample in samples]
    more = [replace(s, prompt=f"{s.prompt} {'very ' * 90}") for s in more]
    runner = BatchRunner(None, None, settings(batch_size=4))
    said = told(runner, [*samples, *more])
    assert said == {sample.id: f"{sample.prompt} 6" for sample in [*samples, *more]}
    sizes = [len(ids) for ids in asked]
    assert sizes == [4, 2, 2, 2, 2], "tried whole once, then by two, also in the next batch"
    assert "out of memory with 4 samples at once: resuming with 2" in capsys.readouterr().err


def test_a_single_sample_that_does_not_fit_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, samples: list[Sample]
) -> None:
    asked = asking(monkeypatch, lambda _: torch.OutOfMemoryError("tried to allocate 1 GiB"))
    with pytest.raises(EvalError, match=r"out of memory with 1 samples .*tried to .*free memory"):
        told(BatchRunner(None, None, settings()), samples)
    assert [len(ids) for ids in asked] == [4, 2, 1]


def test_processes_that_hold_one_model_together_do_not_halve_apart(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, samples: list[Sample]
) -> None:
    asking(monkeypatch, lambda _: torch.OutOfMemoryError("tried to allocate 1 GiB"))
    with pytest.raises(EvalError, match="out of memory with 4 samples at once"):
        told(BatchRunner(None, None, settings(device=None, tp_plan="auto")), samples)


def test_other_errors_of_the_model_are_not_taken_for_memory(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, samples: list[Sample]
) -> None:
    asking(monkeypatch, lambda _: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        told(BatchRunner(None, None, settings()), samples)


def test_a_broken_image_takes_no_other_sample_with_it(
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    samples: list[Sample],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fits(batch: list[Sample]) -> Exception | None:
        for sample in batch:
            try:
                generate.open_image(sample)
            except generate.BrokenImageError as error:
                return error
        return None

    asking(monkeypatch, fits)
    samples[1].image.write_bytes(samples[1].image.read_bytes()[:40])
    samples[3].image.unlink()
    said = told(BatchRunner(None, None, settings()), samples)
    assert said == {"0": f"{PROMPTS[0]} 6", "2": f"{PROMPTS[2]} 6", "1": "broken", "3": "broken"}
    shown = capsys.readouterr().err
    assert "skipped: sample chair test 1: " in shown
    assert "skipped: sample chair test 3: no such image: " in shown
    with pytest.raises(EvalError, match=r"sample chair test 1: .*1\.png is not a readable image"):
        told(BatchRunner(None, None, settings(broken_images="error")), samples)
    for sample in samples:
        sample.image.unlink(missing_ok=True)
    assert set(told(BatchRunner(None, None, settings()), samples).values()) == {"broken"}

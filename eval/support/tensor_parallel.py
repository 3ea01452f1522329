"""A planted LLaVA, split over two processes under torchrun, beside the reference.

As a program it is one of the processes: it reads the model and the jobs from a folder, and leaves
there what came out.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor

import vlm_patch
from eval.support import tiny
from eval.support.agreement import answer_logits, distance, ours
from vlm_patch import VAR
from vlm_patch.primitives.sink_rules import SinkChannels

STEPS = 6
Job: TypeAlias = tuple[Sequence[str], Mapping[str, Tensor] | None]
"""Methods, and the tables `[layers, heads]` of the heads that are on, or None."""


def errors(jobs: Mapping[str, Job]) -> dict[str, float]:
    """How far every job is from the reference in two processes, each with half of the heads; and,
    under "search for sinks", how far what VAR looks at there is from what one process sees.
    """
    model = tiny.plant(tiny.llava(kv_heads=2))
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.save(dict(jobs), Path(folder) / "jobs.pt")
        run(Path(folder))
        results, twin = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(2))
    found = {"search for sinks": apart(results.pop("search"), search(model, batch))}
    for name, (names, heads) in jobs.items():
        new, logits = results[name]
        assert torch.equal(new, twin[name][0])
        expected = answer_logits(model, tiny.samples(model, batch, new), names, heads)
        found[name] = apart([logits, logits], [expected, twin[name][1]])
    return found


def apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return max(distance(one, other) for one, other in pairs)


def search(model: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Block inputs, attention and value-path norms by which VAR looks for sinks."""
    kept: list[Tensor] = []

    def judge(*seen: Tensor) -> SinkChannels:
        kept.extend(seen[:3])
        return SinkChannels(())

    with mock.patch("vlm_patch.primitives.sinks.judge", judge), vlm_patch.wrap(model, VAR()):
        model(**batch)
    return kept


def run(folder: Path) -> None:
    """Two processes under torchrun; raises RuntimeError with what they wrote if one fails."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*launch, "-m", __name__, str(folder)], capture_output=True, text=True, timeout=300
    )
    if ended.returncode:
        raise RuntimeError(ended.stderr)


def work(folder: Path) -> None:
    """One process."""
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, tp_plan="auto")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    results: dict[str, Any] = {"search": search(model, batch)}
    for name, (names, heads) in torch.load(folder / "jobs.pt").items():
        with vlm_patch.wrap(model, *ours(names), heads=heads):
            output = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                return_dict_in_generate=True,
                output_logits=True,
            )
        new = output.sequences[:, batch["input_ids"].shape[1] :]
        results[name] = new, torch.stack(output.logits, 1)
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo may still run, and the interpreter's end would trip over them


if __name__ == "__main__":
    work(Path(sys.argv[1]))

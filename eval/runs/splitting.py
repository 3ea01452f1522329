"""The processes of `accelerate launch`, and which batches each of them answers."""

import atexit
import functools
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import PartialState

from eval.runs.batches import Batch
from eval.runs.config import Config

WAIT = timedelta(days=30)
"""How long processes wait for each other: the first is done hours before the last, maybe."""


@functools.cache
def processes() -> PartialState:
    """The processes that were launched together, this one alone without a launcher."""
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=WAIT)
    atexit.register(state.destroy_process_group)
    return state


def share(batches: Sequence[Batch], config: Config) -> Sequence[Batch]:
    """The batches of this process; all of them where the processes hold one model together.

    Batches are dealt out like cards: they come sorted by task and length, and the contiguous shares
    of `split_between_processes` would give all long answers to one process. Whole batches, not
    samples, since the padding of a batch must not depend on the number of processes.
    """
    if config.tp_plan is not None:
        return batches
    return batches[processes().process_index :: processes().num_processes]

"""Peak memory of a prefill above the model.

On CUDA torch counts it. On a CPU each side runs in a fresh process, whose peak resident set is read
before and after: the first process imports everything, the others are forked from it. There every
larger block is mapped by itself where the C library has a setting for it: otherwise the memory that
it keeps for later would count, up to 40 MB more or less.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import sys
from collections.abc import Iterator, Sequence

import torch

from eval.speed.shapes import SHAPES
from eval.speed.sides import sides

MEGABYTE = 2**20
M_MMAP_THRESHOLD = -3
MAPPED = 2**16
"""Bytes from which on a block is mapped by itself."""
SMALL = 96
"""Keys of a first prompt, so that what is loaded late is there before the memory is read."""


def peaks(
    shape: str, pairs: Sequence[tuple[str, str]], device: torch.device, threads: int
) -> Iterator[float]:
    """Megabytes that a prefill of `shape` takes above the model, for each (kind, method)."""
    jobs = [(shape, kind, method, threads) for kind, method in pairs]
    if device.type == "cuda":
        for _, kind, method, _ in jobs:
            yield _on_cuda(shape, kind, method, device)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for job in jobs:
            yield pool.apply(on_cpu, job)


def on_cpu(shape: str, kind: str, method: str, threads: int) -> float:
    """The growth of this process' peak resident set; run in a process of its own."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
    torch.set_num_threads(threads)
    spec = SHAPES[shape]
    loaded = spec.load(torch.device("cpu"))
    small = spec.make_prompt(loaded, 1).cut(SMALL)
    with sides(loaded, small, [("stock", "")]) as compared:
        compared[0].prefill()
    with sides(loaded, spec.make_prompt(loaded, 1), [(kind, method)]) as compared:
        before = _peak()
        compared[0].prefill()
        return _peak() - before


def _peak() -> float:
    """The peak resident set of this process so far; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


def _on_cuda(shape: str, kind: str, method: str, device: torch.device) -> float:
    """The second prompt's peak: the first one leaves behind what is made once."""
    spec = SHAPES[shape]
    loaded = spec.load(device)
    prompt = spec.make_prompt(loaded, 1)
    before = torch.cuda.memory_allocated(device)
    with sides(loaded, prompt, [(kind, method)]) as (side,):
        side.prefill()
        side.decode(1)
        side.cache = side.logits = None
        torch.cuda.reset_peak_memory_stats(device)
        side.prefill()
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE

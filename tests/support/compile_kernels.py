"""Compiles every variant of the Triton kernels to machine code for two cards, without one at hand;
run by `test_kernel_rows.py` in a process of its own, since Triton's interpreter is chosen at its
import. Prints the registers that spill.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_patch.engine.kernels import attend
from vlm_patch.methods import gift, var

CARDS = {"A100": 80, "H100": 90}
FLOATS = {"scaling", "softcap", "number", "n0", "n1", "n2", "p0", "p1", "p2"}
MODEL = {"query", "key", "value", "output", "hidden"}
BYTES = {"mask", "picked", "on", "on_more", "image"}
STRIDED = re.compile("query_|key_|value_|output_")
LLAVA = {"KV": 32, "SHARED": 1, "D": 128, "DW": 128, "V": 128, "VW": 128, "N": 64}
QWEN = {**LLAVA, "KV": 4, "SHARED": 7}


def kind(name: str, half: str) -> str:
    """The type of an argument, as Triton writes it."""
    if name in MODEL:
        return f"*{half}"
    if name in BYTES:
        return "*u8"
    if name in FLOATS:
        return "fp32"
    pointers = {"groups": "*fp32", "more": "*fp32", "partial": "*fp32", "gain": "*fp32"}
    return {**pointers, "given": "*fp32", "arrived": "*i32", "indices": "*i64"}.get(name, "i32")

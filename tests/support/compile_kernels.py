"""Compiles every Triton kernel to machine code for two cards, without one at hand; run by
`test_fused.py` in a process of its own, since Triton's interpreter is chosen at its import.
"""

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_patch.primitives import kernels

CARDS = {"A100": 80, "H100": 90}
FLOATS = {"scaling", "softcap", "tau", "move_fraction", "rho_nonsink", "min_image_mass", "beta"}
HALF = {"query", "key", "value", "output", "hidden"}
POINTERS = {"groups", "scores", "stats", "masses", "shares", "column"}
ROW = {"GROUPS": 4, "BLOCK": 64, "SIZE": 128, "WIDTH": 128}
KERNELS: Mapping[str, Mapping[str, Any]] = {
    "row_masses": {**ROW, "MASKED": True, "CAPPED": True},
    "row_output": ROW,
    "sink_column": {"BLOCK": 1024, "COUNT": 2},
    "sink_shares": {"HEADS": 32},
    "gaze_shares": {"HEADS": 32},
}


def kind(name: str) -> str:
    """The type of an argument, as Triton writes it."""
    if name in HALF:
        return "*bf16"
    if name in POINTERS:
        return "*fp32"
    return {"mask": "*u8", "dims": "*i64"}.get(name, "fp32" if name in FLOATS else "i32")


def main() -> None:
    for name, constants in KERNELS.items():
        kernel = getattr(kernels, name)
        types = {n: "constexpr" if n in constants else kind(n) for n in kernel.arg_names}
        for card, capability in CARDS.items():
            source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants))
            code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
            print(name, card, code[:4] == b"\x7fELF")


if __name__ == "__main__":
    main()

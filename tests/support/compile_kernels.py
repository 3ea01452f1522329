"""Compiles every variant of the Triton kernels to machine code for two cards, without one at hand;
run by `test_kernel_rows.py` in a process of its own, since Triton's interpreter is chosen at its
import. Prints the registers that spill.
"""

import re
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_patch.engine.kernels import attend
from vlm_patch.methods import gift, var, vhr

CARDS = {"A100": 80, "H100": 90}
FLOATS = {"alpha", "scaling", "softcap", "number", "n0", "n1", "n2", "p0", "p1", "p2"}
MODEL = {"query", "key", "value", "output", "hidden", "with_image", "text_only"}
BYTES = {"seen", "mask", "picked", "on", "on_more", "image"}
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


def variants() -> Iterator[tuple[str, Any, str, dict[str, Any], int]]:
    """Kernels with their constants, by what they are, and the number of warps."""
    off = dict.fromkeys(("MASKED", "CAUSAL", "CAPPED", "PICKED", "SWITCHED", "GAIN"), False)
    row = {**LLAVA, **off, "LINES": 4, "FORMULA": None, "COLUMN": None, "SLOT": 0, "M": 16}
    row |= {"SPLITS": 4, "WIDTH": 4096, "COUNT": 2, "PRECISION": "tf32", "WIDE": False}
    local = {"FORMULA": var.sink_shares_of_a_row}
    new = {"COLUMN": var.sink_groups}
    prompt = {"M": 64, "SPLITS": 1, "PICKED": True}
    exact = {"PRECISION": "ieee", "N": 32}
    grouped = {"KV": 4, "SHARED": 7, "M": 32}
    every = dict.fromkeys(("MASKED", "CAPPED", "SWITCHED", "GAIN"), True)
    both = {"LINES": 16, "SPLITS": 4}
    looks: dict[str, tuple[str, dict[str, Any]]] = {
        "var": ("bf16", {**local, **new}),
        "var, fp16": ("fp16", {**local, **new}),
        "var, fp32": ("fp32", {**local, **new, **exact}),
        "var, grouped, everything": ("bf16", {**local, **new, **grouped, **every}),
        "var, prompt": ("bf16", {**local, **prompt, "CAUSAL": True}),
        "var, prompt, grouped, masked": ("bf16", {**local, **prompt, **grouped, **every, "M": 64}),
        "var, prompt, fp32": ("fp32", {**local, **prompt, **exact, "CAUSAL": True, "M": 32}),
        "gift": ("bf16", {}),
        "gift, prompt": ("bf16", {**prompt, "CAUSAL": True, "M": 16, "SPLITS": 4}),
        "var and gift": ("bf16", {**both, **new}),
        "gift and var, grouped, masked": (
            "bf16",
            {**both, **grouped, **new, **every, "SLOT": 1, "M": 64},
        ),
    }
    for name, (half, look) in looks.items():
        made = {**row, **look}
        large = made["M"] > 16 and (half == "fp32" or made["MASKED"])
        yield name, attend.attend, half, made, 8 if large else 4
    keep = ("LINES", "KV", "SHARED", "V", "VW", "M", "SPLITS", "PICKED")
    gaze = {"FORMULA": gift.gaze_shares_of_a_row, "SECOND": gift.gaze_shares_of_a_row}
    end = {name: row[name] for name in keep} | {"HEADS": 32, "HW": 32, "GAIN": False}
    end |= {"SWITCHED": False, "SWITCHED_MORE": False, **gaze}
    two = {"LINES": 16, "FORMULA": var.sink_shares_of_a_row, "PICKED": True, "GAIN": True}
    two |= {"SWITCHED": True, "SWITCHED_MORE": True}
    given = {"FORMULA": None, "SECOND": None}
    for name, look in {"gift": {}, "var and gift": two, "given": given}.items():
        yield f"finish, {name}", attend.finish, "bf16", {**end, **look}, 2
    choice = {"HEADS": 32, "HW": 32, "D": 128, "DW": 128}
    choice |= dict.fromkeys(("SQUARED", "FILTER", "GUARDED"), True)
    yield "vhr", vhr.reinforced_heads, "bf16", choice, 4
    yield "columns", attend.columns, "bf16", {**new, "WIDTH": 4096, "COUNT": 2}, 8


def compiled(kernel: Any, half: str, constants: dict[str, Any], warps: int, card: int) -> Any:
    types = {n: "constexpr" if n in constants else kind(n, half) for n in kernel.arg_names}
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    even = [n for n in types if types[n] == f"*{half}" or (STRIDED.match(n) and types[n] == "i32")]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in even},
    )
    options = {"num_warps": warps, "num_stages": 2 if half == "fp32" else 3}
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def main() -> None:
    for name, kernel, half, constants, warps in variants():
        for card, capability in CARDS.items():
            made = compiled(kernel, half, constants, warps, capability)
            code, shared = made.asm["cubin"], made.metadata.shared
            print(name, card, code[:4] == b"\x7fELF", shared, sep="|", flush=True)


if __name__ == "__main__":
    main()

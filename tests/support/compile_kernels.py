"""Compiles the Triton kernels to machine code for two cards, without one at hand: every branch of
them; run by `test_kernel_rows.py` in a process of its own, since Triton's interpreter is chosen at
its import. Prints the shared memory that they take.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
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
    exact = {"PRECISION": "ieee", "N": 32, "M": 32}
    grouped = {"KV": 4, "SHARED": 7}
    every = dict.fromkeys(("MASKED", "CAPPED", "SWITCHED", "GAIN"), True)
    both = {"LINES": 16, **new}
    looks: dict[str, tuple[str, dict[str, Any]]] = {
        "var, grouped, everything": ("bf16", {**local, **new, **grouped, **every, "M": 32}),
        "var, prompt": ("bf16", {**local, **prompt, "CAUSAL": True}),
        "var, prompt, fp32": ("fp32", {**local, **prompt, **exact, "CAUSAL": True}),
        "var and gift, fp16": ("fp16", both),
        "gift and var, grouped, masked": (
            "bf16",
            {**both, **grouped, **every, "SLOT": 1, "M": 64},
        ),
    }
    for name, (half, look) in looks.items():
        made = {**row, **look}
        wide = made["M"] > 32 and (made["MASKED"] or made["SHARED"] > 1)
        yield name, attend.attend, half, made, 8 if wide or half == "fp32" else 4
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


def line(variant: tuple[str, Any, str, dict[str, Any], int], card: str) -> str:
    name, *parts = variant
    made = compiled(*parts, CARDS[card])
    is_code = made.asm["cubin"][:4] == b"\x7fELF"
    return f"{name}|{card}|{is_code}|{made.metadata.shared}"


def main() -> None:
    with ThreadPoolExecutor(2) as pool:  # LLVM and ptxas run without Python's lock
        for made in pool.map(lambda both: line(*both), product(variants(), CARDS)):
            print(made, flush=True)


if __name__ == "__main__":
    main()

"""Which heads a method acts on: one boolean table `[layers, heads]`, in several spellings."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import SupportsIndex, TypeAlias

import torch
from torch import Tensor

HeadSpec: TypeAlias = "str | Tensor | Mapping[int, Iterable[int] | str]"
LayerSpec: TypeAlias = "str | int | Iterable[int]"


@torch.inference_mode(False)  # what is written to an inference tensor could not be noticed
def parse(spec: HeadSpec, layers: int, heads: int) -> Tensor:
    """A bool table `[layers, heads]` from any spelling.

    `"all"`; a bool table; a mapping `{12: [0, 3], 14: "*"}`; or text `"12:0,3; 14-20:*"` (a part
    without a colon means every head of those layers). Ranges are inclusive. Raises ValueError.
    """
    if isinstance(spec, Tensor):
        if spec.dtype != torch.bool or spec.shape != (layers, heads):
            raise ValueError(
                f"head table: found {spec.dtype} of shape {tuple(spec.shape)}, "
                f"expected torch.bool of shape ({layers}, {heads}) for this model"
            )
        return spec.clone().cpu()
    if isinstance(spec, str) and spec.strip() == "all":
        return torch.ones(layers, heads, dtype=torch.bool)
    table = torch.zeros(layers, heads, dtype=torch.bool)
    for layer_part, head_part in _parts(spec):
        rows = numbers(layer_part, layers, "layer")
        columns = numbers(head_part, heads, "head")
        table[torch.tensor(rows)[:, None], torch.tensor(columns)[None, :]] = True
    return table


def _parts(spec: str | Mapping[int, Iterable[int] | str]) -> list[tuple[LayerSpec, LayerSpec]]:
    if isinstance(spec, Mapping):
        return list(spec.items())
    if not isinstance(spec, str):
        raise ValueError(
            f'heads: found {spec!r}, expected "all", a bool table, a mapping {{layer: heads}} '
            'or text such as "12:0,3; 14-20:*"'
        )
    parts = [part for part in spec.split(";") if part.strip()]
    if not parts:
        raise ValueError('heads: found an empty text, expected for example "12:0,3; 14-20:*"')
    split = [part.partition(":") for part in parts]
    return [(layer, head if colon else "*") for layer, colon, head in split]


def numbers(spec: LayerSpec, size: int, what: str) -> list[int]:
    """Sorted indices below `size` from `3`, `[0, 3]`, `"0,3"`, `"4-7"` or `"*"`. Raises "
    "ValueError."""
    result = _text_numbers(spec, size, what) if isinstance(spec, str) else _int_numbers(spec, what)
    wrong = [n for n in result if not 0 <= n < size]
    if wrong:
        raise ValueError(
            f"{what} {wrong[0]} is out of range: this model has {size} {what}s, 0 to {size - 1}"
        )
    if not result:
        raise ValueError(f"no {what} given: expected at least one of 0 to {size - 1}")
    return sorted(set(result))


def _int_numbers(spec: int | Iterable[int], what: str) -> list[int]:
    items = list(spec) if isinstance(spec, Iterable) else [spec]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, SupportsIndex):
            raise ValueError(f"{what}: found {item!r}, expected integers")
    return [operator.index(item) for item in items]


def _text_numbers(text: str, size: int, what: str) -> list[int]:
    result: list[int] = []
    for piece in text.split(","):
        first, dash, last = (part.strip() for part in piece.partition("-"))
        if first == "*" and not dash:
            result += range(size)
        elif first.isdigit() and (last.isdigit() or not dash):
            result += range(int(first), int(last if dash else first) + 1)
        else:
            raise ValueError(
                f'{what}: found {piece.strip()!r}, expected a number, a range "4-7" or "*"'
            )
    return result


class HeadTables(Mapping[str, Tensor]):
    """A live bool table `[layers, heads]` for each of the methods `names`; takes every spelling."""

    def __init__(self, names: Iterable[str], layers: int, heads: int) -> None:
        self.layers, self.heads = layers, heads
        off = torch.zeros(layers, heads, dtype=torch.bool)
        self._tables = {name: parse(off, layers, heads) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        self._check(name)
        return self._tables[name]

    def __setitem__(self, name: str, spec: HeadSpec) -> None:
        self._check(name)
        self._tables[name] = parse(spec, self.layers, self.heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __repr__(self) -> str:
        return repr(self._tables)

    def _check(self, name: str) -> None:
        if name not in self._tables:
            raise KeyError(f"no method {name!r} on this patch, only {list(self)}")


def by_method(
    specs: HeadSpec | Mapping[str, HeadSpec] | None, names: list[str]
) -> dict[str, HeadSpec | None]:
    """One spelling per method, from one for all or a mapping by name. Raises ValueError."""
    if not isinstance(specs, Mapping) or not any(isinstance(key, str) for key in specs):
        return dict.fromkeys(names, specs)  # type: ignore[arg-type]
    strange = [key for key in specs if key not in names]
    if strange:
        raise ValueError(f"heads: found {strange[0]!r}, expected methods of this patch: {names}")
    return {name: specs.get(name) for name in names}  # type: ignore[call-overload]


def text(layers: list[int]) -> str:
    """Ranges as a person writes them: [1, 18, 19, 20] is "1, 18-20"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"

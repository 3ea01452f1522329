"""What `--model_args` says. Commas separate arguments there, so a list is written with +:
`methods=var+gift,gift.alpha=4,gift.layers=8-14+16,heads=12:0+3;14-20:*`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_patch.method import Method
from vlm_patch.methods.registry import METHODS, find

BASELINE = "baseline"


def build_methods(text: str | None, options: Mapping[str, Any]) -> list[Method]:
    """The methods in `text` ("var+gift", also import paths; "baseline" for none) with `options`
    such as `gift.alpha`.

    Raises ValueError for a missing or unknown name, and for an option that no method takes.
    """
    if not text:
        raise ValueError(
            f"methods is missing: expected {BASELINE} (the stock model) or names of "
            f"{list(METHODS)}, as in methods=var+gift"
        )
    names = [] if text == BASELINE else [name.strip() for name in text.split("+")]
    kinds = {kind.name: kind for kind in map(find, names)}
    sections: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    known = {f"{n}.{entry}": hint for n, kind in kinds.items() for entry, hint in _types(kind)}
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"unknown model argument {key!r}: the options of the methods that run are "
                f"{', '.join(known) or 'none'}"
            )
        name, _, entry = key.partition(".")
        sections[name][entry] = _as(known[key], key, value)
    return [find(name)(**sections[find(name).name]) for name in names]


def _types(kind: type[Method]) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    entries = dataclasses.fields(kind)  # type: ignore[arg-type]
    return [(entry.name, hints[entry.name]) for entry in entries if entry.init]


def _as(hint: Any, key: str, value: Any) -> Any:
    """`value` as the type `hint` says where that is a list of integers, else as it is."""
    kinds = typing.get_args(hint)
    if Sequence[int] not in kinds or (int in kinds and isinstance(value, int)):
        return value
    return _numbers(key, value)


def _numbers(key: str, value: Any) -> tuple[int, ...]:
    """Integers from text such as "8-14+16", ranges inclusive. Raises ValueError."""
    result: list[int] = []
    for part in str(value).split("+"):
        first, dash, last = part.partition("-")
        if not first.isdigit() or not (last.isdigit() or not dash):
            raise ValueError(f"{key}: found {part!r}, expected integers and ranges, as in 8-14+16")
        result += range(int(first), int(last if dash else first) + 1)
    return tuple(result)


def listed(value: Any) -> str | None:
    """Layers or heads with + for a comma, as `wrap` reads them; None stays None."""
    return None if value is None else str(value).replace("+", ",")


def whole(name: str, value: Any) -> int:
    """`value` as an integer of at least 1. Raises ValueError."""
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"{name}: found {value!r}, expected an integer of at least 1")
    return int(value)

"""The methods by name, and their defaults for a model."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from vlm_patch import heads
from vlm_patch.errors import UnsupportedModelError
from vlm_patch.method import Facts, Method
from vlm_patch.methods.gift import GIFT
from vlm_patch.methods.paint import PAINT
from vlm_patch.methods.var import VAR
from vlm_patch.methods.vhr import VHR
from vlm_patch.models.info import Decoder

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (VAR, GIFT, VHR, PAINT)}


def instances(methods: Sequence[Method | str]) -> list[Method]:
    """Methods from instances and names. Raises ValueError for none, unknown ones and doubles."""
    if not methods:
        raise ValueError("no method given: expected for example wrap(model, VAR(), VHR())")
    found = [_instance(method) for method in methods]
    names = [method.name for method in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"{sorted(twice)[0]} was given twice: one instance of each method is enough"
        )
    return found


def _instance(method: Any) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(unknown(method, list(METHODS)))
        return METHODS[method]()
    if isinstance(method, Method):
        return method
    hint = f"write {method.__name__}()" if isinstance(method, type) else "pass one such as VAR()"
    raise ValueError(f"found {method!r} as a method: {hint}, or a name of {list(METHODS)}")


def unknown(name: str, known: Sequence[str]) -> str:
    """The message for a method name that is not known."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown method {name!r}: expected one of {list(known)}{hint}"


def fit(methods: Sequence[Method], decoder: Decoder) -> list[Method]:
    """The methods with every default filled in; what had to be scaled is said in one warning.

    Raises UnsupportedModelError for a method that would be wrong on this model.
    """
    fitted, notes = [], []
    for method in methods:
        if method.name in decoder.special.refused:
            raise UnsupportedModelError(
                f"{method.name} is not supported on this model: "
                f"{decoder.special.refused[method.name]}"
            )
        profile = decoder.profile.get(method.name, {})
        ready, scaled = method.fit(
            Facts(decoder.depth, decoder.width, decoder.heads, profile, decoder.softmax)
        )
        fitted.append(ready)
        notes += scaled
    if notes:
        warnings.warn(
            f"no published settings for a {decoder.kind} of {decoder.depth} layers and width "
            f"{decoder.width}; scaled from other models: {', '.join(notes)}. Pass your own to "
            "silence this.",
            stacklevel=4,
        )
    return fitted


def values(method: Method) -> str:
    """A method with its values, as a user would write it."""
    shown = []
    for entry in fields(method):  # type: ignore[arg-type]
        if not entry.init:
            continue
        value = getattr(method, entry.name)
        if isinstance(value, Tensor):
            value = f"mask {tuple(value.shape)}"
        elif entry.name == "layers":
            value = heads.text(list(value))
        shown.append(f"{entry.name}={value}")
    return f"{type(method).__name__}({', '.join(shown)})"

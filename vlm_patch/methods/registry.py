"""Methods by name or import path, and their defaults for a model."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from vlm_patch import heads, methods
from vlm_patch.errors import UnsupportedModelError
from vlm_patch.method import Method, ModelInfo
from vlm_patch.models.info import Decoder

PATH = "my_package.my_file:MyMethod"


def _classes(module: Any) -> dict[str, type[Method]]:
    """The methods among the names of a module."""
    result = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name: kind for name, kind in result.items() if issubclass(kind, Method)}


METHODS: Mapping[str, type[Method]] = {kind.name: kind for kind in _classes(methods).values()}
"""The library's own, by name."""


def find(name: str) -> type[Method]:
    """The class of a method by its name, or by the import path of one of your own.

    Raises ValueError for what is not there or is no method.

        find("var")
        find("my_package.my_file:MyMethod")
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        raise ValueError(unknown(name, list(METHODS)))
    path, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(
            f"method {name!r}: cannot import {path!r} ({error}); expected {PATH!r}, of a module "
            "that Python finds, such as a file in the folder it was started in"
        ) from error
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type) or not issubclass(kind, Method):
        raise ValueError(f"method {name!r}: {_not_there(module, class_name, kind)}")
    _check(name, kind)
    if not hasattr(kind, "__dataclass_fields__"):
        raise ValueError(f"method {name!r} is no dataclass: write @dataclass(frozen=True) above it")
    return kind


def _not_there(module: Any, class_name: str, result: Any) -> str:
    """Why a module has no such method, in words."""
    there = [one for one, kind in _classes(module).items() if kind.__module__ == module.__name__]
    near = difflib.get_close_matches(class_name, there, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    what = f"{result!r} is no subclass of vlm_patch.Method" if result is not None else "not there"
    return f"{what}; {module.__name__} defines the methods {there}{hint}"


def _check(path: str, kind: type[Method]) -> None:
    """Raises ValueError for a class that cannot be used as a method."""
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"method {path!r}: found name = {name!r}, expected a word for configs and head tables, "
            'such as name: ClassVar[str] = "my_method"'
        )


def instances(methods: Sequence[Method | str]) -> list[Method]:
    """Methods from instances, names and import paths. Raises ValueError for none, unknown ones and
    doubles.
    """
    if not methods:
        raise ValueError("no method given: expected for example wrap(model, VAR(), VHR())")
    result = [_instance(method) for method in methods]
    names = [method.name for method in result]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"{sorted(twice)[0]} was given twice: one instance of each method is enough"
        )
    return result


def _instance(method: Any) -> Method:
    if isinstance(method, str):
        return find(method)()
    if isinstance(method, Method):
        _check(type(method).__name__, type(method))
        return method
    hint = f"write {method.__name__}()" if isinstance(method, type) else "pass one such as VAR()"
    raise ValueError(
        f"found {method!r} as a method: {hint}, a name of {list(METHODS)}, or an import path such "
        f"as {PATH!r}"
    )


def unknown(name: str, known: Sequence[str]) -> str:
    """The message for a method name that is not known."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown method {name!r}: expected one of {list(known)}{hint}"


def resolve(methods: Sequence[Method], decoder: Decoder) -> list[Method]:
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
        ready, scaled = method.resolve(
            ModelInfo(decoder.depth, decoder.width, decoder.heads, profile, decoder.softmax)
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

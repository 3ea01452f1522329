"""Whether a model is as it was, bit for bit; for any model and its inputs."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_patch import patch, wrap
from vlm_patch.engine import attention

STEPS = (
    (attention, "install"),
    (attention.copy, "copy"),
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "register_forward_hook"),
    (patch, "Hook"),
    (patch, "ForwardHooks"),
    (patch, "GuardedGenerate"),
)
"""What `wrap` calls, one after the other, while it puts methods on."""


Ask: TypeAlias = Callable[[], Sequence[Tensor]]
"""Logits of a model that runs and generates."""


class Broken(Exception):
    """Raised on purpose."""


def check_untouched(model: nn.Module, ask: Ask, methods: Sequence[Any], folder: Path) -> None:
    """Asserts that methods come off `model` without a trace: after a generation, an error inside
    every method, an interrupted generation, and a wrap that fails at any of its steps.

    folder: empty; the model is saved there twice.
    """
    stock = ask()
    model.save_pretrained(folder / "before")
    before = state_of(model)  # transformers itself marks a model that ran or was saved
    with wrap(model, *methods):
        ask()
    assert state_of(model) == before
    for method in methods:
        check_error_in_method(model, ask, methods, method)
        assert state_of(model) == before
    check_interrupt(model, ask, methods)
    assert state_of(model) == before
    check_failed_wraps(model, methods)
    assert_equal(ask(), stock)
    model.save_pretrained(folder / "after")
    assert files(folder / "after") == files(folder / "before")


def check_error_in_method(
    model: nn.Module,
    ask: Ask,
    methods: Sequence[Any],
    method: Any,
    stage: str = "before_forward",
) -> None:
    """An error in a method reaches the caller, and the next prompt runs as if it were the first."""
    with wrap(model, *methods):
        patched = ask()
        with failing(type(method), stage, Broken), pytest.raises(Broken):
            ask()
        assert_equal(ask(), patched)


def check_interrupt(model: nn.Module, ask: Ask, methods: Sequence[Any], at: int = 3) -> None:
    """Ctrl-C when a decoder block is about to run for the `at`-th time."""
    with wrap(model, *methods) as handle:
        patched = ask()
        block = handle._decoder.layers[-1].block
        with (
            failing(type(block), "forward", KeyboardInterrupt, at),
            pytest.raises(KeyboardInterrupt),
        ):
            ask()
        assert_equal(ask(), patched)


def check_failed_wraps(model: nn.Module, methods: Sequence[Any]) -> None:
    """However far it came, a wrap that fails takes back what it did."""
    before = state_of(model)
    with counted(lambda step: None) as calls:
        wrap(model, *methods).remove()
    assert state_of(model) == before
    for error in (MemoryError, KeyboardInterrupt):
        for last in range(len(calls)):
            with counted(_fail_at(last, error)), pytest.raises(error):
                wrap(model, *methods)
            assert state_of(model) == before, f"{calls[last]}, step {last}"


def _fail_at(last: int, error: type[BaseException]) -> Callable[[int], None]:
    def fail(step: int) -> None:
        if step == last:
            raise error

    return fail


@contextmanager
def counted(before: Callable[[int], None]) -> Iterator[list[str]]:
    """The names of the steps of a wrap as they are called; `before` is told each one's number."""
    calls: list[str] = []

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            before(len(calls) - 1)
            return call(*args, **kwargs)

        return run

    patches = [
        mock.patch.object(owner, name, counting(name, getattr(owner, name)))
        for owner, name in STEPS
    ]
    for one in patches:
        one.start()
    try:
        yield calls
    finally:
        for one in patches:
            one.stop()


@contextmanager
def failing(owner: Any, name: str, error: type[BaseException], at: int = 1) -> Iterator[None]:
    """The `at`-th call of a method of a class raises."""
    original, calls = getattr(owner, name), []

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            raise error
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, run):
        yield


def answers(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The logits of a prompt and of the tokens that follow it."""
    ways = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    asked = {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        return [model(**inputs).logits, *model.generate(**inputs, **ways, **asked).logits]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def state_of(model: nn.Module) -> dict[Any, Any]:
    """Everything of a model that a patch could leave changed; objects by identity, weights also by
    the number of writes.
    """
    found: dict[Any, Any] = {
        "state_dict": list(model.state_dict()),
        "attention functions": {name: id(call) for name, call in ALL_ATTENTION_FUNCTIONS.items()},
    }
    for name, module in model.named_modules():
        found[name] = type(module), id(type(module).forward), _content(module.__dict__)
        for config in vars(module).values():
            if hasattr(config, "to_dict"):
                found[name, id(config)] = _settings(config)
    return found


def _settings(thing: Any) -> Any:
    """A copy of what a config holds, with the configs in it taken apart, since some cannot be
    compared.
    """
    if hasattr(thing, "to_dict"):
        return {key: _settings(value) for key, value in vars(thing).items()}
    if isinstance(thing, Mapping):
        return {key: _settings(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_settings(value) for value in thing]
    return copy.deepcopy(thing)


def _content(thing: Any) -> Any:
    """Containers by what they hold, weights by how often they were written, tensors that the model
    makes while it runs by value, the rest by identity.
    """
    if isinstance(thing, Mapping):
        return [(key, _content(value)) for key, value in thing.items()]
    if isinstance(thing, list | tuple | set):
        return [_content(value) for value in thing]
    if isinstance(thing, nn.Parameter):
        return id(thing), thing.data_ptr(), thing._version
    if isinstance(thing, Tensor):
        return thing.tolist()
    if isinstance(thing, bool | int | float | str | None):
        return thing
    return id(thing)

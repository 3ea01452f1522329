"""Stands before a wrapped model's `generate`: tells the layout its prompt, and refuses what would
go wrong in silence.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from vlm_patch.engine.tracker import PromptInputs, carries_images
from vlm_patch.errors import PatchError

HUB = "transformers loads it as code from the hub, which works on the cache in ways of its own"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "penalty_alpha": ((None, 0, 0.0), HUB),
    "dola_layers": ((None,), HUB),
    "custom_generate": ((None,), HUB),
    "use_mtp": (
        (None, False),
        "the heads that predict several tokens run layers behind the decoder, which no method was "
        "made for",
    ),
    "assistant_early_exit": (
        (None,),
        "the draft would come from the patched model's own first layers, while methods count on "
        "all of them",
    ),
}
"""Options of `generate` that are refused: the values that pass anyway (the last of them is the one
to choose), and why the others do not."""

UNSET = GenerationConfig()  # type: ignore[no-untyped-call]
"""Its values count as not given: None, but a value for some options before transformers 5."""


class GuardedGenerate:
    """A model's `generate` (`stock`) inside a context; in a deep copy or a pickle it is plain.

    around: given the arguments by name, what to run it in.
    """

    def __init__(
        self,
        model: nn.Module,
        stock: Callable[..., Any],
        around: Callable[[Mapping[str, Any]], AbstractContextManager[None]] | None,
    ) -> None:
        self.model, self.__wrapped__, self.around = model, stock, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None:
            return self.__wrapped__(*args, **kwargs)
        named = dict(zip(inspect.signature(self.__wrapped__).parameters, args, strict=False))
        with self.around({**named, **kwargs}):
            return self.__wrapped__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedGenerate:
        model, stock = copy.deepcopy((self.model, self.__wrapped__), memo)
        return GuardedGenerate(model, stock, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return GuardedGenerate, (self.model, self.__wrapped__, None)


def option(name: str, given: Mapping[str, Any], default: Any) -> Any:
    """An option of `generate`: from its arguments, its generation config, or the model's own, which
    counts where the one given does not say it, as in transformers.
    """
    value = given.get(name)
    for config in (given.get("generation_config"), default):
        if name not in given and value in (None, getattr(UNSET, name, None)):
            value = getattr(config, name, None)
    return value


def check_options(given: Mapping[str, Any], default: Any) -> None:
    """Raises PatchError for a way of generating in which methods would go wrong in silence.

    given: the arguments of `generate` by name. default: the model's own generation config.
    """
    for name, (passing, reason) in REFUSED.items():
        value = option(name, given, default)
        if value not in passing:
            raise PatchError(
                f"generate({name}={value!r}) cannot run with methods on: {reason}. Leave {name} at "
                f"{passing[-1]!r}, or generate inside `with patch.disabled():`"
            )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        value, length = option(name, given, default), _cached(given)
        if value is not None and length:
            shown = value if isinstance(value, int) else type(value).__name__
            raise PatchError(
                f"generate({name}={shown}) cannot go on behind a cache that holds {length} tokens: "
                f"transformers would read the conversation a second time. Leave {name} out, or "
                "give the whole conversation without a cache."
            )
    chunk, guidance = (option(n, given, default) for n in ("prefill_chunk_size", "guidance_scale"))
    if chunk is not None and guidance not in (None, 1):
        raise PatchError(
            f"generate(prefill_chunk_size={chunk!r}, guidance_scale={guidance!r}) cannot run with "
            "methods on: the prompts of both branches could not be told apart in pieces. Leave one "
            "of the two out, or generate inside `with patch.disabled():`"
        )


def _cached(given: Mapping[str, Any]) -> int:
    """How many tokens the cache holds that `generate` was given."""
    caches = (given.get(name) for name in ("cache", "past_key_values"))
    return max((int(one.get_seq_length()) for one in caches if one is not None), default=0)


def prompt_inputs(
    given: Mapping[str, Any], default: Any, inner: bool = False, mask_name: str | None = None
) -> PromptInputs | None:
    """What the arguments of `generate` tell of its prompt; None where they hold none.

    An assistant goes on with what it and the model it drafts for have written: no new prompt.
    inner: see `PromptInputs`. mask_name: the argument that says which tokens are image, if any.
    """
    ids, mask = given.get("input_ids", given.get("inputs")), given.get("attention_mask")
    ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
    embeds = given.get("inputs_embeds")
    tokens = embeds if embeds is not None else ids
    if tokens is None:
        return None
    drafting = getattr(given.get("generation_config"), "is_assistant", False)
    if drafting and _cached(given):
        return PromptInputs(0)
    return PromptInputs(
        end=(tokens if mask is None else mask).shape[1],
        ids=ids if embeds is None or inner else None,
        mask=mask,
        where=None if mask_name is None else given.get(mask_name),
        images=inner or carries_images(given),
        chunk=option("prefill_chunk_size", given, default),
        inner=inner,
    )

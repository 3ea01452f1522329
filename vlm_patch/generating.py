"""Stands before a wrapped model's `generate`, and refuses what would go wrong in silence."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig

from vlm_patch.errors import PatchError

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "use_mtp": (None, False),
    "prefill_chunk_size": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "guidance_scale": (None, 1, 1.0),
    "custom_generate": (None,),
    "use_cache": (None, True),
    "cache_implementation": (None, "static", "dynamic"),
    "output_attentions": (None, False),
}
"""The values that generation options may have; the last of each is the one that messages name."""

UNSET = GenerationConfig()  # type: ignore[no-untyped-call]
"""Its values count as not given: None, but a value for some options before transformers 5."""


class Generate:
    """A model's `generate` (`stock`) behind a check; in a deep copy or a pickle of the model it is
    plain.

    active: whether any method is on.
    """

    def __init__(
        self, model: nn.Module, stock: Callable[..., Any], active: Callable[[], bool] | None
    ) -> None:
        self.model, self.__wrapped__, self.active = model, stock, active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active is not None and self.active():
            named = dict(zip(inspect.signature(self.__wrapped__).parameters, args, strict=False))
            check_options({**named, **kwargs}, self.model.generation_config)
        return self.__wrapped__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        model, stock = copy.deepcopy((self.model, self.__wrapped__), memo)
        return Generate(model, stock, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self.model, self.__wrapped__, None)


def check_options(given: Mapping[str, Any], default: Any) -> None:
    """Raises PatchError for a way of generating in which methods would go wrong in silence.

    given: the arguments of `generate` by name. default: the model's own generation config, which
    counts where the one given does not say it, as in transformers.
    """
    for name, supported in SUPPORTED.items():
        found = given.get(name)
        for config in (given.get("generation_config"), default):
            if name not in given and found in (None, getattr(UNSET, name, None)):
                found = getattr(config, name, None)
        if found not in supported:
            raise PatchError(
                f"generate({name}={found!r}) is not supported on a patched model by this version: "
                f"leave {name} at {supported[-1]!r}, or generate inside `with patch.disabled():`"
            )

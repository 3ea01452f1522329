"""Decode steps compiled with a static cache, on a GPU as CUDA graphs."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from eval.speed.clock import now
from eval.speed.models import Prompt

ROOM = 64
"""Places of the cache behind the prompt."""
WARM = 3
"""Runs before the first that counts: one compiles, one records the graphs, one replays them."""


class Compiled:
    """A model's decode step, compiled in one piece; making it reads the prompt and compiles.

    name: what the model calls its cache. token: the inputs of a step. logits: the prompt's. Raises
    what torch.compile raises, for instance where a step cannot be one graph.
    """

    @torch.no_grad()
    def __init__(self, model: Any, prompt: Prompt, name: str, token: dict[str, Tensor]) -> None:
        self.device, self.token = model.device, token
        length = prompt.image.shape[1] + ROOM
        self.cache: Any = StaticCache(config=model.config, max_cache_len=length)
        given = {**prompt.inputs, name: self.cache, "use_cache": True, "logits_to_keep": 1}
        self.logits: Tensor = model(**given).logits

        def step(token: dict[str, Tensor], cache: Any) -> Tensor:
            logits: Tensor = model(**token, **{name: cache}, use_cache=True).logits
            return logits

        # code of its own, or all sides would be versions of one compiled function
        own = FunctionType(step.__code__.replace(), globals(), "step", None, step.__closure__)
        on_card = self.device.type == "cuda"
        how: Any = {"mode": "reduce-overhead"} if on_card else {"backend": "eager"}
        self.step: Any = torch.compile(own, fullgraph=True, dynamic=False, **how)
        for _ in range(WARM):
            self.decode(2)

    @torch.no_grad()
    def decode(self, steps: int) -> float:
        """Seconds per token of a few steps behind the prompt; the cache is as before after them."""
        start = now(self.device)
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            self.step(self.token, self.cache)
        seconds = now(self.device) - start
        self.cache.crop(-steps)
        return seconds / steps

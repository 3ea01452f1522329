"""The sides of a comparison: one model as it is, under eager attention, and with each method.

Every side has a model object of its own on the same weights, so the stock one is never touched.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import vlm_patch
from eval.errors import EvalError
from eval.speed import counts
from eval.speed.clock import now
from eval.speed.compiled import Compiled
from eval.speed.models import Loaded, Prompt
from eval.speed.shapes import Acting, acting, ours, specs
from vlm_patch.models.chat import GREEDY


@dataclass
class Side:
    """One way of running a model on a prompt.

    kind: "stock", "again" (the same once more), "eager", "text only" (the stock model on the prompt
    without its image), "ours", "release" (release-style), "idle" (wrapped, every head off). on: the
    layers, in words. cache, logits `[B, 1, V]`: of the last prefill. compiled: its compiled step.
    """

    kind: str
    method: str
    on: str
    model: Any
    prompt: Prompt
    cache: Any = None
    logits: Tensor | None = None
    compiled: Compiled | None = None

    @property
    def layers(self) -> int:
        """The layers of its decoder."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def name(self) -> str:
        return self.method if self.kind == "ours" else f"{self.kind} {self.method}".strip()

    @property
    def cache_name(self) -> str:
        """What the model calls its cache: `cache` since transformers 5.24."""
        named = "cache" in inspect.signature(self.model.forward).parameters
        return "cache" if named else "past_key_values"

    @torch.inference_mode()
    def prefill(self) -> float:
        """Seconds for the prompt; keeps its cache."""
        start = now(self.model.device)
        output = self.model(**{**self.prompt.inputs, "use_cache": True, "logits_to_keep": 1})
        seconds = now(self.model.device) - start
        self.cache, self.logits = output[self.cache_name], output.logits
        return seconds

    def prepare(self, phase: str) -> None:
        """What a phase needs before its clock runs: the prompt read, kernels and steps compiled."""
        on_card = self.model.device.type == "cuda"
        if phase == "compiled":
            known = self.model, self.prompt, self.cache_name, self.last_token()
            self.compiled = self.compiled or Compiled(*known)
            self.logits = self.compiled.logits
        elif phase in ("prefill", "attention"):
            if on_card:
                self.prefill()
        elif self.cache is None:
            self.prefill()
        if phase in ("generate", "answers"):
            self.cache = None
            if on_card:
                self.generate(2)

    def last_token(self) -> dict[str, Tensor]:
        """The prompt's last token once more, as inputs."""
        key = "input_ids" if "input_ids" in self.prompt.inputs else "inputs_embeds"
        return {key: self.prompt.inputs[key][:, -1:]}

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The logits `[B, 1, V]` behind one more token: the last one of the prompt again."""
        token = {**self.last_token(), self.cache_name: self.cache}
        logits: Tensor = self.model(**token, use_cache=True).logits
        return logits

    def decode(self, steps: int) -> float:
        """Seconds per token of a few steps behind the prompt; the cache is as before after them."""
        self.step()
        start = now(self.model.device)
        for _ in range(steps):
            self.step()
        seconds = now(self.model.device) - start
        self.cache.crop(-steps - 1)
        return seconds / steps

    def counted(self, count: Callable[[Callable[[], object], torch.device], int]) -> float:
        """What `count` finds in the second step behind the prompt, the first makes plans."""
        self.step()
        found = count(self.step, self.model.device)
        self.cache.crop(-2)
        return float(found)

    def launches(self) -> float:
        """Kernels launched a token and layer; operators on the CPU."""
        return self.counted(counts.launches) / self.layers

    def waits(self) -> float:
        """How often the host waits for the device at a token."""
        return self.counted(counts.waits)

    def attention(self) -> float:
        """Seconds spent inside the decoder's attention function during a prefill."""
        with attention_clock(self.model.device) as seconds:
            self.prefill()
        return seconds[0]

    @torch.inference_mode()
    def generate(self, tokens: int) -> float:
        """Seconds to generate exactly so many tokens, prompt included."""
        inputs = {k: v for k, v in self.prompt.inputs.items() if k != "logits_to_keep"}
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        pad = self.model.generation_config.pad_token_id or 0
        start = now(self.model.device)
        self.model.generate(**inputs, **GREEDY, **length, pad_token_id=pad)
        return now(self.model.device) - start


@contextmanager
def attention_clock(device: torch.device) -> Iterator[list[float]]:
    """Adds up, in the one number it gives, the seconds inside attention functions."""
    spent, inside = [0.0], [False]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:  # ours calls the stock one
                return call(*args, **kwargs)
            inside[0], start = True, now(device)
            try:
                return call(*args, **kwargs)
            finally:
                spent[0] += now(device) - start
                inside[0] = False

        return run

    eager = modeling_llama.eager_attention_forward  # no transformers keeps it among the others
    with ExitStack() as undo:
        for name, call in dict(ALL_ATTENTION_FUNCTIONS).items():
            ALL_ATTENTION_FUNCTIONS[name] = timed(call)
            undo.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, name)
        undo.callback(setattr, modeling_llama, "eager_attention_forward", eager)
        modeling_llama.eager_attention_forward = timed(eager)
        yield spent


@contextmanager
def sides(loaded: Loaded, prompt: Prompt, pairs: Sequence[tuple[str, str]]) -> Iterator[list[Side]]:
    """The sides of these (kind, method) pairs."""
    at = acting(loaded.text)
    with ExitStack() as stack:
        yield [_side(loaded, prompt, kind, method, at, stack) for kind, method in pairs]


def _side(
    loaded: Loaded, prompt: Prompt, kind: str, method: str, at: Acting, stack: ExitStack
) -> Side:
    model = twin(loaded.model)
    if kind == "eager":
        model.set_attn_implementation({"text_config": "eager"})
    elif kind == "text only":
        prompt = prompt.text_only(model)
    elif kind == "release":
        from eval.support.release_style import (
            release_style,  # lives with the tests, as their reference
        )

        masks = prompt.image[0], prompt.query[0]
        stack.enter_context(release_style(model, specs(method, at), *masks))
    elif kind in ("ours", "idle"):
        patch = _wrapped(model, loaded.processor, method, at)
        stack.enter_context(patch)
        if loaded.processor is None:
            stack.enter_context(patch.prompt(image=prompt.image, query=prompt.query))
        if kind == "idle":
            for name in patch.heads:
                patch.heads[name][:] = False
    return Side(kind, method, at.describe(method) if method else "", model, prompt)


def _wrapped(model: Any, processor: Any, method: str, at: Acting) -> vlm_patch.Patch:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # defaults that were scaled: every setting is set here
        return vlm_patch.wrap(model, *ours(method, at), processor=processor)


def twin(model: nn.Module) -> Any:
    """A second model object on the same weights."""
    shared = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def check_acting(side: Side, stock: Side) -> float:
    """The largest change of a logit; raises EvalError where a method changes nothing."""
    assert side.logits is not None, "compared before a prompt ran"
    assert stock.logits is not None, "compared before a prompt ran"
    change = float((side.logits - stock.logits).abs().max())
    if change < 1e-3 * float(stock.logits.std()):
        raise EvalError(
            f"{side.name} changes no logit by more than {change:.1e}: what would be timed does "
            "nothing on this shape"
        )
    return change

"""Second streams of a generation: each reads another prompt, then the tokens that the first stream
chose, one decoder forward of its own for each of the first one's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_patch.engine.extra_passes import ExtraPasses, can_be_cut
from vlm_patch.errors import PatchError
from vlm_patch.method import Branch, ForwardContext, Phase
from vlm_patch.primitives.buffers import append

PER_TOKEN = ("inputs_embeds", "input_ids", "per_layer_inputs")
"""Decoder inputs `[B, S, ...]` that hold something for every token."""

KNOWN = (*PER_TOKEN, "attention_mask", "position_ids", "cache_position")


@dataclass
class Stream:
    """What is remembered of a second stream of B samples; it travels with the first one's cache.

    cache: its own; None where the first one has none either.
    known: number of tokens of the first stream that it has followed.
    length: number of tokens of its own, padding included.
    same: how many of them, the last ones, are the first stream's last ones.
    shift: how many tokens it has in front of them that the first stream has not.
    valid: `[B, at least length]` (bool), no padding.
    count: `[B]`, number of tokens that are no padding.
    padded: whether any is.
    """

    cache: Any
    known: int = 0
    length: int = 0
    same: int = 0
    shift: int = 0
    valid: Any = None
    count: Any = None
    padded: bool = False

    def select(self, index: Tensor) -> None:
        """Keeps the samples `index` `[B]`, which may be reordered or repeated."""
        self.valid = self.valid.index_select(0, index.to(self.valid.device))
        self.count = self.count.index_select(0, index.to(self.count.device))
        if self.cache is not None:
            self.cache.reorder_cache(index)

    def crop(self, tokens: int) -> None:
        """Forgets its last tokens, which the first stream has taken back."""
        if tokens > self.same or not can_be_cut(self.cache):
            raise PatchError(
                f"{tokens} tokens were taken out of the cache, {tokens - self.same} of which a "
                "second stream cannot give back: it keeps what it read of a prompt as a whole, and "
                "a sliding window cannot be cut. Start from the prompt with an empty cache."
            )
        self.count = self.count - self.valid[:, self.length - tokens : self.length].sum(1)
        self.length, self.same = self.length - tokens, self.same - tokens
        self.known -= tokens
        self.cache.crop(-tokens)

    def grow(self, part: Part, rows: int) -> Tensor | None:
        """Takes in the tokens of a part, for `rows` of the first stream; returns the mask of all
        `[B, N]`, None where there is no padding.
        """
        new = part.valid.shape[1]
        self.valid = append(self.valid, part.valid, self.length)
        self.count = part.valid.sum(1) + (0 if self.count is None else self.count)
        self.length, self.known = self.length + new, self.known + rows
        self.same = self.same + new if part.same is None else part.same
        self.shift += part.longer
        if part.prompt and not self.padded:
            self.padded = not bool(part.valid.all())
        return self.valid[:, : self.length].long() if self.padded else None


@dataclass
class Part:
    """The T new tokens that a stream reads in one forward.

    valid: `[B, T]` (bool), no padding.
    inputs: what the decoder is given for them.
    same: how many of them, the last ones, are the first stream's own; None for all.
    longer: how many the first stream has not.
    prompt: they are of a prompt.
    """

    valid: Tensor
    inputs: dict[str, Any]
    same: int | None = None
    longer: int = 0
    prompt: bool = True


@dataclass
class Branches:
    """Lets streams follow the forwards of the first one.

    extra: runs the decoder. encode: token ids of a text, None without a processor. embed: the
    model's embeddings of token ids.
    """

    extra: ExtraPasses
    encode: Callable[[str], Sequence[int]] | None
    embed: Callable[[Tensor], Tensor]
    prefixes: dict[str | tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def stream(
        self, name: str, streams: dict[str, Stream], past: int, kwargs: Mapping[str, Any]
    ) -> Stream:
        """The stream `name` of a generation, at the `past` tokens that this forward goes on from;
        a new one at its beginning.
        """
        stream = streams.get(name)
        if not past or stream is None:
            cached = kwargs.get(self.extra.cache_name) is not None
            config: Any = self.extra.decoder.config
            stream = streams[name] = Stream(DynamicCache(config=config) if cached else None)
        if stream.known < past:
            raise PatchError(
                f"the second stream of {name} does not know the first {past} tokens: its method "
                "was off while they were read, or they held no image, or the decoder was called "
                "without the model around it. Start from the prompt with an empty cache."
            )
        if stream.known > past:
            stream.crop(stream.known - past)
        return stream

    def part(
        self, name: str, branch: Branch, stream: Stream, forward: ForwardContext, given: Any
    ) -> Part:
        """What a stream reads where the first one's decoder was `given` its inputs."""
        if not branch.image:
            return self._without_image(name, stream, forward, given)
        check_known(name, given)
        prompt = bool(forward.position.prompt_rows)
        if branch.prefix and prompt:
            return self._prefixed(name, branch, stream, forward, given)
        _check_causal(name, forward, given, forward.valid)
        tokens = {key: given[key] for key in PER_TOKEN if given.get(key) is not None}
        places = given.get("position_ids")
        if places is not None:
            tokens["position_ids"] = places + stream.shift
        return Part(forward.valid, tokens, prompt=prompt)

    def run(self, stream: Stream, part: Part, rows: int) -> Tensor:
        """The hidden states `[B, T, D]` behind the last layer of a part's tokens, for `rows` of
        the first stream.
        """
        mask = stream.grow(part, rows)
        config: Any = self.extra.decoder.config
        plain = config._attn_implementation == "sdpa" and can_be_cut(stream.cache)
        if mask is not None and plain and part.valid.shape[1] == 1 and not part.prompt:
            mask = mask.bool()[:, None, None]  # of a mask of tokens transformers asks if it is full
        inputs = {**part.inputs, "attention_mask": mask}
        inputs |= {self.extra.cache_name: stream.cache, "use_cache": stream.cache is not None}
        hidden: Tensor = self.extra.run(None, inputs).last_hidden_state
        return hidden

    def _without_image(
        self, name: str, stream: Stream, forward: ForwardContext, given: Any
    ) -> Part:
        """The text alone, packed to the right, its positions counted without the image."""
        tokens = {key: given[key] for key in PER_TOKEN if given.get(key) is not None}
        before = 0 if stream.count is None else stream.count[:, None]
        rows, prompt = forward.valid.shape[1], forward.position.prompt_rows
        if not prompt:
            tokens["position_ids"] = before + forward.valid.cumsum(1) - 1
            return Part(forward.valid, tokens, prompt=False)
        keep = forward.valid & ~forward.image[:, forward.new]
        _check_causal(name, forward, given, keep)
        if forward.position.ends and not _in_each(keep, forward.seen):
            raise PatchError(
                "a stream without the image needs some text of the prompt in the forward that ends "
                "it: found image tokens alone. Read the image together with text."
            )
        length = max(1, int(keep.sum(1).max()))
        order = keep.long().argsort(dim=1, stable=True)[:, -length:]
        tokens = {key: _gathered(value, order) for key, value in tokens.items()}
        valid = keep.gather(1, order)
        tokens["position_ids"] = (before + valid.cumsum(1) - 1).clamp_min(0)
        return Part(valid, tokens, same=rows - prompt)

    def _prefixed(
        self, name: str, branch: Branch, stream: Stream, forward: ForwardContext, given: Any
    ) -> Part:
        """The prompt with other tokens in front of its question."""
        at, valid = forward.position, forward.valid
        question = forward.query[:, forward.new] & valid
        if at.phase is not Phase.PREFILL or at.resumed or not _in_each(question, forward.seen):
            raise PatchError(
                f"{name} puts an instruction in front of the question, which it must see in one "
                "forward with the whole prompt: found a prompt that is read in parts, or without "
                "a question behind its image. Leave out prefill_chunk_size, give the prompt "
                "without a cache, or mark the question: with patch.prompt(query=mask)."
            )
        if given.get("per_layer_inputs") is not None:
            raise PatchError(
                f"{name} cannot put an instruction into this model's prompt, since its decoder "
                "takes inputs for every token and layer; use it on another model"
            )
        _check_causal(name, forward, given, valid)
        ids = torch.tensor(self.prefix_ids(name, branch.prefix), device=valid.device)
        start, count = question.long().argmax(1, keepdim=True), len(ids)
        place = torch.arange(valid.shape[1] + count, device=valid.device)
        fresh = (place >= start) & (place < start + count)
        behind = place >= start + count
        source = torch.where(behind, place - count, place).clamp_max(valid.shape[1] - 1)
        which = (place - start).clamp(0, count - 1)
        tokens: dict[str, Any] = {}
        for key, new in (("input_ids", ids), ("inputs_embeds", None)):
            if given.get(key) is not None:
                old = _gathered(given[key], source)
                new = self.embed(ids).to(old) if new is None else new
                mask = fresh if old.ndim == 2 else fresh[..., None]
                tokens[key] = torch.where(mask, new[which], old)
        places = given.get("position_ids")
        if places is not None:
            places = places.expand(*places.shape[:-2], len(valid), -1)
            index = torch.where(fresh, start, source).expand(*places.shape[:-1], -1)
            tokens["position_ids"] = (
                places.gather(-1, index) + stream.shift + which * fresh + count * behind
            )
        return Part(valid.gather(1, source) | fresh, tokens, None, count)

    def prefix_ids(self, name: str, prefix: str | tuple[int, ...]) -> tuple[int, ...]:
        """The token ids of a prefix."""
        if not isinstance(prefix, str):
            return prefix
        if prefix not in self.prefixes:
            if self.encode is None:
                raise PatchError(
                    f"{name} puts a text into the prompt, which takes the model's tokenizer: "
                    "wrap(model, ..., processor=processor), or give token ids in its place"
                )
            self.prefixes[prefix] = tuple(self.encode(prefix))
        return self.prefixes[prefix]


def check_known(name: str, given: Mapping[str, Any], held: Sequence[str] = ()) -> None:
    """Raises PatchError where the decoder takes more of an image than its tokens, beside `held`: a
    stream that has the image, too, would go without it.
    """
    more = [key for key, value in given.items() if isinstance(value, Tensor | list | tuple)]
    strange = [key for key in more if key not in (*KNOWN, *held)]
    if strange:
        raise PatchError(
            f"{name} cannot run a second stream with the image on this model, whose decoder is "
            f"also given {', '.join(strange)}. Use a method whose stream is without the image, or "
            "none."
        )


def _gathered(value: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` `[B, T]` of `[B, S, ...]`."""
    samples = torch.arange(len(index), device=value.device)[:, None]
    return value.expand(len(index), *value.shape[1:])[samples, index.to(value.device)]


def _in_each(question: Tensor, seen: Tensor) -> bool:
    """Whether every sample with an image has a question."""
    return bool((question.any(1) | ~seen).all())


def _check_causal(name: str, forward: ForwardContext, given: Any, keep: Tensor) -> None:
    """Raises PatchError where tokens that a stream keeps look ahead (PaliGemma's prefix): its own
    forward would not let them.
    """
    past, rows = forward.position.past, forward.valid.shape[1]
    if not forward.position.prompt_rows:
        return
    mask = given.get("attention_mask")
    for one in mask.values() if isinstance(mask, Mapping) else [mask]:
        if isinstance(one, Tensor) and one.ndim == 4 and one.shape[-1] >= past + rows:
            seen = one[:, 0, :, past : past + rows]
            seen = seen if seen.dtype == torch.bool else seen == 0
            if (seen & keep[:, None, :] & keep[:, :, None]).triu(1).any():
                raise PatchError(
                    f"{name} cannot run a second stream on this model: tokens of its prompts look "
                    "ahead, which a stream with another prompt cannot repeat. Use a method "
                    "without a second stream."
                )

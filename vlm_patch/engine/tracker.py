"""Which key is image, question or text, sample by sample; follows one generation through its
forwards.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlm_patch.engine.state import KEY_MASKS, GenerationState, cached
from vlm_patch.engine.tower import Tower
from vlm_patch.errors import PatchError
from vlm_patch.method import ForwardContext, Patches, Phase, Position
from vlm_patch.models.tensor_parallel import Shard
from vlm_patch.prompts.masks import ManualMasks, PromptMasks, Reader, expand
from vlm_patch.prompts.question import QuestionReader

IMAGE_INPUTS = ("mm_encoder_outputs", "image_pixel_values", "image_patches", "image_embeds")
"""Inputs that carry images, beside those whose name starts with pixel_values."""


@dataclass
class PromptInputs:
    """What `generate` was given: a prompt that ends at token `end` of its conversation, so that
    what stands behind it in a forward is known to be generated or drafted.

    ids, mask, where: `[b, N]`, its tokens, its padding, and its image tokens if the model takes a
        mask of them, before they are repeated for beams.
    images: whether it came with images.
    chunk: how many tokens of it are read in a forward; None for all.
    inner: a language model inside the wrapped one generates by itself, so that the forward of the
        whole is not called.
    """

    end: int
    ids: Tensor | None = None
    mask: Tensor | None = None
    where: Tensor | None = None
    images: bool = False
    chunk: int | None = None
    inner: bool = False

    def prompt(self, past: int, length: int, valid: Tensor) -> PromptMasks:
        """Its `length` last tokens, of which rows `valid` `[B, S]` are about to be read."""
        batch = len(valid)

        def part(tokens: Tensor | None) -> Tensor | None:
            return None if tokens is None else expand(tokens, batch)[:, -length:]

        if length <= valid.shape[1]:
            valid = valid[:, :length]
        else:
            mask = part(self.mask)
            valid = torch.ones(batch, length, dtype=torch.bool, device=valid.device)
            valid = valid if mask is None else valid & mask.to(valid.device).bool()
        return PromptMasks(past, part(self.ids), self.images, valid, part(self.where))


@dataclass
class _ModelInputs:
    """What the hook on the whole model saw of the forward that is about to reach the decoder.

    ids, mask: `[B, S]`, tokens and padding.
    images: whether it holds images.
    where: a mask of the image tokens `[B, S]`, from models that take one.
    """

    ids: Tensor | None
    images: bool
    mask: Tensor | None
    where: Tensor | None = None


class PromptTracker(threading.local):
    """Makes a `ForwardContext` of the inputs of model and decoder; one state per thread.

    given: masks by hand, of the prompts to come.
    generate_inputs: what `generate` was given, while it runs.
    pending: the inputs of the whole model whose decoder is about to run, the only place where token
        ids and images are seen.
    warned: what was warned of already.
    deferred: takes warnings while a prompt is read that may be resumed.
    """

    def __init__(
        self,
        owner: int,
        image_ids: Sequence[int],
        reader: QuestionReader | None,
        mask_name: str | None,
        shard: Shard,
        tower: Tower | None = None,
    ) -> None:
        self.owner, self.mask_name, self.shard, self.tower = owner, mask_name, shard, tower
        self.given: ManualMasks | None = None
        self.generate_inputs: PromptInputs | None = None
        self.pending: Mapping[str, Any] | None = None
        self.warned: set[str] = set()
        self.deferred: list[tuple[str, str]] | None = None
        self.reader = Reader(image_ids, reader, self._warn)

    @contextmanager
    def generating(self, generate_inputs: PromptInputs | None) -> Iterator[None]:
        """While `generate` runs on such a prompt, which it may do inside another `generate`."""
        before, self.generate_inputs, self.pending = self.generate_inputs, generate_inputs, None
        try:
            yield
        finally:
            self.generate_inputs = before

    def see_decoder(
        self,
        kwargs: dict[str, Any],
        cache: Any,
        kept: bool,
        question: bool,
        words: str | Tensor,
        reader: str | None = None,
        at_end: bool = False,
    ) -> tuple[ForwardContext, GenerationState]:
        """Called before the decoder runs, which it always does. Raises PatchError where the layout
        cannot be told.

        kept: the rows go into a cache. question: whether a method wants to know the question;
        words: what it calls content (see `GIFT`). reader: the name of a method that reads the
        vision tower. at_end: whether a method edits the last row of a prompt.
        """
        seen, self.pending = self.pending, None
        embeds = kwargs.get("inputs_embeds")
        hidden = embeds if embeds is not None else kwargs["input_ids"]
        batch, rows = hidden.shape[:2]
        past = cached(cache, rows)
        generation = self._generation(cache, past, batch)
        unfinished = generation.length == past < generation.end
        resumed = not unfinished and self._resumes(generation, past, rows, seen)
        if past < generation.length:
            generation.cut(past)
        generation.length = past + rows
        if past and not unfinished and not resumed and self._generated(past, rows):
            return self._step(generation, past, rows), generation
        if not unfinished:
            generation.start = generation.start if resumed else past
            generation.resumed, generation.end = past, self._end(past, rows)
            generation.answered = self.generate_inputs is not None
        pending = None if seen is None else self._pending(seen)
        valid = self._valid(kwargs, pending, past, batch, rows, hidden.device)
        if past + rows >= generation.end and not valid[:, -1].all():
            raise PatchError(
                "a prompt ends in padding: found right padding, expected left padding. Set "
                'processor.tokenizer.padding_side = "left" before the processor makes the batch. '
                "To score answers, read the left-padded prompts in one forward with "
                "use_cache=True, then feed the answers behind that cache one token at a time, as "
                "they would be generated; padding behind the shorter ones does no harm there."
            )
        self.deferred, patches = None, None
        if not unfinished:
            prompt = self._prompt(generation, pending, valid)
            by_hand = self.given is not None and self.given.query is not None
            generation.open = kept and self.generate_inputs is None and not by_hand
            if cache is not None or (seen is not None and seen.get("use_cache")):
                self.deferred = generation.deferred  # a cache was asked for: perhaps to go on
            self._read(generation, prompt, question, words)
            patches = None if reader is None else self._patches(generation, prompt, reader)
        forward = self._forward(generation, past, valid, kwargs, patches)
        if at_end:
            forward.position.last_image_row = generation.find_edge(past)
        return forward, generation

    def _patches(
        self, generation: GenerationState, prompt: PromptMasks, reader: str
    ) -> Patches | None:
        """What the vision tower looked at in the images of a prompt; None if it has none."""
        image = generation.keys.image[:, prompt.past : generation.end]
        if self.tower is None or not image.any():
            return None
        by_hand = self.given is not None and self.given.image is not None
        if not by_hand or prompt.ids is None:
            return self.tower.place(image, reader)
        placed = self.tower.place(self.reader.image(prompt, None), reader)
        return replace(placed, image=placed.image.masked_fill(~image, -1))

    def _resumes(
        self, generation: GenerationState, past: int, rows: int, seen: Mapping[str, Any] | None
    ) -> bool:
        """Whether this forward goes on with the prompt read last, of which `past` tokens end the
        cache: not with its answer, and not with a new turn.
        """
        asked = 0 if self.generate_inputs is None else self.generate_inputs.end
        if not generation.start < past <= generation.end or (rows == 1 and asked <= past):
            return False
        if self.generate_inputs is not None and asked <= past:
            return False
        if past < generation.end:
            return True  # it was taken out of the cache again from there on
        finished = self._finished(generation)
        if finished:
            return False
        ends_in_image = bool(generation.keys.image[:, past - 1].all())
        if generation.answered:
            return ends_in_image or (finished is False and self._follows(generation, seen))
        return finished is False or ends_in_image or seen is None or not carries_images(seen)

    def _follows(self, generation: GenerationState, seen: Mapping[str, Any] | None) -> bool:
        """Whether the prompt read last, with the new tokens behind it, follows the template."""
        new = None if seen is None else seen.get("input_ids")
        if new is None or self.reader.questions is None:
            return False
        before: Any = generation.keys.ids
        rows = torch.cat((before, new.to(before.device)), 1).tolist()
        return all(self.reader.questions.span(row) is not None for row in rows)

    def _finished(self, generation: GenerationState) -> bool | None:
        """Whether the prompt read last is whole by the chat template; None where that is not
        known.
        """
        ids = generation.keys.ids
        if ids is None or self.reader.questions is None:
            return None
        return all(map(self.reader.questions.finished, ids.tolist()))

    def _pending(self, inputs: Mapping[str, Any]) -> _ModelInputs:
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        where = None if self.mask_name is None else inputs.get(self.mask_name)
        return _ModelInputs(inputs.get("input_ids"), carries_images(inputs), mask, where)

    def see_continuous_batch(self) -> None:
        """Called where transformers packs requests in one row; they hold token ids alone."""
        self.pending = None
        self._warn(
            "continuous batch",
            "Continuous batching takes no images, so its prompts run as in the stock model.",
        )

    def _generated(self, past: int, rows: int) -> bool:
        """Whether all rows behind the cached ones are tokens that the model or its drafter wrote.

        Outside generate one row is taken for one, and several for a new turn.
        """
        return rows == 1 or (self.generate_inputs is not None and past >= self.generate_inputs.end)

    def _end(self, past: int, rows: int) -> int:
        """Where the prompt ends whose reading starts behind `past` cached tokens."""
        generate_inputs = self.generate_inputs
        if generate_inputs is None or generate_inputs.end <= past:
            return past + rows
        piece = generate_inputs.chunk is not None and rows == min(
            generate_inputs.chunk, generate_inputs.end - past
        )
        return generate_inputs.end if piece else min(generate_inputs.end, past + rows)

    def _prompt(
        self, generation: GenerationState, pending: _ModelInputs | None, valid: Tensor
    ) -> PromptMasks:
        """The prompt whose reading starts or goes on in this forward with rows `valid` `[B, S]`."""
        past, length = generation.resumed, generation.end - generation.resumed
        chunked = length > valid.shape[1]
        if self.generate_inputs is not None and (
            chunked or (pending is None and self.generate_inputs.inner)
        ):
            return self.generate_inputs.prompt(past, length, valid)
        seen = pending or _ModelInputs(None, False, None)
        ids, where = (None if of is None else of[:, :length] for of in (seen.ids, seen.where))
        return PromptMasks(past, ids, seen.images, valid[:, :length], where)

    def _read(
        self, generation: GenerationState, new: PromptMasks, question: bool, words: str | Tensor
    ) -> None:
        """Keeps the masks of a prompt, all of it, before its first token runs.

        new: what is not cached of it.
        """
        generation.step = None
        generation.deferred.clear()
        prompt = generation.whole(new)
        generation.open &= not self._finished(generation)
        self.deferred = self.deferred if generation.open else None
        images = generation.grow("image", self.reader.image(new, self.given), new.past)
        query = content = prompt.nothing
        if question:
            query, content = self.reader.question(prompt, self.given, words, images)
        for name, mask in (("query", query), ("content", content)):
            known: Tensor | None = getattr(generation.keys, name)
            if known is not None:
                known.zero_()
            generation.grow(name, mask, prompt.past)
        seen = generation.keys.seen = images.any(1)
        generation.pictured = bool(seen.any())
        self._check_seen(seen)

    def _forward(
        self,
        generation: GenerationState,
        past: int,
        valid: Tensor,
        kwargs: dict[str, Any],
        patches: Patches | None,
    ) -> ForwardContext:
        """A forward that holds rows `valid` `[B, S]` of a prompt, perhaps with drafts behind."""
        total = past + valid.shape[1]
        prompt = min(generation.end, total) - past
        behind = torch.zeros_like(valid[:, prompt:])
        image, query, content = (generation.grow(name, behind, past + prompt) for name in KEY_MASKS)
        ends = total >= generation.end
        last = torch.zeros_like(valid)
        if ends:
            last[:, prompt - 1 :] = True
        starts = past == generation.resumed
        position = Position(
            past,
            Phase.PREFILL if starts and ends else Phase.CHUNK,
            prompt,
            first_prompt=generation.start == 0,
            starts=starts,
            ends=ends,
            resumed=generation.start < generation.resumed,
            may_continue=ends and generation.open,
        )
        return ForwardContext(
            position=position,
            image=image,
            query=query,
            content=content,
            valid=valid,
            text=~image[:, past:] & valid & (image.cumsum(1)[:, past:] > 0),
            last=last,
            seen=generation.keys.seen,
            reading=True,
            inputs=kwargs,
            shard=self.shard,
            patches=patches,
        )

    def _step(self, generation: GenerationState, past: int, rows: int) -> ForwardContext:
        """The forward of one generated token per sample, or of several that were drafted."""
        self.deferred = None
        while generation.deferred:
            self._warn(*generation.deferred.pop(0))
        image, query, content = (generation.ahead(name, past + rows) for name in KEY_MASKS)
        if generation.step is not None and generation.step.forward.valid.shape[1] == rows:
            forward: ForwardContext = generation.step.forward
            forward.position, forward.image = Position(past, forward.position.phase), image
            forward.query, forward.content = query, content
            forward.copies.clear()
            return forward
        return self._new_step(generation, past, rows)

    def next_step(self, generation: GenerationState) -> ForwardContext:
        """The forward of the next generated token, which is not yet here."""
        return self._new_step(generation, generation.length, 1)

    def _new_step(self, generation: GenerationState, past: int, rows: int) -> ForwardContext:
        image, query, content = (generation.ahead(name, past + rows) for name in KEY_MASKS)
        seen = generation.keys.seen
        row, text = torch.ones_like(seen)[:, None], seen[:, None]
        if rows > 1:
            row, text = row.expand(-1, rows), text.expand(-1, rows)
        return ForwardContext(
            position=Position(past, Phase.DECODE if rows == 1 else Phase.DRAFT),
            image=image,
            query=query,
            content=content,
            valid=row,
            text=text,
            last=row,
            seen=seen,
            reading=False,
            inputs={},  # kept from step to step, it must not keep the cache
            shard=self.shard,
        )

    def _valid(
        self,
        kwargs: Mapping[str, Any],
        pending: _ModelInputs | None,
        past: int,
        batch: int,
        rows: int,
        device: torch.device,
    ) -> Tensor:
        """Which of the new tokens `[B, S]` are no padding."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mapping):  # prepared in advance, by kind of layer
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if pending is not None and pending.mask is not None:
            mask = pending.mask
        if not isinstance(mask, Tensor):
            return torch.ones(batch, rows, dtype=torch.bool, device=device)
        if mask.ndim == 4:  # what sees itself is no padding
            own = mask[:, 0].diagonal(min(past, mask.shape[3] - rows), 1, 2)
            mask = own if own.dtype == torch.bool else own == 0
        return mask[:, -rows:].to(device).bool().expand(batch, rows)

    def _generation(self, cache: Any, past: int, batch: int) -> GenerationState:
        """The generation that this forward continues, or a new one."""
        if past == 0:
            return GenerationState(self.owner, batch)
        generation: GenerationState | None = getattr(cache, "vlm_patch", None)
        if generation is None or generation.owner != self.owner or generation.length < past:
            raise PatchError(
                f"the cache holds {past} tokens that this patch did not see: it was off, or not "
                "put on, when they were read. Start from the prompt with an empty cache."
            )
        if generation.batch != batch:
            raise PatchError(
                f"the cache was filled with a batch of {generation.batch}, this forward has "
                f"{batch}. Start from the prompt with an empty cache."
            )
        return generation

    def _check_seen(self, seen: Tensor) -> None:
        if not seen.all():
            self._warn(
                "no image",
                f"{int((~seen).sum())} of {len(seen)} prompts hold no image: they run as in the "
                "stock model.",
            )

    def _warn(self, key: str, message: str) -> None:
        """Warns once per patch; of a prompt's template only when the prompt is whole."""
        if self.deferred is not None and key == "template":
            self.deferred.append((key, message))
        elif key not in self.warned:
            self.warned.add(key)
            warnings.warn(message, stacklevel=2)


def carries_images(inputs: Mapping[str, Any]) -> bool:
    """Whether the inputs of a model hold images or videos, encoded or not."""
    return any(
        value is not None and value != {}
        for name, value in inputs.items()
        if name in IMAGE_INPUTS or name.startswith("pixel_values")
    )

"""Which key is image, question or text, sample by sample; follows one generation through its
forwards.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from vlm_patch.errors import PatchError
from vlm_patch.method import Forward, Memory, append
from vlm_patch.question import QuestionReader

KEY_MASKS = ("image", "query", "content")


@dataclass
class Generation:
    """What is remembered of one generation; it travels with the cache, also through a deep copy.

    owner: the patch that made it. length: tokens seen so far. keys: the masks "image", "query" and
    "content" of the tokens, and "seen" `[B]`, the samples with an image. memory: of each method, by
    name. history: the layers in which a method was on, and up to which length. step: what is
    done at every generated token (an `editing.Editing`). pictured: whether any sample has an image;
    without one everything is left stock.
    """

    owner: int
    batch: int
    length: int = 0
    keys: Memory = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    history: dict[str, tuple[Collection[int], int]] = field(default_factory=dict)
    step: Any = None
    pictured: bool = True

    def reorder(self, index: Tensor) -> None:
        """Follows the cache when beams are reordered; index `[B]`."""
        for memory in (self.keys, *self.memory.values()):
            for key, tensor in memory.items():
                memory[key] = tensor.index_select(0, index.to(tensor.device))

    def follow(self, name: str, layers: Collection[int], past: int) -> None:
        """Notes that a method acts in these layers now. Raises PatchError if it missed tokens."""
        known, length = self.history.get(name, ((), 0))
        if past and (known is not layers or length < past):
            missed = [layer for layer in layers if layer not in known]
            if missed or length < past:
                where = f"layer {missed[0]}" if missed else "every layer"
                raise PatchError(
                    f"{name} is on, but was off in {where} while a part of the first {past} tokens "
                    "was read, so it does not know them. Switch methods and layers before a prompt."
                )
        self.history[name] = (layers, self.length)

    def grow(self, name: str, new: Tensor, past: int) -> Tensor:
        """The mask `name` `[B, past + S]` with the new tokens' `[B, S]` behind the cached ones."""
        return append(self.keys, (name, 0), new, past)

    def cut(self, past: int) -> None:
        """Forgets the masks of tokens that were taken out of the cache again."""
        for name in KEY_MASKS:
            self.keys[name, 0][:, past:] = False

    def ahead(self, name: str, total: int) -> Tensor:
        """The mask `name` `[B, total]` where the tokens not seen yet are none of it."""
        buffer = self.keys[name, 0]
        if buffer.shape[1] < total:
            append(self.keys, (name, 0), torch.zeros_like(buffer), buffer.shape[1])
            buffer = self.keys[name, 0]
        return buffer[:, :total]


class _Reordering:
    """Stands in for `cache.reorder_cache`, so that what is remembered follows the beams.

    Holds the cache weakly: a cycle would keep its memory until the garbage collector runs.
    """

    def __init__(self, cache: Any, generation: Generation) -> None:
        self.cache, self.generation = weakref.ref(cache), generation

    def __call__(self, beam_idx: Tensor) -> None:
        cache: Any = self.cache()
        type(cache).reorder_cache(cache, beam_idx)
        self.generation.reorder(beam_idx)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Reordering, (self.cache(), self.generation)


def attach(cache: Any, generation: Generation) -> None:
    """Lets a generation travel with its cache."""
    cache.vlm_patch = generation
    cache.reorder_cache = _Reordering(cache, generation)


def _cached(cache: Any, rows: int) -> int:
    """How many tokens the cache holds; while a static one generates, known without asking it,
    since that would wait for the device.
    """
    if cache is None:
        return 0
    generation: Generation | None = getattr(cache, "vlm_patch", None)
    if rows == 1 and generation is not None and isinstance(cache, StaticCache):
        return generation.length
    return int(cache.get_seq_length())


@dataclass
class Given:
    """Masks given by hand for the prompts of a `with patch.prompt(...)` block, `[batch, prompt
    length]` (bool).
    """

    image: Tensor | None = None
    query: Tensor | None = None


@dataclass
class _Pending:
    """What the hook on the whole model saw of the forward that is about to reach the decoder."""

    ids: Tensor | None
    images: bool
    mask: Tensor | None


class Layout(threading.local):
    """Turns the inputs of the model and of its decoder into a `Forward`; one state per thread."""

    def __init__(self, owner: int, image_ids: Sequence[int], reader: QuestionReader | None) -> None:
        self.owner, self.image_ids, self.reader = owner, image_ids, reader
        self.given: Given | None = None
        self.pending: _Pending | None = None
        self.said: set[str] = set()

    def see_model(self, kwargs: Mapping[str, Any]) -> None:
        """Called before the whole model runs: the only place where token ids and images are
        seen.
        """
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        images = bool(kwargs.get("mm_encoder_outputs")) or any(
            value is not None for name, value in kwargs.items() if name.startswith("pixel_values")
        )
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.pending = _Pending(ids, images, mask)

    def see_decoder(
        self, kwargs: dict[str, Any], cache: Any, question: bool, words: str | Tensor
    ) -> tuple[Forward, Generation]:
        """Called before the decoder runs, which it always does. Raises PatchError where the layout
        cannot be told.

        question: whether a method wants to know the question; words: what it calls content (see
        `GIFT`).
        """
        pending, self.pending = self.pending, None
        embeds = kwargs.get("inputs_embeds")
        hidden = embeds if embeds is not None else kwargs["input_ids"]
        batch, rows = hidden.shape[:2]
        past = _cached(cache, rows)
        generation = self._generation(cache, past, batch)
        if past < generation.length:
            generation.cut(past)
        generation.length = past + rows
        if past and rows == 1:
            return self._step(generation, past), generation
        valid = self._valid(kwargs, pending, past, batch, rows, hidden.device)
        if not valid[:, -1].all():
            raise PatchError(
                "a prompt ends in padding: found right padding, expected left padding. Set "
                'processor.tokenizer.padding_side = "left".'
            )
        generation.step = None
        image = self._image(pending, past, torch.zeros_like(valid))
        images = generation.grow("image", image, past)
        query = content = torch.zeros_like(valid)
        if question:
            query, content = self._question(pending, words, past, images, valid)
        for name in ("query", "content"):
            if (name, 0) in generation.keys:
                generation.keys[name, 0].zero_()
        seen = generation.keys["seen", 0] = images.any(1)
        generation.pictured = bool(seen.any())
        self._check_seen(seen)
        last = torch.zeros_like(valid)
        last[:, -1] = True
        forward = Forward(
            past=past,
            image=images,
            query=generation.grow("query", query, past),
            content=generation.grow("content", content, past),
            valid=valid,
            text=~image & valid & (images.cumsum(1)[:, past:] > 0),
            last=last,
            seen=seen,
            reading=True,
            inputs=kwargs,
        )
        return forward, generation

    def see_continuous_batch(self) -> None:
        """Called where transformers packs requests in one row; they hold token ids alone."""
        self.pending = None
        self._say(
            "continuous batch",
            "Continuous batching takes no images, so its prompts run as in the stock model.",
        )

    def _step(self, generation: Generation, past: int) -> Forward:
        """The forward of one generated token per sample."""
        image, query, content = (generation.ahead(name, past + 1) for name in KEY_MASKS)
        if generation.step is not None:
            forward: Forward = generation.step.forward
            forward.past, forward.image = past, image
            forward.query, forward.content = query, content
            return forward
        seen = generation.keys["seen", 0]
        row = torch.ones_like(seen)[:, None]
        return Forward(
            past=past,
            image=image,
            query=query,
            content=content,
            valid=row,
            text=seen[:, None],
            last=row,
            seen=seen,
            reading=False,
            inputs={},  # kept from step to step, it must not keep the cache
            generated=True,
        )

    def _valid(
        self,
        kwargs: Mapping[str, Any],
        pending: _Pending | None,
        past: int,
        batch: int,
        rows: int,
        device: torch.device,
    ) -> Tensor:
        """Which of the new tokens `[B, S]` are no padding."""
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Mapping):  # prepared in advance, by kind of layer
            mask = mask.get("full_attention")
        if pending is not None and pending.mask is not None:
            mask = pending.mask
        if not isinstance(mask, Tensor):
            return torch.ones(batch, rows, dtype=torch.bool, device=device)
        if mask.ndim == 4:  # what the last row sees is no padding
            seen = mask[:, 0, -1, past : past + rows]
            mask = seen if seen.dtype == torch.bool else seen == 0
        return mask[:, -rows:].to(device).bool().expand(batch, rows)

    def _generation(self, cache: Any, past: int, batch: int) -> Generation:
        """The generation that this forward continues, or a new one."""
        if past == 0:
            return Generation(self.owner, batch)
        generation: Generation | None = getattr(cache, "vlm_patch", None)
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

    def _image(self, pending: _Pending | None, past: int, empty: Tensor) -> Tensor:
        if self.given is not None and self.given.image is not None:
            return self._by_hand(self.given.image, "image", past, empty)
        if pending is None or pending.ids is None:
            raise PatchError(
                "the image tokens of this prompt cannot be told: the model was called with "
                "inputs_embeds, or not through its own forward or generate. Call the wrapped "
                "model with input_ids, or give the mask: with patch.prompt(image=mask, "
                "query=mask)."
            )
        if not pending.images:
            return empty
        found = torch.zeros_like(pending.ids, dtype=torch.bool)
        for token in self.image_ids:
            found |= pending.ids == token
        return found.to(empty.device)

    def _by_hand(self, mask: Tensor, name: str, past: int, empty: Tensor) -> Tensor:
        """A mask over the whole padded prompt, repeated for beams and return sequences, cut to the
        new rows.
        """
        batch, rows = empty.shape
        wanted = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 2
        if not wanted:
            found = type(mask).__name__
            if isinstance(mask, Tensor):
                found = f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise PatchError(f"{name} mask: found {found}, expected bool [batch, prompt length]")
        if mask.shape[1] != past + rows or not len(mask) or batch % len(mask):
            raise PatchError(
                f"{name} mask: found shape {tuple(mask.shape)}, but the prompt is {past + rows} "
                f"tokens long (padding included) in a batch of {batch}"
            )
        return mask.to(empty.device).repeat_interleave(batch // mask.shape[0], 0)[:, past:]

    def _question(
        self,
        pending: _Pending | None,
        words: str | Tensor,
        past: int,
        images: Tensor,
        valid: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The query and its content words `[B, S]` of a prompt; see `GIFT` for the rules.

        images `[B, past + S]`: the image keys so far.
        """
        image = images[:, past:]
        ids = pending.ids if pending is not None else None
        after = self._after_image(image, past, valid)
        if self.given is not None and self.given.query is not None:
            query = self._by_hand(self.given.query, "query", past, image)
        elif self.reader is None or ids is None:
            query = after
            self._say(
                "no processor",
                "No processor was given to wrap, so the question cannot be told from the text "
                "around it: all text after the image counts as the question, and all of its "
                "words as content. Pass wrap(..., processor=processor).",
            )
        else:
            query = self._spans(self.reader, ids, after, images.any(1).tolist())
        query = query & (images.cumsum(1)[:, past:] > 0) & ~image
        if isinstance(words, Tensor):
            content = query & self._by_hand(words, "words", past, image)
        elif self.reader is None or ids is None:
            content = query
        else:
            content = self._content(self.reader, ids, query, words)
        if past:
            content = content.clone()
            content[:, 0] = False  # its predecessor was read in an earlier forward
        return query, torch.where(content.any(1, keepdim=True), content, query)

    def _after_image(self, image: Tensor, past: int, valid: Tensor) -> Tensor:
        """Text after the last image token; in a later turn without an image all but the answer's
        last token.
        """
        later_image = image.flip(1).cumsum(1).flip(1) > 0
        after = ~later_image & valid
        if past:
            after[:, 0] = False
        return after

    def _spans(
        self, reader: QuestionReader, ids: Tensor, after: Tensor, seen: Sequence[bool]
    ) -> Tensor:
        """The last user text `[B, S]` of every sample that has an image."""
        query = torch.zeros_like(after)
        for sample, tokens in enumerate(ids.tolist()):
            if not seen[sample]:
                continue
            span = reader.span(tokens)
            if span is None:
                query[sample] = after[sample]
                self._say(
                    "template",
                    "A prompt does not follow the processor's chat template, so all text after "
                    "the image counts as its question. Render prompts with "
                    "processor.apply_chat_template, or give masks: patch.prompt(query=mask).",
                )
            else:
                query[sample, span[0] : span[1]] = True
        return query

    def _content(self, reader: QuestionReader, ids: Tensor, query: Tensor, words: str) -> Tensor:
        content = torch.zeros_like(query)
        for sample, tokens in enumerate(ids.tolist()):
            where = query[sample].nonzero().flatten()
            marks = reader.content([tokens[i] for i in where.tolist()], words)
            content[sample, where] = torch.tensor(marks, dtype=torch.bool, device=query.device)
        return content

    def _check_seen(self, seen: Tensor) -> None:
        if not seen.all():
            self._say(
                "no image",
                f"{int((~seen).sum())} of {len(seen)} prompts hold no image: they run as in the "
                "stock model.",
            )

    def _say(self, key: str, message: str) -> None:
        """Warns once per patch."""
        if key not in self.said:
            self.said.add(key)
            warnings.warn(message, stacklevel=2)

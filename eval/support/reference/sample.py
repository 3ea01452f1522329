"""One sample as the unpatched model hands it to its decoder, with the roles of its tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from eval.support.reference import paint
from eval.support.reference.paint import Picture

TOWER_ATTENTION = ("CLIPAttention", "VisionAttention")


@dataclass(frozen=True)
class Turn:
    """One question: positions start..end-1 are fed at once and row end-1 predicts the answer.

    query and content are bool [end]: the tokens of the question, and its content words.
    """

    start: int
    end: int
    query: Tensor
    content: Tensor


@dataclass(frozen=True)
class Sample:
    """embeds [S, D] and positions ([S], or [3, S] for m-rope) of prompt and generated tokens.

    image is bool [S]. Tokens after the last turn's end, and between one turn's end and the next
    turn's start, are generated ones. rounded: what a lossy cache gives back of the keys or values
    [groups, S, d] of a layer, given how many tokens the first prompt has; rows behind that see it.
    pictures: what the vision tower looks at in each image. with_pixels: embeds of the prompt [n, D]
    with the pixels of each image changed by a function.
    """

    embeds: Tensor
    positions: Tensor
    image: Tensor
    turns: tuple[Turn, ...]
    rounded: Callable[[Tensor, int], Tensor] | None = None
    pictures: tuple[Picture, ...] = ()
    with_pixels: Callable[[Callable[[Tensor], Tensor]], Tensor] | None = None

    @property
    def length(self) -> int:
        return self.embeds.shape[0]

    def until(self, end: int) -> "Sample":
        """The first `end` positions, with the turns that begin among them."""
        turns = tuple(turn for turn in self.turns if turn.start < end)
        pictures = tuple(one for one in self.pictures if one.places[-1] < end)
        return Sample(
            self.embeds[:end],
            self.positions[..., :end],
            self.image[:end],
            turns,
            pictures=pictures,
            with_pixels=self.with_pixels,
        )

    def followed_by(self, model: Any, ids: Tensor) -> "Sample":
        """This sample with the text tokens ids [n] after it: teacher-forced generated tokens."""
        embeds = model.get_input_embeddings()(ids).detach().double()
        fresh = self.positions.max() + 1 + torch.arange(len(ids))
        positions = torch.cat([self.positions, fresh.expand(*self.positions.shape[:-1], -1)], -1)
        image = torch.cat([self.image, torch.zeros(len(ids), dtype=torch.bool)])
        return Sample(
            torch.cat([self.embeds, embeds]),
            positions,
            image,
            self.turns,
            pictures=self.pictures,
            with_pixels=self.with_pixels,
        )

    def asked(
        self, model: Any, ids: Tensor, query: Tensor | None = None, content: Tensor | None = None
    ) -> "Sample":
        """This sample with a further turn fed as ids [n]; query, content bool [n], all by default.

        generate() never feeds the last token of an answer: it comes first in the next turn's ids.
        """
        longer = self.followed_by(model, ids)
        before = torch.zeros(self.length, dtype=torch.bool)
        query = torch.ones(len(ids), dtype=torch.bool) if query is None else query
        content = query if content is None else content
        turn = Turn(
            self.length, longer.length, torch.cat([before, query]), torch.cat([before, content])
        )
        return replace(longer, turns=(*self.turns, turn))


class _Captured(Exception):
    """Stops the model's forward once the decoder's inputs are known."""


def capture(
    model: Any,
    inputs: Mapping[str, Tensor],
    generated: Tensor | None = None,
    query: Tensor | None = None,
    content: Tensor | None = None,
    image: Tensor | None = None,
) -> Sample:
    """The sample of one unpadded prompt (batch 1) of an unpatched model.

    generated: ids [n] of teacher-forced tokens. query: bool [prompt], by default all text after
    the last image token up to the last prompt token. content: bool [prompt], by default query.
    image: bool [prompt], by default the placeholders.
    """
    caught, entered = _entering(model, inputs)
    ids = inputs["input_ids"][0]
    places = (ids == model.config.image_token_id) if image is None or entered else image
    if entered and not places.any():
        places = image
    pictures = paint.pictures(model, entered, places.nonzero().flatten())
    image = ids == model.config.image_token_id if image is None else image
    query = text_after_last_image(image) if query is None else query
    content = query if content is None else content
    embeds = caught["inputs_embeds"][0].double()
    positions = plain_positions(caught.get("position_ids"), len(ids))
    turns = (Turn(0, len(ids), query, content),)

    def with_pixels(change: Callable[[Tensor], Tensor]) -> Tensor:
        other: Tensor = _entering(model, {**inputs, **_changed(inputs, change)})[0][
            "inputs_embeds"
        ][0]
        return other.double()

    sample = Sample(embeds, positions, image, turns, pictures=pictures, with_pixels=with_pixels)
    return sample if generated is None else sample.followed_by(model, generated)


def _changed(inputs: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The pixels of every image changed; those of Qwen's are patches in one row."""
    found = {}
    for name, grid in (
        ("pixel_values", "image_grid_thw"),
        ("pixel_values_videos", "video_grid_thw"),
    ):
        if name in inputs and grid in inputs:
            sizes = [int(t * h * w) for t, h, w in inputs[grid]]
            found[name] = torch.cat([change(image) for image in torch.split(inputs[name], sizes)])
        elif name in inputs:
            found[name] = torch.stack([change(image) for image in inputs[name]])
    return found


def _entering(
    model: Any, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[nn.Module, Any]]:
    """What enters the decoder, by name, and what enters each attention of the vision tower."""
    caught: dict[str, Any] = {}
    entered: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        caught.update(kwargs)
        raise _Captured

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[layer] = args, kwargs

    tower = [module for module in model.modules() if type(module).__name__ in TOWER_ATTENTION]
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in tower]
    handles.append(model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**inputs)
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught, entered


def plain_positions(given: Tensor | None, length: int) -> Tensor:
    """[S], or [3, S] where the model hands its decoder m-rope positions."""
    if given is None:
        return torch.arange(length)
    return given[-3:, 0] if given.ndim == 3 else given[0]


def text_after_last_image(image: Tensor) -> Tensor:
    """bool [S]: the query where no processor tells (issue 2, settled item 4)."""
    places = torch.arange(len(image))
    last = places[image].max() if image.any() else -1
    return places > last

"""Where the user's question stands among the prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vlm_patch.errors import PatchError
from vlm_patch.prompts.content_words import content_words, spacy_words


@dataclass(frozen=True)
class Template:
    """The tokens that a chat template puts around the user's text.

    after_image: between the last image token and the text. header: between an answer and the text
    of the next turn. ending: behind the text.
    """

    after_image: tuple[int, ...]
    header: tuple[int, ...]
    ending: tuple[int, ...]


def read_template(processor: Any, image_ids: Sequence[int]) -> Template:
    """Learns the template by rendering it around a marker. Raises PatchError where that cannot be
    done.
    """
    answer, marker = "Seven boats.", "Count quirky kites"
    text = {"type": "text", "text": marker}
    pictured = [{"role": "user", "content": [{"type": "image"}, text]}]
    later = [
        {"role": "user", "content": [{"type": "text", "text": "Describe zebras."}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": [text]},
    ]
    try:
        before, ending = _around(processor, pictured, marker)
        header, _ = _around(processor, later, marker, behind=answer)
    except Exception as error:
        raise PatchError(
            f"the chat template of {type(processor).__name__} could not be read ({error}), so the "
            "question cannot be told from the text around it. Pass a processor with a chat "
            "template and a fast tokenizer, or give the question by hand: with "
            "patch.prompt(query=mask)."
        ) from error
    images = [i for i, token in enumerate(before) if token in image_ids]
    if not images:
        raise PatchError(
            f"{type(processor).__name__} renders an image without an image token of this model "
            f"({list(image_ids)}): it is the processor of another model. Pass this model's own."
        )
    blank = {i for i in (*before, *header, *ending) if not processor.tokenizer.decode([i]).strip()}
    return Template(
        _rstrip(before[images[-1] + 1 :], blank),
        _rstrip(header, blank),
        _rstrip(ending[::-1], blank)[::-1],
    )


def _rstrip(ids: list[int], blank: set[int]) -> tuple[int, ...]:
    """Without the white space next to the text: it may melt into the first or last word."""
    while ids and ids[-1] in blank:
        ids = ids[:-1]
    return tuple(ids)


def _around(
    processor: Any, messages: list[dict[str, Any]], marker: str, behind: str = ""
) -> tuple[list[int], list[int]]:
    """The tokens in front of the last `marker` (and behind the last `behind`), and the tokens after
    it.
    """
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    start = text.rindex(marker)
    floor = text.rindex(behind) + len(behind) if behind else 0
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    front = [token for token, (first, last) in spans if first >= floor and last <= start]
    return front, [token for token, (first, _) in spans if first >= start + len(marker)]


class QuestionReader:
    """Finds the last user text of a prompt, and its content words, from the token ids of one
    sample.

    bare: the model knows no chat; its prompts are the image and the question behind it.
    """

    def __init__(self, processor: Any, image_ids: Sequence[int], bare: bool = False) -> None:
        self.template = None if bare else read_template(processor, image_ids)
        self.tokenizer = processor.tokenizer
        self.image_ids = frozenset(image_ids)

    def span(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Start and end (exclusive) of the last user text in `ids`, or None where the template is
        not recognised.

        Empty where that text stands before the image.
        """
        template = self.template
        if template is None:
            return self._trim(ids, self._behind_image(ids), len(ids))
        end = _find_last(ids, template.ending, len(ids)) if template.ending else len(ids)
        if end is None:
            return None
        image = next((i for i in range(end - 1, -1, -1) if ids[i] in self.image_ids), None)
        start = None if image is None else image + 1 + len(template.after_image)
        if image is not None and tuple(ids[image + 1 : start]) != template.after_image:
            return None
        start = self._last_turn(template, ids, start, end)
        return None if start is None else self._trim(ids, min(start, end), end)

    def finished(self, ids: Sequence[int]) -> bool:
        """Whether `ids` end with what the chat template puts behind the user's text."""
        ending = None if self.template is None else self.template.ending
        return bool(ending) and tuple(ids[-len(ending or ()) :]) == ending

    def _behind_image(self, ids: Sequence[int]) -> int:
        """Where text without a template starts: behind the last image and the special tokens (a
        BOS) that follow it.
        """
        special = frozenset(self.tokenizer.all_special_ids)
        images = [place for place, token in enumerate(ids) if token in self.image_ids]
        start = images[-1] + 1 if images else 0
        while start < len(ids) and ids[start] in special:
            start += 1
        return start

    def _last_turn(
        self, template: Template, ids: Sequence[int], start: int | None, end: int
    ) -> int | None:
        """Where the user text of the last turn in ids[:end] starts, or `start` if none follows.

        start: of an earlier turn's text; None where ids begin inside an answer. Turn by turn, since
        the words of a header ("USER:") may stand in a text too.
        """
        while template.header:
            answer = 0 if start is None else _find(ids, template.ending, start, end)
            header = None if answer is None else _find(ids, template.header, answer, end)
            if header is None:
                break
            start = header + len(template.header)
        return start

    def _trim(self, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
        """Without tokens of white space at either end."""
        while start < end and not self.tokenizer.decode([ids[start]]).strip():
            start += 1
        while start < end and not self.tokenizer.decode([ids[end - 1]]).strip():
            end -= 1
        return start, end

    def content(self, ids: Sequence[int], mode: str) -> list[bool]:
        """Which of the question's tokens `ids` touch a content word; `mode` as in
        `GIFT(words=...)`.
        """
        if mode == "all":
            return [True] * len(ids)
        text = self.tokenizer.decode(list(ids))
        words = spacy_words(text) if mode == "spacy" else content_words(text)
        # a letter cut in its bytes decodes to U+FFFD, and is not there yet
        parts = (self.tokenizer.decode(list(ids[:count])) for count in range(len(ids) + 1))
        starts = [len(part.rstrip("\ufffd")) for part in parts]
        ends = [max(end, start + 1) for start, end in pairwise(starts)]
        return [
            any(first < end and last > start for first, last in words)
            for start, end in zip(starts, ends, strict=False)
        ]


def _find(ids: Sequence[int], part: tuple[int, ...], first: int, end: int) -> int | None:
    """Where `part` begins for the first time in ids[first:end]."""
    for start in range(first, end - len(part) + 1):
        if tuple(ids[start : start + len(part)]) == part:
            return start
    return None


def _find_last(ids: Sequence[int], part: tuple[int, ...], end: int) -> int | None:
    """Where `part` begins for the last time in ids[:end]."""
    for start in range(end - len(part), -1, -1):
        if tuple(ids[start : start + len(part)]) == part:
            return start
    return None

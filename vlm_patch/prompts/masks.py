"""What the tokens of a prompt are: image, question, content words of the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_patch.errors import PatchError
from vlm_patch.prompts.question import QuestionReader


@dataclass
class ManualMasks:
    """Masks given by hand for the prompts of a `with patch.prompt(...)` block, `[batch, prompt
    length]` (bool).
    """

    image: Tensor | None = None
    query: Tensor | None = None


@dataclass
class PromptMasks:
    """The N tokens of a prompt that stand behind `past` cached ones, padding included.

    ids `[B, N]`: None where embeddings were given instead. images: whether they come with images;
    only then are placeholder ids images. valid `[B, N]`: no padding. where `[B, N]`: the image
    tokens, from models that take a mask of them.
    """

    past: int
    ids: Tensor | None
    images: bool
    valid: Tensor
    where: Tensor | None = None

    @property
    def nothing(self) -> Tensor:
        """A mask `[B, N]` of none of its tokens."""
        return torch.zeros_like(self.valid)


@dataclass
class Reader:
    """Reads masks off a prompt.

    image_ids: placeholder ids. questions: knows the chat template; None without a processor. say:
    warns once, given what it is about and a message.
    """

    image_ids: Sequence[int]
    questions: QuestionReader | None
    say: Callable[[str, str], None]

    def image(self, prompt: PromptMasks, given: ManualMasks | None) -> Tensor:
        """The image tokens `[B, N]`. Raises PatchError where they cannot be told."""
        if given is not None and given.image is not None:
            return by_hand(given.image, "image", prompt)
        if prompt.where is not None:
            return prompt.where.to(prompt.valid.device).bool()
        if prompt.ids is None:
            raise PatchError(
                "the image tokens of this prompt cannot be told: the model was called with "
                "inputs_embeds, or not through its own forward or generate. Call the wrapped "
                "model with input_ids, or give the mask: with patch.prompt(image=mask, "
                "query=mask)."
            )
        result = prompt.nothing
        if prompt.images:
            ids = prompt.ids.to(result.device)
            for token in self.image_ids:
                result |= ids == token
        return result

    def question(
        self, prompt: PromptMasks, given: ManualMasks | None, words: str | Tensor, images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The query and its content words `[B, N]`; see `GIFT` for the rules.

        images `[B, past + N]`: the image keys so far.
        """
        image = images[:, prompt.past :]
        after = _after_image(image, prompt)
        if given is not None and given.query is not None:
            query = by_hand(given.query, "query", prompt)
        elif self.questions is None or prompt.ids is None:
            query = after
            self.say(
                "no processor",
                "No processor was given to wrap, so the question cannot be told from the text "
                "around it: all text after the image counts as the question, and all of its "
                "words as content. Pass wrap(..., processor=processor).",
            )
        else:
            query = self._spans(self.questions, prompt.ids, after, images.any(1).tolist())
            if prompt.past:
                query[:, 0] = False  # the answer's last token
        query = query & (images.cumsum(1)[:, prompt.past :] > 0) & ~image
        if isinstance(words, Tensor):
            content = query & by_hand(words, "words", prompt)
        elif self.questions is None or prompt.ids is None:
            content = query
        else:
            content = _content(self.questions, prompt.ids, query, words)
        content = torch.where(content.any(1, keepdim=True), content, query)
        if prompt.past and content[:, 0].any():
            raise PatchError(
                "the first token of this turn is a content word of its question by the masks "
                "given, but the row before it was generated, and was not kept. Leave that token "
                "out of the mask (it ends the answer), or give the conversation without a cache."
            )
        return query, content

    def _spans(
        self, reader: QuestionReader, ids: Tensor, after: Tensor, seen: Sequence[bool]
    ) -> Tensor:
        """The last user text `[B, N]` of every sample that has an image."""
        query = torch.zeros_like(after)
        for sample, tokens in enumerate(ids.tolist()):
            if not seen[sample]:
                continue
            span = reader.span(tokens)
            if span is None:
                query[sample] = after[sample]
                self.say(
                    "template",
                    "A prompt does not follow the processor's chat template, so all text after "
                    "the image counts as its question. Render prompts with "
                    "processor.apply_chat_template, or give masks: patch.prompt(query=mask).",
                )
            else:
                query[sample, span[0] : span[1]] = True
        return query


def by_hand(mask: Tensor, name: str, prompt: PromptMasks) -> Tensor:
    """A mask over the whole padded prompt, repeated for beams and return sequences, cut to what is
    new. Raises PatchError where it does not fit.
    """
    batch, rows = prompt.valid.shape
    expected = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 2
    if not expected:
        result = type(mask).__name__
        if isinstance(mask, Tensor):
            result = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise PatchError(f"{name} mask: found {result}, expected bool [batch, prompt length]")
    end = prompt.past + rows
    if mask.shape[1] != end or not len(mask) or batch % len(mask):
        raise PatchError(
            f"{name} mask: found shape {tuple(mask.shape)}, but the prompt is {end} tokens long "
            f"(padding included) in a batch of {batch}"
        )
    return expand(mask, batch).to(prompt.valid.device)[:, prompt.past :]


def expand(rows: Tensor, batch: int) -> Tensor:
    """One row per prompt, repeated to `batch` as transformers does for beams and sequences."""
    return rows.repeat_interleave(batch // len(rows), 0)


def _after_image(image: Tensor, prompt: PromptMasks) -> Tensor:
    """Text after the last image token; in a later turn without an image all but the answer's last
    token.
    """
    later_image = image.flip(1).cumsum(1).flip(1) > 0
    after = ~later_image & prompt.valid
    if prompt.past:
        after[:, 0] = False
    return after


def _content(reader: QuestionReader, ids: Tensor, query: Tensor, words: str) -> Tensor:
    content = torch.zeros_like(query)
    for sample, tokens in enumerate(ids.tolist()):
        where = query[sample].nonzero().flatten()
        marks = reader.content([tokens[i] for i in where.tolist()], words)
        content[sample, where] = torch.tensor(marks, dtype=torch.bool, device=query.device)
    return content

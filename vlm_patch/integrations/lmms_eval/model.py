"""The class that lmms-eval asks for answers. Needs lmms-eval (the extra `lmms`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from vlm_patch.integrations.lmms_eval import answers
from vlm_patch.integrations.lmms_eval.arguments import build_methods, listed, whole
from vlm_patch.patch import Patch, wrap


class VlmPatch(lmms):  # type: ignore[misc]
    """A vision-language model of transformers with methods on it, as a chat model of lmms-eval.

    methods: "var+gift", or "baseline" for the stock model; their hyperparameters follow as
    `gift.alpha=4`. layers, heads: as in `wrap`, with + for a comma. chat_template: Jinja, for a
    model that has none. The rest goes to `from_pretrained`. Raises ValueError for an argument that
    is not known.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        methods: str | None = None,
        layers: Any = None,
        heads: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        chat_template: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        chosen = build_methods(methods, options)
        self.batch_size = whole("batch_size", batch_size)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.model, self.processor = answers.load(
            pretrained,
            device if device and self._world_size == 1 else self.accelerator.device,
            device_map,
            chat_template,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
        self._said: set[str] = set()
        self.patch: Patch | None = None
        if chosen:
            with self._heard():
                self.patch = wrap(
                    self.model,
                    *chosen,
                    processor=self.processor,
                    layers=listed(layers),
                    heads=listed(heads),
                )
        logger.info(self.patch.describe() if self.patch else f"{pretrained}: the stock model")

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        device: torch.device = self.model.device
        return device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """The answers to the requests, in their order."""
        arguments = [request.args for request in requests]
        kinds = [json.dumps([args[2], *args[4:6]], sort_keys=True) for args in arguments]
        plan = answers.batches(kinds, [len(args[0]) for args in arguments], self.batch_size)
        responses: dict[int, Any] = {}
        for indices in tqdm(plan, desc="Model Responding", disable=self.rank != 0):
            responses |= zip(
                indices, self._batch([arguments[index] for index in indices]), strict=True
            )
        return [responses[index] for index in range(len(arguments))]

    def _batch(self, arguments: Sequence[Any]) -> list[Any]:
        """The answers to requests with one set of generation_kwargs."""
        settings_given = arguments[0][2]
        settings, ignored = answers.search(settings_given)
        if ignored:
            self._say(f"generation_kwargs without effect here: {', '.join(ignored)}")
        with self._heard():
            responses = answers.answer(
                self.model,
                self.processor,
                [self._conversation(args) for args in arguments],
                settings,
            )
        until = answers.stops(settings_given)
        results = []
        for (context, *_), answer in zip(arguments, responses, strict=True):
            text = answers.cut(answer.text, until)
            self.cache_hook.add_partial("generate_until", (context, settings_given), text)
            results.append(GenerationResult(text, TokenCounts(output_tokens=answer.tokens)))
        return results

    def _conversation(self, args: Sequence[Any]) -> list[dict[str, Any]]:
        _, doc_to_messages, _, number, task, split = args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
        conversation: list[dict[str, Any]] = messages.to_hf_messages()
        return conversation

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Refused: raises ValueError."""
        raise ValueError(
            "the vlm_patch model of lmms-eval answers by generating (output_type: generate_until). "
            "The likelihood of a given answer is not supported: it is read from one forward over "
            "question and answer, where methods that act at the last row would not act as they do "
            "while an answer is written"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refused: raises ValueError."""
        raise ValueError(
            "the vlm_patch model of lmms-eval answers one question at a time (output_type: "
            "generate_until); tasks of several rounds are not supported"
        )

    def clean(self) -> None:
        """Takes the patch off and lets go of the model."""
        if self.patch:
            self.patch.remove()
            self.patch = None
        super().clean()

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Warnings go to lmms-eval's log, each once: lmms-eval switches Python's own off."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", module=r"vlm_patch(\.|$)")
            try:
                yield
            finally:
                for warning in caught:
                    self._say(str(warning.message))

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)

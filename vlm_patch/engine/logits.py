"""The model's own logits, edited where they leave it: so greedy search, sampling, beams and a loop
of one's own all see the edit.

Between decoder and head the rows that methods ask for (of second streams, of early layers) are put
beside the decoder's output as further samples. The model's head and whatever it does to logits acts
on them too, and behind the model they are taken apart again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlm_patch.engine.branches import Branches, Part, Stream, check_known
from vlm_patch.engine.extra_passes import ExtraPasses
from vlm_patch.engine.joint import can_join, join
from vlm_patch.engine.pixels import with_pixels
from vlm_patch.engine.plans import ActiveMethod
from vlm_patch.engine.state import GenerationState
from vlm_patch.errors import PatchError, UnsupportedModelError
from vlm_patch.method import Branch, ForwardContext, Method, Phase
from vlm_patch.models.info import Decoder
from vlm_patch.primitives.buffers import cast

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""What decoders call the norm behind their last block, where early layers were checked."""
HELD = ("visual_pos_masks", "deepstack_visual_embeds")
"""Inputs of a decoder's prompt alone, which the whole model makes anew of other pixels."""
NO_IMAGE = "no image"
"""The name of the stream that all methods share which want no more than the image gone."""


@dataclass
class LogitsJob:
    """What is done to the logits of one forward.

    actives: the methods that edit them, in order. everyone: all methods that are on.
    given: the inputs of the decoder. rows: how many of its last rows predict a new token.
    entering: by early layer, the residual stream `[B, rows, D]` entering it.
    joint: the first stream's cache, where all streams run in one forward.
    ready: logits `[B, rows, V]` by stream. beside: the names, of streams or early layers, of what
        stands beside the decoder's output, each as many samples as the batch.
    """

    forward: ForwardContext
    generation: GenerationState
    actives: list[ActiveMethod]
    everyone: Sequence[ActiveMethod]
    given: dict[str, Any]
    rows: int
    entering: dict[int, Tensor] = field(default_factory=dict)
    joint: Any = None
    ready: dict[str | int, Tensor] = field(default_factory=dict)
    beside: list[str | int] = field(default_factory=list)


class LogitsEditor(threading.local):
    """Follows a forward from the whole model to its logits; one state per thread.

    module, inputs: the whole model that runs, and its inputs. asked: the arguments of the
    `generate` that it runs in. job: what is to be done.
    """

    def __init__(self, decoder: Decoder, extra: ExtraPasses, branches: Branches) -> None:
        self.decoder, self.extra, self.branches = decoder, extra, branches
        self.module: Any = None
        self.inputs: Mapping[str, Any] = {}
        self.asked: Mapping[str, Any] = {}
        self.job: LogitsJob | None = None

    @contextmanager
    def generating(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """While `generate` runs on these arguments, perhaps inside another `generate`."""
        before, self.asked = self.asked, arguments
        try:
            yield
        finally:
            self.asked = before

    def before_model(self, module: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Called before the whole model runs, of several around each other for each."""
        self.module, self.inputs, self.job = module, inputs, None

    def start(
        self,
        forward: ForwardContext,
        generation: GenerationState,
        actives: Sequence[ActiveMethod],
        given: dict[str, Any],
    ) -> None:
        """Called when the decoder is about to run on inputs `given`, of samples with an image."""
        mine = [active for active in actives if active.method.edits_logits]
        if not mine:
            return
        _check(self.module, self.inputs)
        at, rows = forward.position, forward.valid.shape[1]
        if at.prompt_rows:
            rows = rows - at.prompt_rows + 1 if at.ends else 0
        self.job = LogitsJob(forward, generation, mine, actives, given, rows)

    def join(self, given: dict[str, Any]) -> dict[str, Any]:
        """The decoder's inputs, at a generated token with those of the streams beside them."""
        job, name = self.job, self.extra.cache_name
        if job is None or job.forward.position.phase is not Phase.DECODE or _looks_on(job):
            return given
        cache, past = given.get(name), job.forward.position.past
        wanted = dict(self._streams(job.actives))
        streams = [self.branches.stream(one, job.generation.streams, past, given) for one in wanted]
        if not can_join(self.decoder, given, cache, streams):
            return given
        parts = [
            self.branches.part(one, branch, stream, job.forward, given)
            for (one, branch), stream in zip(wanted.items(), streams, strict=True)
        ]
        job.joint, job.beside = cache, [*wanted]
        return join(self.extra.now, given, name, streams, parts)

    def enter(self, layer: int) -> Callable[..., None]:
        """A forward pre-hook for the block of an early layer."""

        def keep(block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            if self.job is not None and self.job.rows and not self.extra.now.inside:
                hidden = args[0] if args else kwargs["hidden_states"]
                batch, rows = self.job.forward.valid.shape  # of more: streams, a packed prompt
                self.job.entering[layer] = hidden[:batch, :rows][:, -self.job.rows :]

        return keep

    def after_decoder(self, output: Any) -> None:
        """Called behind the decoder: runs the streams, and puts rows beside its output; None after
        an error.
        """
        job, self.extra.now.joint = self.job, None
        if job is None or output is None:
            self.job, self.module, self.inputs = None, None, {}
            return
        last: Tensor = output["last_hidden_state"][: len(job.forward.valid)]
        found: dict[str | int, Tensor] = {}
        if job.joint is not None:
            output[self.extra.cache_name] = job.joint
        for stream, branch in () if job.joint is not None else self._streams(job.actives):
            told = self._follow(stream, branch, job)
            if told is not None and job.rows:
                found[stream] = told[:, -job.rows :]
        if job.rows:
            norm = final_norm(self.decoder)
            found |= {layer: norm(hidden) for layer, hidden in job.entering.items()}
        for name, hidden in found.items():
            job.beside.append(name)
            whole = last.new_zeros(last.shape) if last.shape[1] > job.rows else None
            hidden = hidden.to(last.device)
            if whole is not None:
                hidden = torch.cat((whole[:, job.rows :], hidden), 1)
            output["last_hidden_state"] = torch.cat((output["last_hidden_state"], hidden))

    def after_model(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the whole model: takes its logits apart, and edits them."""
        if self.extra.now.inside:
            return None
        job, self.job, self.module, self.inputs = self.job, None, None, {}
        if job is None or not job.rows:
            return None
        logits, *beside = output.logits.chunk(1 + len(job.beside))
        rows = min(job.rows, logits.shape[1])
        dtype = torch.promote_types(logits.dtype, torch.float32)
        others = {**dict(zip(job.beside, beside, strict=True)), **job.ready}
        others = {name: cast(of[:, -rows:], dtype) for name, of in others.items()}
        stock = edited = cast(logits[:, -rows:], dtype)
        forward = job.forward.on(logits.device)
        for active in job.actives:
            named: dict[str | int, Tensor] = {i: others[i] for i in active.method.early_layers()}
            for name, branch in active.method.branches().items():
                named[name] = others[stream_name(active.method, name, branch)]
            edited = active.method.edit_logits(edited, named, forward, active.state)
        edited = cast(torch.where(forward.seen[:, None, None], edited, stock), logits.dtype)
        if rows < logits.shape[1]:
            edited = torch.cat((logits[:, :-rows], edited), 1)
        output["logits"] = edited
        return output

    def _streams(self, actives: Sequence[ActiveMethod]) -> Iterator[tuple[str, Branch]]:
        """The streams that methods ask for; one for all that want the same."""
        found: dict[str, Branch] = {}
        for active in actives:
            for name, branch in active.method.branches().items():
                found[stream_name(active.method, name, branch)] = branch
        yield from found.items()

    def _follow(self, name: str, branch: Branch, job: LogitsJob) -> Tensor | None:
        """The last hidden states of a stream that follows this forward; None where the whole model
        ran for it, whose logits are kept.
        """
        forward, given = job.forward, job.given
        at, rows = forward.position, forward.valid.shape[1]
        stream = self.branches.stream(name, job.generation.streams, at.past, given)
        pictured = bool(at.prompt_rows and forward.image[:, forward.new].any())
        if branch.pixels is None or not pictured:
            part = self.branches.part(name, branch, stream, forward, given)
            return self.branches.run(stream, part, rows)
        check_known(name, given, HELD)
        inputs = with_pixels(name, branch, self.inputs, self.asked, forward, self.decoder)
        job.ready[name] = self._whole(stream, Part(forward.valid, inputs), job)
        return None

    def _whole(self, stream: Stream, part: Part, job: LogitsJob) -> Tensor:
        """The logits of a stream whose prompt must pass through the whole model."""
        mask = stream.grow(part, part.valid.shape[1])
        cached = {"use_cache": stream.cache is not None, **self._cache(stream.cache)}
        inputs = {**part.inputs, "attention_mask": mask, "logits_to_keep": max(1, job.rows)}
        logits: Tensor = self.extra.run(None, {**inputs, **cached}, self.module).logits
        return logits[:, -max(1, job.rows) :]

    def _cache(self, cache: Any) -> dict[str, Any]:
        """A cache by the names under which the whole model may have been given another."""
        given = [name for name in ("cache", "past_key_values") if name in self.inputs]
        return dict.fromkeys(given or [self.extra.cache_name], cache)


def _looks_on(job: LogitsJob) -> bool:
    """Whether a method sees the residual stream in this forward, which is the first stream's."""
    return any(active.method.reads_blocks or active.method.in_stream for active in job.everyone)


def stream_name(method: Method, name: str, branch: Branch) -> str:
    """What a stream is called in a generation; the same for methods that share it."""
    return NO_IMAGE if branch == Branch(image=False) else f"{method.name} ({name})"


def final_norm(decoder: Decoder) -> Callable[[Tensor], Tensor]:
    """The norm behind the last block. Raises UnsupportedModelError where none is found."""
    found = [getattr(decoder.module, name, None) for name in NORMS]
    norms: list[Any] = [module for module in found if isinstance(module, nn.Module)]
    if not norms:
        raise UnsupportedModelError(
            f"a {decoder.kind} has no norm behind its last block under a name known here "
            f"({', '.join(NORMS)}), so that its early layers cannot be read as logits"
        )
    return norms[0]  # type: ignore[no-any-return]


def check_model(methods: Sequence[Method], decoder: Decoder) -> None:
    """Raises UnsupportedModelError for methods whose streams or early layers cannot be had, and
    ValueError for layers that are not there.
    """
    for method in methods:
        branches = method.branches().values()
        if branches and decoder.special.positions_from_padding:
            raise UnsupportedModelError(
                f"{method.name} is not supported on this model: its decoder counts positions by "
                "itself, so that a second stream cannot have a prompt of its own"
            )
        if decoder.special.generator and any(branch.pixels for branch in branches):
            raise UnsupportedModelError(
                f"{method.name} is not supported on this model: it generates from embeddings, so "
                "that other pixels cannot be put into a second stream"
            )
        for layer in method.early_layers():
            final_norm(decoder)
            if layer not in decoder.softmax:
                raise ValueError(
                    f"{method.name} reads layer {layer} early, but this model has layers with "
                    f"softmax attention, which can be read, in {list(decoder.softmax)}"
                )


def _check(module: Any, inputs: Mapping[str, Any]) -> None:
    """Raises PatchError for a call of the model whose logits cannot be edited rightly."""
    if module is None:
        raise PatchError(
            "the decoder runs without the hooks of the model around it, so that nobody would edit "
            "its logits: found a call of its decoder, or of model.forward. Call the model itself, "
            "model(...), compile it by torch.compile(model), or run inside "
            "`with patch.disabled():`"
        )
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise PatchError(
            "logits_to_keep is a tensor of rows, so it is not known which of them predict a new "
            "token: give an integer, or run inside `with patch.disabled():`"
        )
    if inputs.get("labels") is not None:
        raise PatchError(
            "labels were given, but the loss would be that of logits which no method edited: "
            "leave them out and take the loss of the logits, or run inside "
            "`with patch.disabled():`"
        )
    if inputs.get("return_dict") is False:
        raise PatchError(
            "return_dict=False gives a tuple, in which a method cannot edit the logits: leave "
            "return_dict out"
        )

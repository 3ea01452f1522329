"""What is measured of one type of model: that the patch changes nothing by itself, and that the
methods act where the image is.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

import vlm_patch
from eval.support.build import CLASSES, build
from eval.support.prompts import FORMS, Inputs, prompt
from eval.support.sizes import NOT_BUILT
from vlm_patch import GIFT, VAR, VHR, PatchError, UnsupportedModelError
from vlm_patch.method import ForwardContext, Method, State

STEPS = 3
TOLERANCE = 1e-5
"""Of float32 logits near 1."""
METHODS: tuple[Method, ...] = (
    # random models have no sinks; these values make some of ordinary tokens
    VAR(dims=(3,), tau=1.0, rho_nonsink=0.0, min_image_mass=0.0),
    GIFT(),
    VHR(),
)


@dataclass(frozen=True)
class Row:
    """The result for one type, and why something failed or what is special."""

    type: str
    delegation: bool
    end_to_end: bool
    note: str = ""


@dataclass(frozen=True)
class Same(Method):
    """Computes every row anew and leaves it as it is."""

    name: ClassVar[str] = "same"

    def edited_rows(self, forward: ForwardContext) -> Tensor:
        return forward.valid


@dataclass(frozen=True, eq=False)
class Probe(Method):
    """Edits nothing; keeps the mask of image keys `[2, S]`, what the decoder was given for every
    token and, where it can be seen, what entered its first block."""

    name: ClassVar[str] = "probe"
    reads_blocks: ClassVar[bool] = True
    seen: dict[str, Tensor] = field(default_factory=dict)

    def before_forward(self, forward: ForwardContext, state: State) -> None:
        embeds = forward.inputs.get("inputs_embeds")
        if forward.position.past == 0:
            self.seen["image"] = forward.image & forward.valid
            if embeds is not None:
                self.seen["entering"] = embeds.clone()

    def observe_hidden(
        self, layer: int, hidden: Tensor, forward: ForwardContext, state: State
    ) -> None:
        if forward.position.past == 0 and layer == 0 and hidden.shape[:2] == forward.valid.shape:
            self.seen["entering"] = hidden.clone()


class Subject:
    """A tiny model with its prompt, and what it answers unpatched. Raises UnsupportedModelError,
    and what the model itself raises.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, build(kind)
        self.config, self.keys = self.model.config.to_dict(), list(self.model.state_dict())
        self.form = FORMS[0]
        vlm_patch.wrap(self.model, Probe()).remove()
        self.stock = self._first_answer()

    def _first_answer(self) -> Tensor:
        """Unpatched, with the first form of image features that the model takes."""
        errors = []
        for self.form in FORMS:
            try:
                return self.answer()
            except Exception as error:  # of any kind: a form that this model does not take
                errors.append(error)
        raise errors[0]

    def prompt(self, seed: int = 0) -> Inputs:
        return prompt(self.kind, self.model, seed, self.form)

    def answer(self, seed: int = 0) -> Tensor:
        """The logits `[2, STEPS, V]` of a greedy generation."""
        output = self.model.generate(
            **self.prompt(seed),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits, 1)

    def stays_stock(self) -> bool:
        """Whether it answers as it did at first, bit for bit."""
        return torch.equal(self.answer(), self.stock)

    def untouched(self) -> bool:
        """Whether config, parameters and answer are what they were at first."""
        config, keys = self.model.config.to_dict(), list(self.model.state_dict())
        return config == self.config and keys == self.keys and self.stays_stock()


@torch.no_grad()
def measure(kind: str) -> Row:
    """Both measurements of a type. delegation: bit-identical logits with every head off, and with
    a method that edits nothing, at prefill and cached decode. end_to_end: the image keys are where
    the image lands, every method acts and stays finite, `remove()` restores everything.
    """
    if kind in NOT_BUILT:
        return Row(kind, False, False, NOT_BUILT[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            subject = Subject(kind)
        except UnsupportedModelError as error:
            said = str(error).removeprefix(f"{CLASSES[kind]} ").removeprefix("is not supported: ")
            return Row(kind, False, False, f"refused: {said}")
        except Exception as error:  # whatever a model of this type raises is its result
            return Row(kind, False, False, f"the stock model does not run: {_short(error)}")
        delegation = delegates(subject)
        faults = list(_faults(subject))
    return Row(kind, delegation, not faults, "; ".join(faults) or _place(subject))


def delegates(subject: Subject) -> bool:
    """Whether a wrapped model computes what it did, with every head off and without an edit."""
    with vlm_patch.wrap(subject.model, Probe(), *_accepted(subject)) as patch:
        names = [name for name in patch.heads if name != Probe.name]
        with patch.disabled(*names) if names else nullcontext():
            idle = subject.stays_stock()
        for table in patch.heads.values():
            table[:] = False
        return idle and subject.stays_stock()


def _accepted(subject: Subject) -> list[Method]:
    """The methods that can be put on this model."""
    return [method for method in METHODS if not _refusal(subject, method)]


def _refusal(subject: Subject, method: Method) -> str:
    try:
        vlm_patch.wrap(subject.model, method).remove()
    except UnsupportedModelError as error:
        return str(error)
    return ""


def _faults(subject: Subject) -> Iterator[str]:
    """What keeps a type from passing end to end, in words."""
    said = {
        method.name: _refusal(subject, method) or _acting(subject, [method]) for method in METHODS
    }
    if any(said.values()):
        acting = [name for name in said if not said[name]]
        yield f"acting: {', '.join(acting) or 'none'}"
        yield from filter(None, said.values())
    else:
        checks = (_landing(subject), _recomputing(subject), _acting(subject, METHODS))
        yield from filter(None, checks)
    if not subject.untouched():
        yield "remove() does not restore the model"


def _acting(subject: Subject, methods: Sequence[Method]) -> str:
    """What is wrong with an answer under these methods; empty if they act."""
    names = ", ".join(method.name for method in methods)
    with vlm_patch.wrap(subject.model, *methods):
        try:
            answer = subject.answer()
        except (UnsupportedModelError, PatchError) as error:
            return f"{names}: {error}"
    if not answer.isfinite().all():
        return f"{names}: the answer is not finite"
    # rows that are computed anew differ in their last bits, which is no effect
    apart = float((answer - subject.stock).abs().max())
    return "" if apart > TOLERANCE else f"{names} changes nothing"


def _recomputing(subject: Subject) -> str:
    """Whether rows that are computed explicitly come out as the stock kernel's."""
    with vlm_patch.wrap(subject.model, Same()):
        apart = float((subject.answer() - subject.stock).abs().max())
    return "" if apart <= TOLERANCE else f"rows computed anew are {apart:.1e} from the kernel's"


def _landing(subject: Subject) -> str:
    """Whether another image changes what enters the decoder at the image keys and nowhere else.

    A key that no image changes (the end of a row) must at least hold no placeholder's embedding.
    """
    first, second = (_probed(subject, seed) for seed in (0, 1))
    if not first["image"].any():
        return "no image key was found"
    changed = (first["entering"] != second["entering"]).any(-1)
    ids = subject.prompt()["input_ids"]
    filled = (first["entering"] != subject.model.get_input_embeddings()(ids)).any(-1)
    right = not (changed & ~first["image"]).any() and bool(filled[first["image"]].all())
    return "" if right and changed.any() else "the image lands elsewhere than at the image keys"


def _probed(subject: Subject, seed: int) -> dict[str, Tensor]:
    probe = Probe()
    with vlm_patch.wrap(subject.model, probe):
        subject.answer(seed)
    return dict(probe.seen)


def _place(subject: Subject) -> str:
    """Where the softmax attention is, if not in every layer."""
    depth = subject.model.config.get_text_config().num_hidden_layers
    with vlm_patch.wrap(subject.model, Probe()) as patch:
        layers = patch.describe().splitlines()[0].rpartition(" in ")[2]
    everywhere = f"0-{depth - 1}"
    if layers == everywhere:
        return ""
    return f"hybrid: the methods act in its softmax layers, here {layers} of {everywhere}"


def _short(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"

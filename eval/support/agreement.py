"""The same methods twice, for the reference and for the library, and how far both are apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eval.support import tiny
from eval.support.reference import (
    Deco,
    Dola,
    Gift,
    Icd,
    M3id,
    Method,
    Paint,
    Sample,
    Var,
    Vcd,
    Vhr,
    logits,
)
from vlm_patch import GIFT, ICD, M3ID, PAINT, VAR, VCD, VHR, DeCo, DoLa

DIMS = tiny.SINK_DIMS
TAU = 3.0

ROLE = (77, 78, 79)
TABLE = ((0.3, 0.1, 0.4, 0.2), (0.0, 0.2, 0.1, 0.3), (0.5, 0.0, 0.4, 0.1), (0.2, 0.3, 0.5, 0.4))
PAIRS: dict[str, tuple[Method, Any]] = {
    "var": (Var(DIMS, TAU), VAR(tau=TAU, dims=DIMS)),
    "var-all-fields": (
        Var(DIMS, TAU, 1.0, 0.2, 0.05, 1, exclude_last_layer=False, require_visual_sink=True),
        VAR(1.0, 0.2, 0.05, TAU, DIMS, 1, exclude_last_layer=False, require_visual_sink=True),
    ),
    "var-release": (
        Var(DIMS, TAU, rho_nonsink=0.3, semantics="release"),
        VAR(tau=TAU, dims=DIMS, rho_nonsink=0.3, semantics="release"),
    ),
    "gift": (Gift(3.0, 1, (2, 3)), GIFT(3.0, saliency_layer=1, layers=(2, 3))),
    "gift-inside": (
        Gift(3.0, 2, (1, 2, 3), beta=1.2),
        GIFT(3.0, beta=1.2, saliency_layer=2, layers=(1, 2, 3)),
    ),
    "gift-one-head": (
        Gift(2.0, 3, (0, 2), head_fraction=0.25),
        GIFT(2.0, saliency_layer=3, layers=(0, 2), head_fraction=0.25),
    ),
    "gift-two-maps": (
        Gift(3.0, (0, 2), (1, 3), head_fraction=0.25),
        GIFT(3.0, saliency_layer=[0, 2], layers=(1, 3), head_fraction=0.25),
    ),
    "vhr": (Vhr((1, 2, 3)), VHR(layers=(1, 2, 3))),
    "vhr-paper": (Vhr((0, 2), semantics="paper"), VHR(layers=(0, 2), semantics="paper")),
    "vhr-unfiltered": (
        Vhr((0, 1, 2, 3), alpha=1.7, filter=False),
        VHR(alpha=1.7, layers=(0, 1, 2, 3), filter=False),
    ),
    "paint": (Paint(0.7, 0.4, 0.25, (1, 2, 3)), PAINT(0.7, 0.4, 0.25, layers=(1, 2, 3))),
    "paint-release": (
        Paint(1.0, 0.3, 0.2, (0, 2, 3), "release", 0.3, TABLE),
        PAINT(1.0, 0.3, 0.2, (0, 2, 3), "release", 0.3, TABLE),
    ),
    "paint-guided": (
        Paint(0.7, 0.4, 0.25, (1, 2, 3), gamma=1.5),
        PAINT(0.7, 0.4, 0.25, layers=(1, 2, 3), gamma=1.5),
    ),
    "vcd": (Vcd(1.0, 0.1, 600, 3), VCD(1.0, 0.1, 600, 3)),
    "icd": (Icd(0.5, 0.1, ROLE), ICD(0.5, 0.1, ROLE)),
    "m3id": (M3id(0.1, 0.9), M3ID(0.1, 0.9)),
    "dola": (Dola((0, 1, 2), 0.1), DoLa((0, 1, 2), 0.1)),
    "deco": (Deco((1, 2, 3), top_k=8), DeCo((1, 2, 3), top_k=8)),
}
MODELS: dict[str, Callable[..., Any]] = {
    "llava": tiny.llava,
    "llava-gqa": lambda **options: tiny.llava(kv_heads=2, **options),
    "qwen2-vl": tiny.qwen2_vl,
}


def planted(kind: str, **options: Any) -> Any:
    return tiny.plant(MODELS[kind](**options))


def reference(names: Sequence[str]) -> list[Method]:
    return [PAIRS[name][0] for name in names]


def ours(names: Sequence[str]) -> list[Any]:
    return [PAIRS[name][1] for name in names]


@contextmanager
def own_forwards(model: Any) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Inputs and outputs of the forwards of a wrapped model, but for those that run inside one."""
    seen: list[tuple[dict[str, Any], Any]] = []
    running: list[Any] = []

    def leave(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        running.pop()
        if not running:
            seen.append((inputs, output))

    handles = [
        model.register_forward_pre_hook(lambda *_: running.append(None)),
        model.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def generated(batch: Mapping[str, Tensor], output: Any) -> Tensor:
    """The new tokens `[batch, steps]` of `generate`."""
    new: Tensor = output.sequences[:, batch["input_ids"].shape[1] :]
    return new


def answer_logits(
    model: Any,
    samples: Sequence[Sample],
    names: Sequence[str],
    heads: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What the reference predicts for every generated token of the last turn, `[batch, steps, V]`;
    model must be unpatched.
    """
    rows = [logits(model, sample, reference(names), heads) for sample in samples]
    return torch.stack(
        [row[sample.turns[-1].end - 1 : -1] for row, sample in zip(rows, samples, strict=True)]
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors; none where both are -inf."""
    same = found == expected
    return float((found - expected).abs().masked_fill(same, 0.0).max())

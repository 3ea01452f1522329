"""The same methods twice, for the reference and for the library, and how far both are apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import vlm_patch
from eval.support import tiny
from eval.support.reference import (
    AdaIat,
    Adhh,
    Deco,
    Dola,
    Gift,
    Iat,
    Icd,
    M3id,
    Mass,
    MemVr,
    Method,
    MiddleLayers,
    Nullu,
    Pai,
    Paint,
    Sample,
    Sparc,
    Steering,
    Vaf,
    Var,
    Vcd,
    Vhr,
    Vista,
    logits,
)
from vlm_patch import (
    ADHH,
    GIFT,
    IAT,
    ICD,
    M3ID,
    PAI,
    PAINT,
    SPARC,
    VAF,
    VAR,
    VCD,
    VHR,
    VISTA,
    AdaIAT,
    DeCo,
    Devils,
    DoLa,
    MassTarget,
    MemVR,
)
from vlm_patch.methods.adaiat import Calibration

DIMS = tiny.SINK_DIMS
TAU = 3.0

ROLE = (77, 78, 79)
TABLE = ((0.3, 0.1, 0.4, 0.2), (0.0, 0.2, 0.1, 0.3), (0.5, 0.0, 0.4, 0.1), (0.2, 0.3, 0.5, 0.4))
REAL = tuple(tuple(0.03 + 0.2 * number for number in row) for row in TABLE)
HALLUCINATED = tuple(tuple(0.05 + 0.1 * number for number in row) for row in reversed(TABLE))
CALIBRATION = Calibration(
    torch.tensor(REAL, dtype=torch.float64), torch.tensor(HALLUCINATED, dtype=torch.float64)
)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


VECTORS = {1: drawn(tiny.WIDTH), 2: drawn(tiny.WIDTH + 1)[1:]}
DIRECTIONS = {n: torch.linalg.qr(drawn(tiny.WIDTH, 3 + n)).Q.T.contiguous() for n in (0, 2, 3)}
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
    "pai": (Pai(0.5, (1, 2, 3)), PAI(0.5, (1, 2, 3))),
    "pai-guided": (Pai(0.5, (1, 2, 3), gamma=1.4), PAI(0.5, (1, 2, 3), gamma=1.4)),
    "pai-release": (Pai(1.0, (0, 2), "release"), PAI(1.0, (0, 2), "release")),
    "vaf": (Vaf(1.3, 0.8, (1, 2)), VAF(1.3, 0.8, (1, 2))),
    "devils": (MiddleLayers(0.5, (1, 2, 3)), Devils(0.5, (1, 2, 3))),
    "adhh": (Adhh(0.4, (1, 2, 3)), ADHH("1-3:*", 0.4)),
    "iat": (Iat(0.8, (1, 2, 3)), IAT(0.8, (1, 2, 3))),
    "adaiat": (
        AdaIat(REAL, HALLUCINATED, 6.0, 0.5, (0, 1, 2, 3)),
        AdaIAT(CALIBRATION, 6.0, 0.5, (0, 1, 2, 3)),
    ),
    "sparc": (Sparc(1.5, 0.3, 0.1, 2, (0, 1, 2, 3)), SPARC(1.5, 0.3, 0.1, 2, (0, 1, 2, 3))),
    "mass-target": (Mass(0.55, (1, 3)), MassTarget(0.55, (1, 3))),
    "mass-target-raise": (Mass(0.3, (0, 2), True), MassTarget(0.3, (0, 2), True)),
    "steering": (
        Steering(VECTORS, -0.7, "last"),
        vlm_patch.Steering(VECTORS, -0.7, "last"),
    ),
    "steering-all": (Steering(VECTORS, 0.4), vlm_patch.Steering(VECTORS, 0.4)),
    "nullu": (Nullu(DIRECTIONS, 3), vlm_patch.Nullu(DIRECTIONS, 3)),
    "memvr": (MemVr((1, 2, 3), 0.3, 0.993), MemVR(0.3, 0.993, layers=(1, 2, 3))),
    "vista": (Vista((1, 3), 0.8), VISTA(0.8, layers=(1, 3))),
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

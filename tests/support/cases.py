"""What the fuzz test draws: model, methods, heads, prompts, masks and a way of generating."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

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
    Sparc,
    Steering,
    Vaf,
    Var,
    Vcd,
    Vhr,
    Vista,
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

HEADS = 4
WORDS = (5, 6, 8, 9, tiny.SINK_WORD, 21, 22, 30, 31, 41, 50, 60, 61)
MODES = (
    "greedy",
    "sampled",
    "return sequences",
    "beams",
    "static",
    "without cache",
    "second turn",
    "forward",
)
BUILDERS = {
    "llava": lambda **options: tiny.llava(kv_heads=4, **options),
    "llava-gqa": lambda **options: tiny.llava(kv_heads=2, **options),
    "llava-mqa": lambda **options: tiny.llava(kv_heads=1, **options),
    "sliding": lambda **options: tiny.sliding_llava(window=23, **options),
    "qwen2-vl": tiny.qwen2_vl,
}


@dataclass(frozen=True)
class Build:
    """How to make the model. exact: in float64, where eager attention itself rounds to float32."""

    kind: str
    layers: int
    seed: int
    attn: str
    exact: bool

    @cache  # noqa: B019 - there are few of them
    def model(self) -> nn.Module:
        options = {"layers": self.layers, "seed": self.seed, "attn": self.attn}
        model = tiny.plant(BUILDERS[self.kind](**options))
        return tiny.float64(model) if self.exact else model


@dataclass(frozen=True)
class Case:
    """One comparison. methods: as the reference and as the library writes them. heads: what is on,
    by method. query, words: by hand, over the padded prompt. chunks: rows are done one by one.
    """

    build: Build
    methods: list[tuple[Method, Any]]
    heads: dict[str, Tensor]
    rows: list[list[int]]
    query: Tensor | None
    words: Tensor | None
    mode: str
    chunks: bool

    @property
    def specs(self) -> list[Method]:
        return [spec for spec, _ in self.methods]

    @property
    def masks(self) -> dict[str, Tensor]:
        given = {"query": self.query, "content": self.words}
        return {name: mask for name, mask in given.items() if mask is not None}

    def batch(self) -> dict[str, Tensor]:
        model = self.build.model()
        batch = tiny.inputs(model, self.rows)
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        return batch


def hundredths(low: float, high: float) -> st.SearchStrategy[float]:
    return st.integers(round(low * 100), round(high * 100)).map(lambda number: number / 100)


@st.composite
def builds(draw: st.DrawFn) -> Build:
    exact = draw(st.booleans())
    return Build(
        kind=draw(st.sampled_from(sorted(BUILDERS))),
        layers=draw(st.integers(2, 4)),
        seed=draw(st.integers(1, 3)),
        attn="sdpa" if exact else draw(st.sampled_from(("sdpa", "eager"))),
        exact=exact,
    )


def some_layers(layers: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, layers - 1), min_size=1).map(lambda found: tuple(sorted(found)))


@st.composite
def var(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {
        "dims": draw(st.sampled_from(((3, 10), (3,), (10,), (3, 10, 20)))),
        "tau": draw(hundredths(1.5, 7)),
        "move_fraction": draw(hundredths(0, 1)),
        "rho_nonsink": draw(hundredths(0, 1)),
        "min_image_mass": draw(hundredths(0, 0.6)),
        "first_layer": draw(st.integers(0, layers - 1)),
        "exclude_last_layer": draw(st.booleans()),
        "require_visual_sink": draw(st.booleans()),
        "semantics": draw(st.sampled_from(("paper", "release") if layers > 2 else ("paper",))),
    }
    return Var(**given), VAR(**given)


@st.composite
def gift(draw: st.DrawFn, layers: int, words: Tensor | None) -> tuple[Method, Any]:
    given = {
        "alpha": draw(hundredths(-1, 4)),
        "saliency_layer": draw(st.integers(0, layers - 1) | some_layers(layers)),
        "layers": draw(some_layers(layers)),
        "beta": draw(hundredths(0, 1.5)),
        "head_fraction": draw(hundredths(0, 1)),
    }
    return Gift(**given), GIFT(**given, words="content" if words is None else words)


@st.composite
def vhr(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {
        "layers": draw(some_layers(layers)),
        "alpha": draw(hundredths(0, 3)),
        "filter": draw(st.booleans()),
        "semantics": draw(st.sampled_from(("release", "paper"))),
    }
    return Vhr(**given), VHR(**given)


@st.composite
def paint(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    row = st.tuples(*[hundredths(0, 1)] * HEADS)
    table = draw(st.none() | st.tuples(*[row] * layers))
    given = {
        "alpha": draw(hundredths(0, 1)),
        "beta": draw(hundredths(0, 1)),
        "rho": draw(hundredths(0, 1)),
        "layers": draw(some_layers(layers)),
        "semantics": draw(st.sampled_from(("release", "paper"))),
        "rho_sp": draw(hundredths(0, 0.5)),
        "sensitivity": table if table and any(map(any, table)) else None,
        "gamma": 1 + draw(hundredths(0, 0.5)),
    }
    return Paint(**given), PAINT(**given)


@st.composite
def pai(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    semantics = draw(st.sampled_from(("release", "paper")))
    given = draw(hundredths(0, 1)), draw(some_layers(layers)), semantics
    return Pai(*given), PAI(*given)


@st.composite
def vaf(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = draw(hundredths(0, 2)), draw(hundredths(0, 2)), draw(some_layers(layers))
    return Vaf(*given), VAF(*given)


@st.composite
def devils(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = draw(hundredths(0, 2)), draw(some_layers(layers))
    return MiddleLayers(*given), Devils(*given)


@st.composite
def adhh(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    tau, own = draw(hundredths(0, 1)), draw(some_layers(layers))
    return Adhh(tau, own), ADHH(dict.fromkeys(own, "*"), tau)


@st.composite
def mass_target(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = draw(hundredths(0.01, 0.99)), draw(some_layers(layers)), draw(st.booleans())
    return Mass(*given), MassTarget(*given)


@st.composite
def iat(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = draw(hundredths(0, 1)), draw(some_layers(layers))
    return Iat(*given), IAT(*given)


@st.composite
def adaiat(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    row = st.tuples(*[hundredths(0.01, 0.2)] * HEADS)
    real, invented = (draw(st.tuples(*[row] * layers)) for _ in range(2))
    given = draw(hundredths(0, 8)), draw(hundredths(0, 1)), draw(some_layers(layers))
    tables = (torch.tensor(table, dtype=torch.float64) for table in (real, invented))
    return AdaIat(real, invented, *given), AdaIAT(Calibration(*tables), *given)


@st.composite
def sparc(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = (
        *(draw(hundredths(0.5, 2)), draw(hundredths(0, 2)), draw(hundredths(0, 1))),
        *(draw(st.integers(0, layers - 1)), draw(some_layers(layers))),
    )
    return Sparc(*given), SPARC(*given)


def drawn(draw: st.DrawFn, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


@st.composite
def steering(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {
        "vectors": {layer: drawn(draw, tiny.WIDTH) for layer in draw(some_layers(layers))},
        "strength": draw(hundredths(-1, 1)),
        "positions": draw(st.sampled_from(("all", "last", "generated"))),
    }
    return Steering(**given), vlm_patch.Steering(**given)


@st.composite
def nullu(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    rank = draw(st.integers(1, 5))
    directions = {
        layer: torch.linalg.qr(drawn(draw, tiny.WIDTH, 5)).Q.T
        for layer in draw(some_layers(layers))
    }
    return Nullu(directions, rank), vlm_patch.Nullu(directions, rank)


@st.composite
def vista(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {"layers": draw(some_layers(layers)), "strength": draw(hundredths(0, 1))}
    return Vista(**given), VISTA(**given)


@st.composite
def memvr(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {
        "layers": draw(some_layers(layers)),
        "share": draw(hundredths(0, 1)),
        "threshold": draw(st.integers(950, 1000)) / 1000,
    }
    return MemVr(**given), MemVR(**given)


@st.composite
def vcd(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {
        "alpha": draw(hundredths(0, 1)),
        "beta": draw(hundredths(0, 1)),
        "noise_step": draw(st.integers(0, 999)),
        "seed": draw(st.integers(0, 9)),
    }
    return Vcd(**given), VCD(**given)


@st.composite
def icd(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    prefix = tuple(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4)))
    given = {"alpha": draw(hundredths(0, 1)), "beta": draw(hundredths(0, 1)), "prefix": prefix}
    return Icd(**given), ICD(**given)


@st.composite
def m3id(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {"decay": draw(hundredths(0, 0.3)), "gate": draw(hundredths(0, 1))}
    return M3id(**given), M3ID(**given)


@st.composite
def dola(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {"layers": draw(some_layers(layers)), "beta": draw(hundredths(0, 1))}
    return Dola(**given), DoLa(**given)


@st.composite
def deco(draw: st.DrawFn, layers: int) -> tuple[Method, Any]:
    given = {
        "layers": draw(some_layers(layers)),
        "alpha": draw(hundredths(0, 1)),
        "top_p": draw(hundredths(0.01, 1)),
        "top_k": draw(st.integers(1, 20)),
    }
    return Deco(**given), DeCo(**given)


ON_LOGITS = (Vcd, Icd, M3id, Dola, Deco)


def acting(spec: Method, layers: int) -> list[int]:
    """The layers that a method is made for."""
    if isinstance(spec, ON_LOGITS):
        return []
    if isinstance(spec, Var):
        return [layer for layer in range(layers) if spec.acts_in(layer, layers)]
    return list(spec.layers)


@st.composite
def heads(draw: st.DrawFn, specs: list[Method], layers: int) -> dict[str, Tensor]:
    """For some methods the heads that are on, in their own layers."""
    tables = {}
    for spec in specs:
        own = acting(spec, layers)
        if own and draw(st.booleans()):
            cells = draw(st.sets(st.tuples(st.sampled_from(own), st.integers(0, HEADS - 1))))
            if isinstance(spec, Steering | Nullu | Vista | MemVr):  # which have no heads
                cells = {(layer, head) for layer, _ in cells for head in range(HEADS)}
            table = torch.zeros(layers, HEADS, dtype=torch.bool)
            for cell in cells:
                table[cell] = True
            tables[spec.name] = table
    return tables


def texts(least: int, most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(WORDS), min_size=least, max_size=most)


@st.composite
def rows(draw: st.DrawFn, most: int) -> list[list[int]]:
    """One to three prompts of no to `most` images each, at least one in all."""
    found = []
    for number in range(draw(st.integers(1, 3))):
        row = [tiny.BOS, *draw(texts(0, 3))] if draw(st.booleans()) else draw(texts(1, 4))
        images = draw(st.integers(0 if number and most > 1 else 1, most))
        for image in range(images):
            row += [tiny.IMAGE, *draw(texts(image < images - 1, 5))]
        found.append(row)
    return draw(st.permutations(found))


@st.composite
def masks(draw: st.DrawFn, ids: Tensor) -> Tensor | None:
    """None, or some of the words behind the first image."""
    chosen = draw(st.none() | st.sets(st.sampled_from(WORDS)))
    if chosen is None:
        return None
    behind = (ids == tiny.IMAGE).cumsum(1) > 0
    return behind & torch.isin(ids, torch.tensor(sorted(chosen), dtype=ids.dtype))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    build = draw(builds())
    mode = draw(st.sampled_from(MODES))
    repeated = mode in ("return sequences", "beams")
    prompts = draw(rows(1 if repeated and not tiny.FEATURES else 2))
    ids = tiny.inputs(build.model(), prompts)["input_ids"]
    by_hand = st.none() if mode == "second turn" else masks(ids)  # those cover one prompt
    query, words = draw(by_hand), draw(by_hand)
    kinds = {
        "var": var(build.layers),
        "gift": gift(build.layers, words),
        "vhr": vhr(build.layers),
        "paint": paint(build.layers),
        "pai": pai(build.layers),
        "vaf": vaf(build.layers),
        "devils": devils(build.layers),
        "iat": iat(build.layers),
        "sparc": sparc(build.layers),
        "adaiat": adaiat(build.layers),
        "adhh": adhh(build.layers),
        "mass target": mass_target(build.layers),
        "steering": steering(build.layers),
        "nullu": nullu(build.layers),
        "vista": vista(build.layers),
        "memvr": memvr(build.layers),
        "vcd": vcd(build.layers),
        "icd": icd(build.layers),
        "m3id": m3id(build.layers),
        "dola": dola(build.layers),
        "deco": deco(build.layers),
    }
    names = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4, unique=True))
    methods = [draw(kinds[name]) for name in names]
    return Case(
        build=build,
        methods=methods,
        heads=draw(heads([spec for spec, _ in methods], build.layers)),
        rows=prompts,
        query=query,
        words=words,
        mode=mode,
        chunks=draw(st.booleans()),
    )

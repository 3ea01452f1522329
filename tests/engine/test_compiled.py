"""Steps that torch.compile traces whole, against the same steps without it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.support.agreement import NO_PROCESSOR
from tests.support.family import VARIANTS, Family
from vlm_patch import (
    GIFT,
    M3ID,
    SPARC,
    VAR,
    VCD,
    VHR,
    DoLa,
    Method,
    PatchError,
    State,
    wrap,
)
from vlm_patch.engine.attention import REASON
from vlm_patch.primitives.buffers import append

pytestmark = [
    pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:VAF multiplies"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ALL = ("paint", "var", "gift-inside", "vhr")
CLOSE = 1e-5
OTHER_WORDS: Sequence[Sequence[int]] = [
    [*row[:-2], *(word + 20 for word in row[-2:]), 60] for row in tiny.BATCH_OF_3
]
"""Prompts of another length."""


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """Also without the compiler's trace in pytest's log, which takes longer than compiling."""
    torch.compiler.reset()
    counters.clear()
    trace = logging.getLogger("torch.__trace")
    before, trace.propagate = trace.propagate, False
    with torch.no_grad():
        yield
    trace.propagate = before
    torch.compiler.reset()


def few() -> list[Method]:
    """For two layers, which are compiled in half the time of four."""
    return [
        VAR(tau=3.0, dims=tiny.SINK_DIMS, exclude_last_layer=False),
        VHR(layers=(1,)),
        GIFT(3.0, saliency_layer=0, layers=(1,)),
    ]


def small() -> Any:
    return planted("llava", layers=2)


def whole(model: Any, backend: str = "eager") -> Any:
    """Its compiled forward, in which no graph may break."""
    return torch.compile(model.forward, fullgraph=True, backend=backend)


def room(model: Any, tokens: int = 48) -> Any:
    return StaticCache(config=model.config, max_cache_len=tokens)


class Loop:
    """A greedy generation on one cache, prompt by prompt and token by token."""

    def __init__(self, model: Any, batch: Mapping[str, Tensor], cache: Any = None) -> None:
        self.model, self.cache = model, room(model) if cache is None else cache
        self.mask = batch["attention_mask"]
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.found: list[Tensor] = []
        self._take(model, **batch, position_ids=positions)

    def steps(self, run: Any, count: int) -> "Loop":
        for _ in range(count):
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            places = self.mask.sum(1, keepdim=True) - 1
            self._take(run, input_ids=self.token, attention_mask=self._seen(), position_ids=places)
        return self

    def turn(self, words: Sequence[int]) -> "Loop":
        """A question more."""
        ids = torch.tensor([list(words)]).expand(len(self.mask), -1)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        places = self.mask.cumsum(1)[:, -ids.shape[1] :] - 1
        mask = self.mask
        self._take(self.model, input_ids=ids, attention_mask=mask, position_ids=places)
        return self

    @property
    def logits(self) -> Tensor:
        return torch.stack(self.found, 1)

    def _seen(self) -> Tensor:
        """The mask over the whole cache, whose shape no step changes."""
        seen = torch.zeros(len(self.mask), 1, 1, 48, dtype=torch.bool)
        seen[:, 0, 0, : self.mask.shape[1]] = self.mask.bool()
        return seen

    def _take(self, run: Any, **inputs: Any) -> None:
        output = run(**inputs, past_key_values=self.cache, use_cache=True)
        self.found.append(output.logits[:, -1].clone())
        self.token = self.found[-1].argmax(-1, keepdim=True)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("names", "backend"),
    [
        (("var",), "eager"),
        (("var-release",), "eager"),
        (("gift",), "eager"),
        (("vhr",), "eager"),
        (("paint-release",), "eager"),
        (("pai", "vaf", "devils", "iat", "adhh", "adaiat", "mass-target"), "eager"),
        (("sparc",), "eager"),
        (("nullu", "memvr", "vista", "steering"), "eager"),
        (("vista", "var", "steering-all", "vhr"), "eager"),
        (ALL, "aot_eager"),
    ],
)
def test_one_graph_serves_all_steps(names: Sequence[str], backend: str) -> None:
    """Of prompts of other lengths too, on a new cache and on the same one; a left-padded batch and
    grouped queries.
    """
    model = planted("llava", kv_heads=2)
    batches = [tiny.inputs(model, rows) for rows in (tiny.BATCH_OF_3, OTHER_WORDS)]
    with wrap(model, *ours(names)):
        run, cache = whole(model, backend), room(model)
        expected = [Loop(model, batch).steps(model, 5).logits for batch in batches]
        for given in (None, cache, cache):
            for batch, right in zip(batches, expected, strict=True):
                cache.reset()
                same(Loop(model, batch, given).steps(run, 5).logits, right)
    assert graphs() == 1


def test_inductor() -> None:
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *few()):
        expected = Loop(model, batch).steps(model, 3).logits
        same(Loop(model, batch).steps(whole(model, "inductor"), 3).logits, expected)
    assert graphs() == 1


# ---- generate, which compiles its steps by itself


def generated(model: Any, batch: Mapping[str, Any], whole: bool | None, **options: Any) -> Any:
    """Logits of `generate` with a static cache; whole: compiled, with or without breaks."""
    if whole is not None:
        config = CompileConfig(fullgraph=whole, backend="eager", mode=None)  # type: ignore[arg-type]
        config._compile_all_devices = True  # as on a GPU
        options["compile_config"] = config
    output = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=5,
        min_new_tokens=5,
        cache_implementation="static",
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=[tiny.IMAGE, tiny.VIDEO, tiny.EOS],
        **options,
    )
    return torch.stack(output.logits, 1)


@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
def test_generate(kind: str) -> None:
    model = planted(kind)
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(ALL)):
        expected = generated(model, batch, None)
        for _ in range(2):
            same(generated(model, batch, True), expected)
    assert graphs() == 1


def test_beams() -> None:
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *few()):
        expected = generated(model, batch, None, num_beams=2)
        same(generated(model, batch, True, num_beams=2), expected)


def test_windows_and_a_cap() -> None:
    """Gemma 2: every other layer sees a window, which fills up, and scores are capped."""
    kind, changes = VARIANTS["llava-gemma2"]
    family = Family(kind, **changes)
    model = family.model
    model.config.text_config.sliding_window = 20
    methods = [
        VAR(tau=1.0, dims=(3, 10), min_image_mass=0.0, rho_nonsink=0.0),
        GIFT(3.0, saliency_layer=0, layers=(1, 2)),
        VHR(layers=(0, 1)),
        SPARC(2.0, 0.1, 0.1, layer=0, layers=(0, 1, 2)),
    ]
    stock = generated(model, family.prompt(), None)
    with wrap(model, *methods):
        expected = generated(model, family.prompt(), None)
        assert (stock - expected).abs().max() > 1e-3
        same(generated(model, family.prompt(), True), expected)


def test_windows_alone_are_left_out_of_the_graph() -> None:
    """Where every layer forgets its oldest keys the cache does not tell how many there will be."""
    model = tiny.sliding_llava()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(("var", "gift", "vhr"))):
        expected = generated(model, batch, None)
        with pytest.raises(Exception, match="can be traced whole"):
            generated(model, batch, True)
        torch.compiler.reset()
        same(generated(model, batch, False), expected)


# ---- methods that edit logits, which no step traces


def on_logits() -> list[Method]:
    return [VCD(alpha=0.5, beta=0.0), M3ID(0.1, 0.9), DoLa((0, 1), 0.0)]


@pytest.mark.parametrize("alone", on_logits(), ids=lambda method: method.name)
def test_edits_of_logits_are_left_out_of_the_graph(alone: Method) -> None:
    """fullgraph=True says so; with breaks they are as without the compiler."""
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = Loop(model, batch).steps(model, 2).logits
    with wrap(model, alone):
        expected = Loop(model, batch).steps(model, 2).logits
        assert (expected - stock).abs().max() > 1e-3
        with pytest.raises(Exception, match="a method edits logits, no step is traced"):
            generated(model, batch, True)
        torch.compiler.reset()
        same(Loop(model, batch).steps(torch.compile(model, backend="eager"), 2).logits, expected)


def test_edits_of_logits_beside_others_with_breaks() -> None:
    """And on the cache of `generate`, where the steps of all streams are one batch."""
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    for methods in ([*few(), *on_logits()], on_logits()):
        with wrap(model, *methods):
            torch.compiler.reset()
            same(generated(model, batch, False), generated(model, batch, None))
            run, options = torch.compile(model, backend="eager"), {"max_new_tokens": 4}
            texts = [one.generate(**batch, do_sample=False, **options) for one in (run, model)]
            assert torch.equal(*texts)


def test_disabled_edits_of_logits_leave_the_graph_whole() -> None:
    """Alone or beside others; switched on again, nothing is traced, and a stream that missed the
    tokens in between says so.
    """
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *few()):
        expected = Loop(model, batch).steps(model, 2).logits
    stock = Loop(model, batch).steps(model, 2).logits
    with wrap(model, *few(), *on_logits()) as patch:
        run = whole(model)
        with patch.disabled("vcd", "m3id", "dola"):
            loop = Loop(model, batch).steps(run, 2)
        same(loop.logits, expected)
        with pytest.raises(Exception, match="a method edits logits, no step is traced"):
            loop.steps(run, 1)
        with pytest.raises(PatchError, match="does not know the first"):
            loop.steps(model, 1)
        with patch.disabled():
            same(Loop(model, batch).steps(run, 2).logits, stock)


def test_a_forward_past_the_hooks_of_the_model_is_refused() -> None:
    """Its logits would be those that no method edited."""
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *on_logits()):
        for run in (model.forward, torch.compile(model.forward, backend="eager")):
            loop = Loop(model, batch)
            with pytest.raises(PatchError, match="runs without the hooks of the model around it"):
                loop.steps(run, 1)


# ---- what happens in between


def test_steps_without_the_graph_in_between() -> None:
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *few()):
        run = whole(model)

        def loop(run: Any) -> Tensor:
            loop = Loop(model, batch).steps(run, 2).steps(model, 2).steps(run, 2)
            return loop.turn([31, 32, 33]).steps(run, 2).steps(model, 1).logits

        same(loop(run), loop(model))
    assert graphs() == 2  # a second question leaves GIFT fewer tensors


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_taken_out_of_the_cache(compiled: bool) -> None:
    """Generated ones, which are generated once more."""
    model = small()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with wrap(model, *few()):
        run, loop = whole(model) if compiled else model, Loop(model, batch)
        expected = loop.steps(run, 3).found[1:]
        loop.cache.crop(-3)
        loop.mask, loop.token = batch["attention_mask"], loop.found[0].argmax(-1, keepdim=True)
        loop.found = []
        same(loop.steps(run, 3).logits, torch.stack(expected, 1))


def test_two_caches_in_turn() -> None:
    model = small()
    batches = [tiny.inputs(model, rows) for rows in (tiny.BATCH_OF_3, OTHER_WORDS)]
    with wrap(model, *few()):
        expected = [Loop(model, batch).steps(model, 3).logits for batch in batches]
        run, loops = whole(model), [Loop(model, batch) for batch in batches]
        for _ in range(3):
            for loop in loops:
                loop.steps(run, 1)
    for loop, right in zip(loops, expected, strict=True):
        same(loop.logits, right)
    assert graphs() == 1


def test_heads_and_layers_switched_off() -> None:
    """One graph more where some heads are off, and one where a layer is; others of them are none
    more. With everything off the stock model, bit for bit.
    """
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = Loop(model, batch).steps(whole(model), 3).logits
    with wrap(model, *few()) as patch:
        run, counts = whole(model), []
        for layer, head in ((None, None), (1, 0), (1, 2), (0, slice(None))):
            for name, table in patch.heads.items():
                table[:] = True
                table[0] = name == "var"
                if layer is not None:
                    table[layer, head] = False
            expected = Loop(model, batch).steps(model, 3).logits
            same(Loop(model, batch).steps(run, 3).logits, expected)
            counts.append(graphs())
        assert counts == [2, 3, 3, 4]
        for table in patch.heads.values():
            table[:] = False
        assert torch.equal(Loop(model, batch).steps(run, 3).logits, stock)


def test_disabled_for_a_while() -> None:
    """As without the graph: the stock model, after which the cache holds tokens nobody saw."""
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = Loop(model, batch).steps(model, 3).logits
    with wrap(model, *few()) as patch:
        run = whole(model)
        expected = Loop(model, batch).steps(model, 3).logits
        with patch.disabled("vhr"):
            partly = Loop(model, batch).steps(model, 3).logits
        for _ in range(2):
            same(Loop(model, batch).steps(run, 3).logits, expected)
            with patch.disabled():
                loop = Loop(model, batch).steps(run, 3)
                assert torch.equal(loop.logits, stock)
            with patch.disabled("vhr"):
                same(Loop(model, batch).steps(run, 3).logits, partly)
        for step in (run, model):
            loop = Loop(model, batch)
            with patch.disabled():
                loop.steps(run, 1)
            with pytest.raises(Exception, match=r"can be traced whole|did not see"):
                loop.steps(step, 1)


def test_a_method_that_missed_tokens() -> None:
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *few()) as patch:
        run, loop = whole(model), Loop(model, batch)
        with patch.disabled("var"):
            loop.steps(run, 2)
        with pytest.raises(Exception, match="can be traced whole"):
            loop.steps(run, 1)
        with pytest.raises(PatchError, match="var is on, but was off"):
            loop.steps(model, 1)
        loop = Loop(model, batch)
        with patch.disabled("vhr"):
            loop.steps(run, 2)
        other = Loop(model, batch)
        with patch.disabled("vhr"):
            other.steps(model, 2)
        same(loop.steps(run, 2).logits, other.steps(model, 2).logits)


@pytest.mark.parametrize("first", [False, True])
def test_a_patch_put_on_and_taken_off(first: bool) -> None:
    """No graph of another state of the model is run, also where it was compiled before."""
    model, other = small(), small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = Loop(other, batch).steps(other, 2).logits
    run = whole(model)
    if first:
        same(Loop(model, batch).steps(run, 2).logits, stock)
    for methods in (few()[:2], few()[1:]):
        with wrap(other, *methods):
            expected = Loop(other, batch).steps(other, 2).logits
        with wrap(model, *methods):
            same(Loop(model, batch).steps(run, 2).logits, expected)
        assert torch.equal(Loop(model, batch).steps(run, 2).logits, stock)


@pytest.mark.filterwarnings("ignore:GIFT leaves", "ignore:. of . prompts hold no image")
def test_a_prompt_without_an_image_and_one_with() -> None:
    """In one batch, and none at all."""
    model = small()
    mixed = tiny.inputs(model, [tiny.ONE_IMAGE[0], [tiny.BOS, *range(20, 30)]])
    text = {name: mixed[name][1:] for name in ("input_ids", "attention_mask")}
    with wrap(model, *few()):
        run = whole(model)
        for batch in (mixed, text):
            expected = Loop(model, batch).steps(model, 2).steps(model, 1).logits
            same(Loop(model, batch).steps(run, 2).steps(model, 1).logits, expected)


@pytest.mark.parametrize("shell", ["compiled", "in place"])
def test_prompts_cannot_be_traced_whole(shell: str) -> None:
    """The error says what can; the model can be wrapped, and is right without its shell."""
    model = small()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    outer = torch.compile(model, fullgraph=True, backend="eager")
    if shell == "in place":
        model.compile(fullgraph=True, backend="eager")
        outer = model
    with wrap(outer, *few()) as patch:
        with pytest.raises(Exception, match="Read prompts with the model itself"):
            outer(**batch)
        with patch.disabled():
            outer(**batch, use_cache=False)
        if outer is not model:
            expected = Loop(model, batch).steps(model, 2).logits
            same(Loop(model, batch).steps(outer, 2).logits, expected)
    assert "fullgraph=False" in REASON


# ---- a method of one's own


@dataclass
class Past(State):
    """mass: by layer, `[B, H]`, attention to the image. keys: `[B, at least K]`, made by append."""

    per_key: ClassVar[tuple[str, ...]] = ("keys",)

    mass: dict[int, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None


@dataclass(frozen=True)
class Memory(Method):
    """Everything a method may do at a generated token: watch, edit scores and weights, gains that
    depend on what it remembers.
    """

    name: ClassVar[str] = "memory"
    state: ClassVar[type[State]] = Past
    reads_blocks: ClassVar[bool] = True

    def edited_rows(self, forward: Any) -> Tensor:
        return forward.text

    def watched_rows(self, forward: Any) -> Any:
        return (0,), forward.text

    def default_layers(self, depth: int) -> Sequence[int]:
        return (1,)

    def observe_hidden(self, layer: int, hidden: Tensor, forward: Any, state: Past) -> None:
        state.keys = append(state.keys, hidden.norm(dim=-1) / 8, forward.position.past)

    def edit_scores(self, layer: int, scores: Tensor, forward: Any, state: Past) -> Tensor:
        assert state.keys is not None
        keys = forward.newest(state.keys, scores.shape[-1])
        return scores + 0.1 * keys[:, None, None]

    def observe(self, layer: int, weights: Tensor, rows: Any, forward: Any, state: Past) -> None:
        image = forward.newest(forward.image, weights.shape[-1])[:, None, None]
        mass = (weights * image).sum(-1).mean(-1)
        state.mass[layer] = mass if layer not in state.mass else 0.5 * (state.mass[layer] + mass)

    def edit_weights(self, layer: int, weights: Tensor, forward: Any, state: Past) -> Tensor:
        return weights * weights.sqrt()

    def edit_heads(self, layer: int, output: Tensor, forward: Any, state: Past) -> Tensor:
        return 1 + state.mass[0]


@dataclass(frozen=True)
class Growing(Memory):
    """Forgets to say that a field is by key."""

    state: ClassVar[type[State]] = type("Silent", (Past,), {"per_key": ()})


def test_a_method_of_ones_own() -> None:
    model = small()
    batches = [tiny.inputs(model, rows) for rows in (tiny.BATCH_OF_3, OTHER_WORDS)]
    with wrap(model, Memory(), *few()):
        run = whole(model)
        for batch in batches:
            expected = Loop(model, batch).steps(model, 3).logits
            same(Loop(model, batch).steps(run, 2).steps(model, 1).logits, expected)
    assert graphs() == 1
    loops: list[Callable[..., Any]] = [torch.compile(model.forward, backend="eager"), run]
    with wrap(model, Growing()):
        for run in loops:
            with pytest.raises(Exception, match="per_key"):
                Loop(model, batches[0]).steps(run, 1)

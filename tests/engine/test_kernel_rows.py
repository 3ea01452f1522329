"""The kernels for edited rows, run by Triton's interpreter on the CPU, against what defines them in
torch and, in whole generations, against the slow reference.
"""

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.engine import test_fuzz
from tests.support.agreement import NO_PROCESSOR, error, generate, new_tokens
from tests.support.cases import Case, cases
from tests.support.kernel_rows import EDITS, SHAPES, Shape, case, far
from vlm_patch import GIFT, VAR, VHR, ForwardContext, KeyReweighting, Position, State, wrap
from vlm_patch.engine.kernels import layer as layers
from vlm_patch.methods import var
from vlm_patch.models.tensor_parallel import WHOLE
from vlm_patch.primitives import dispatch
from vlm_patch.primitives import launch as launching

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "error:A fused kernel is left out")
CLOSE = 1e-5
PADDED = tiny.BATCH_OF_3[:2]
"""Two rows of different lengths: the interpreter takes long for every row, head and sample."""


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels on the CPU too, for as long as a test runs."""
    monkeypatch.setattr(dispatch, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dispatch, "_verdicts", {})
    with torch.no_grad():
        yield


@pytest.fixture
def launched(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    counts: Counter[str] = Counter()
    call = launching.Launch.__call__

    def noted(self: launching.Launch, *more: Any, **named: Any) -> None:
        counts[self.kernel.__name__] += 1
        call(self, *more, **named)

    monkeypatch.setattr(launching.Launch, "__call__", noted)
    return counts


def in_parts(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets `count` programs share the keys of a row."""
    monkeypatch.setattr(layers, "splits", lambda *_: count)


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        *itertools.product(("var", "gift", "gift, var"), SHAPES),
        ("var, gift", "a new key"),
        ("shares by torch", "padding, heads off"),
        ("gift, shares by torch", "padded rows, heads off"),
    ],
)
def test_rows_equal_their_definition(
    names: str, shape: str, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(monkeypatch, 2 if len(shape) % 2 else 1)
    made = case(EDITS[names], SHAPES[shape])
    assert layers.serves(made.call)
    expected, groups = made.by_torch()
    found, written = made.by_kernel()
    assert far(found, expected, made.edited()) <= 2e-6
    for one, other in zip(written, groups, strict=True):
        torch.testing.assert_close(one, other)
    index = torch.arange(made.first, made.first + made.rows.count)
    call = made.call.without_tail(made.forward.image.shape[1])
    assert far(call.output(call.weights(index)), expected, made.edited()) > 1e-3
    assert (found[~made.edited()] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", ["var", "gift, var"])
def test_rows_in_half_precision(dtype: torch.dtype, names: str, interpreter: None) -> None:
    """Numbers are summed in float32; weights and output are rounded."""
    made = case(EDITS[names], Shape(streamed=True), dtype)
    expected, found = made.by_torch()[0], made.by_kernel()[0]
    assert found.dtype == dtype
    most = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert far(found, expected, made.edited()) <= most


@pytest.mark.parametrize("alpha", [60.0, -3.0])
def test_a_large_or_falling_gain_in_float16(alpha: float, interpreter: None) -> None:
    """e^60 is far beyond float16."""
    made = case([GIFT(alpha)], Shape(), torch.float16)
    expected, found = made.by_torch()[0], made.by_kernel()[0]
    assert far(found, expected, made.edited()) <= 2e-3 * float(expected.abs().max())


def test_a_row_that_sees_nothing_is_finite(interpreter: None) -> None:
    made = case(EDITS["var"], Shape(padded=True))
    assert made.call.mask is not None
    made.call.mask[1] = False
    assert made.by_kernel()[0].isfinite().all()


def test_a_gain_of_heads(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for names, parts in (("var", 2), ("var, gift", 1)):
        in_parts(monkeypatch, parts)
        made, gain = case(EDITS[names], Shape()), torch.rand(2, 4)
        kernel = layers.LayerKernel(made.call, made.edits, made.rows, scaled=True)
        call = made.call
        row = (0, call.query, call.key, call.value, call.mask, made.forward)
        expected = made.by_torch()[0] * gain[:, None, :, None]
        assert far(kernel(*row, gain=gain), expected, made.edited()) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "dims"), [(64, (3,)), (150, (149, 7, 30)), (64, (0, 63))])
def test_sinks_among_the_rows_of_a_prompt(
    size: int, dims: tuple[int, ...], dtype: torch.dtype, interpreter: None
) -> None:
    hidden, column = new_tokens(size, dims, dtype)
    hidden, image = hidden.transpose(0, 1), torch.tensor([[False, True, False, True, False]])
    made = case([VAR(tau=3.0, dims=dims)], Shape(keys=5, new=5))
    forward, state = made.forward, var.SinkState()
    forward.image = torch.cat((torch.zeros(1, 2, dtype=torch.bool), image), 1)
    forward.position = Position(2)
    layers.write_groups(made.edits[0].method, 0, hidden, forward, state)
    expected = var.key_groups(image, column[:, 1][None] > 0).float()
    assert torch.equal(state.groups[0][..., 2:7], expected)


@pytest.mark.parametrize("heads", [3, 8])
@pytest.mark.parametrize(
    ("semantics", "filtered"), [("release", True), ("paper", True), ("release", False)]
)
def test_the_heads_that_vhr_chooses(
    semantics: str, filtered: bool, heads: int, interpreter: None
) -> None:
    generator = torch.Generator().manual_seed(heads)
    outputs = torch.randn(2, 4, heads, 12, generator=generator)
    with_image, text = outputs.unbind()
    with_image[1, 1], text[1, 1] = 9.0, -9.0  # an outlier in both
    with_image[2] = text[2]  # no head is above the median
    method = VHR(alpha=3.0, filter=filtered, semantics=semantics)
    seen = torch.tensor([True, True, True, False])
    forward: Any = SimpleNamespace(shard=WHOLE, seen=seen)
    found = method._launch(with_image, text, forward)
    chosen = method.choose(with_image, text)
    assert torch.equal(found, torch.where(chosen & seen[:, None], 3.0, 1.0))
    assert bool(chosen[1, 1]) != filtered


# ---- whole generations


def per_layer(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def test_launches_per_layer(launched: Counter[str]) -> None:
    """Per token and layer: VAR one in place of the stock kernel, GIFT two, both two; for a prompt
    VAR two. VAR acts in layers 0 to 2 of 4, GIFT in 2 and 3.
    """
    model = planted("llava", kv_heads=1)
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    steps = {
        ("var",): ({"columns": 3, "attend": 3}, {"attend": 3}),
        ("gift",): ({"attend": 2, "finish": 2}, {"attend": 2, "finish": 2}),
        # in layer 2 a prompt's last row has both, those before it VAR alone; layer 1 is watched
        ("var", "gift"): ({"columns": 3, "attend": 4, "finish": 2}, {"attend": 4, "finish": 2}),
    }
    for names, (prompt, token) in steps.items():
        with wrap(model, *ours(names)):
            generate(model, batch, steps=2)  # kernels are tried
            launched.clear()
            generate(model, batch, steps=1)
            assert launched == Counter(prompt), names
            launched.clear()
            output = generate(model, batch, steps=3)
            assert launched == Counter(prompt) + Counter(token) + Counter(token), names
        assert error(model, batch, output, names) <= CLOSE


def stock_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of all calls of the stock kernel."""
    from vlm_patch.engine.attention import ALL_ATTENTION_FUNCTIONS

    rows: list[int] = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def noted(module: Any, query: Tensor, *more: Any, **named: Any) -> Any:
        rows.append(query.shape[2])
        return stock(module, query, *more, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", noted)
    return rows


@pytest.mark.parametrize(
    ("kind", "names", "rows", "options"),
    [
        ("llava-gqa", ("var",), PADDED, {"cache_implementation": "static"}),
        ("llava", ("gift-inside", "var"), tiny.ONE_IMAGE, {}),
        ("llava", ("var-release", "gift"), tiny.ONE_IMAGE, {}),
        ("qwen2-vl", ("var", "vhr", "gift"), PADDED, {}),
        ("sliding", ("var", "gift"), tiny.ONE_IMAGE, {}),
    ],
)
def test_generations_equal_the_reference(
    kind: str,
    names: Sequence[str],
    rows: Sequence[Sequence[int]],
    options: dict[str, Any],
    launched: Counter[str],
) -> None:
    model = tiny.sliding_llava(kv_heads=1) if kind == "sliding" else planted(kind)
    batch = tiny.inputs(model, rows)
    with wrap(model, *ours(names)):
        output = generate(model, batch, steps=3, **options)
    assert error(model, batch, output, names) <= CLOSE
    assert launched["attend"]
    assert bool(launched["reinforced_heads"]) == ("vhr" in names)


@settings(max_examples=2)
@given(case=cases().filter(lambda case: not case.build.exact))
def test_anything(case: Case) -> None:
    """As the fuzz test, by the kernels."""
    with patch.object(dispatch, "DEVICES", ("cpu",)), patch.object(dispatch, "_verdicts", {}):
        test_fuzz.test_anything.hypothesis.inner_test(case)


def test_some_heads_are_off(launched: Counter[str]) -> None:
    model = planted("llava", kv_heads=2)
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    names = ("var", "gift")
    with wrap(model, *ours(names)) as patched:
        patched.heads["var"][:, 0] = False
        patched.heads["gift"][2, 1:] = False
        heads = {name: table.clone() for name, table in patched.heads.items()}
        output = generate(model, batch, steps=2)
    assert error(model, batch, output, names, heads) <= CLOSE
    assert launched["finish"]


@dataclass(frozen=True)
class Brighter(KeyReweighting):
    """A method of a user's own, which has nothing written for Triton."""

    name: ClassVar[str] = "brighter"

    def edited_rows(self, forward: ForwardContext) -> Tensor:
        return forward.text

    def groups(self, layer: int, forward: ForwardContext, state: State) -> Tensor:
        image = forward.image.float()
        nothing = torch.zeros_like(image)
        return torch.stack((image, nothing, nothing, nothing + 1), 1)

    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        shares = torch.zeros_like(masses)
        shares[:, 0], shares[:, 3] = 0.5 / (1 + masses[:, 0]), 1.0
        return shares


def test_a_method_without_anything_for_triton(
    launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = planted("llava", layers=2, kv_heads=1)
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with wrap(model, Brighter(), *ours(("var",))):
        fast = generate(model, batch, steps=2)
        assert launched["attend"]
        assert launched["finish"]
        monkeypatch.setattr(dispatch, "DEVICES", ())
        slow = generate(model, batch, steps=2)
    for one, other in zip(fast.logits, slow.logits, strict=True):
        assert (one - other).abs().max() <= CLOSE


@dataclass(frozen=True)
class TwoGroups(Brighter):
    """Its groups are not the four that the kernels know."""

    def groups(self, layer: int, forward: ForwardContext, state: State) -> Tensor:
        return super().groups(layer, forward, state)[:, ::3]

    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        return torch.ones_like(masses)


def test_what_the_kernels_leave_to_torch(launched: Counter[str]) -> None:
    """Other numbers of groups, three methods in a layer, gradients, float64."""
    model = planted("llava")
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    for methods in ([TwoGroups()], [Brighter(), *ours(("gift-inside", "var"))]):
        with wrap(model, *methods, layers=[2]):
            generate(model, batch, steps=2)
        assert not launched["attend"]
    launched.clear()
    with torch.enable_grad(), wrap(model, *ours(("var",))):
        model(**batch)
    assert not launched
    with wrap(tiny.float64(planted("llava")), *ours(("var",))) as patched:
        inputs = {**batch, "pixel_values": batch["pixel_values"].double()}
        generate(patched.model, inputs, steps=2)
    assert not launched["attend"]


class Silent(VAR):
    """What `observe_hidden` does was replaced, so that the kernels must leave it alone."""

    seen: ClassVar[list[int]] = []

    def observe_hidden(
        self, layer: int, hidden: Tensor, forward: ForwardContext, state: var.SinkState
    ) -> None:
        self.seen.append(layer)
        super().observe_hidden(layer, hidden, forward, state)


def test_a_subclass_is_shown_what_it_asks_for(launched: Counter[str]) -> None:
    model = planted("llava")
    with wrap(model, Silent(tau=3.0, dims=tiny.SINK_DIMS)):
        generate(model, tiny.inputs(model, tiny.ONE_IMAGE), steps=3)
    assert Silent.seen == [0, 1, 2] * 3
    assert "columns" not in launched


# ---- the launcher and first use


def test_kernels_that_disagree_are_left_out(interpreter: None) -> None:
    exact = torch.tensor([1.0, 2.0])
    with pytest.warns(UserWarning, match="A fused kernel is left out for row .it is 2 apart"):
        assert torch.equal(dispatch.tried("row", lambda: 2 * exact, lambda: exact), exact)
    assert torch.equal(dispatch.tried("row", lambda: 2 * exact, lambda: exact), exact)
    assert not torch.equal(dispatch.tried("other", lambda: 1.001 * exact, lambda: exact), exact)


def test_kernels_that_fail_are_left_out(interpreter: None) -> None:
    def broken() -> Tensor:
        raise RuntimeError("no such card")

    exact = torch.tensor([1.0, 2.0])
    with pytest.warns(UserWarning, match="left out for row .RuntimeError: no such card.; plain"):
        assert dispatch.tried("row", broken, lambda: exact) is exact


def test_one_row_next_to_a_threshold_is_no_fault(interpreter: None) -> None:
    exact = torch.ones(200, 4)
    other = exact.clone()
    other[7] = 2.0
    assert dispatch.tried("rows", lambda: other, lambda: exact) is other


def test_without_triton_torch_does_it(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INSTALLED", False)
    dispatch.installed.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed: .* pip install triton"):
        assert not dispatch.possible("cuda")
    dispatch.installed.cache_clear()


def test_it_imports_without_triton() -> None:
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "hide = lambda name, *more: None if name == 'triton' else find(name, *more)\n"
        "import transformers\n"
        "importlib.util.find_spec = hide\n"
        "sys.modules['triton'] = None\n"
        "from eval.support.agreement import planted, ours\n"
        "from tests.support.agreement import generate\n"
        "from eval.support import tiny\n"
        "import vlm_patch\n"
        "model = planted('llava')\n"
        "with vlm_patch.wrap(model, *ours(['var'])):\n"
        "    generate(model, tiny.inputs(model, tiny.ONE_IMAGE), steps=2)\n"
        "assert 'vlm_patch.engine.kernels.attend' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


SHARED = {"A100": 163, "H100": 227}
"""KiB of shared memory that a program may have."""


def test_the_kernels_compile_for_real_cards(tmp_path: Path) -> None:
    """To machine code, which the interpreter above cannot promise."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.compile_kernels"]
    lines = subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout
    made = [line.split("|") for line in lines.splitlines()]
    assert {card for _, card, _, _ in made} == {"A100", "H100"}
    for name, card, code, shared in made:
        assert code == "True", (name, card)
        assert int(shared) <= SHARED[card] * 1024, (name, card)

"""The kernels for a generated token, run by Triton's interpreter on the CPU, against their twin in
torch and, in whole generations, against the slow reference.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.support.agreement import NO_PROCESSOR, error, generate, new_tokens
from vlm_patch import GIFT, VAR, wrap
from vlm_patch.engine import fused
from vlm_patch.engine.attention import Call
from vlm_patch.methods import gift, var
from vlm_patch.primitives import dispatch, launch

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "error:A fused kernel is left out")
CLOSE = 1e-5


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels on the CPU too, for as long as a test runs."""
    monkeypatch.setattr(dispatch, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(dispatch, "_verdicts", {})


@pytest.fixture
def launched(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of the calls that the kernels did."""
    layers: list[int] = []
    launch = fused.launch

    def noted(call: Call, *more: Any) -> Tensor:
        layers.append(call.layer)
        return launch(call, *more)

    monkeypatch.setattr(fused, "launch", noted)
    return layers


def row_of(
    heads: int,
    shared: int,
    keys: int,
    size: int,
    width: int,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: float,
) -> Call:
    """A row in a batch of 2; with `padded` the second sample's first keys are hidden."""
    generator = torch.Generator().manual_seed(heads + keys)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query, key = draw(2, heads, 1, size), draw(2, heads // shared, keys, size)
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., : keys // 3] = False
    module = SimpleNamespace(is_causal=True)
    value = draw(2, heads // shared, keys, width)
    return Call(
        0, module, query, key, value, mask if padded else None, dict(options), lambda: (query, None)
    )


def groups_of(method: Any, keys: int) -> Tensor:
    """Key groups of an image in the middle; for VAR with sinks, for GIFT with a map."""
    generator = torch.Generator().manual_seed(keys)
    image = torch.zeros(2, keys, dtype=torch.bool)
    image[:, keys // 4 : -keys // 4] = True
    if isinstance(method, VAR):
        sinks = torch.rand(2, keys, generator=generator) < 0.2
        return var.key_groups(image, sinks).float()
    query = ~image & (torch.arange(keys) > keys // 2)
    return gift.key_groups(image, query, 1 + 9 * torch.rand(2, keys, generator=generator))


SHAPES: dict[str, dict[str, Any]] = {
    "one block": {"heads": 4, "shared": 1, "keys": 64, "size": 16, "width": 16},
    "part of a block": {"heads": 4, "shared": 1, "keys": 7, "size": 16, "width": 16},
    "blocks and a part": {"heads": 4, "shared": 1, "keys": 150, "size": 16, "width": 16},
    "grouped queries": {"heads": 8, "shared": 4, "keys": 70, "size": 8, "width": 8},
    "odd sizes": {"heads": 3, "shared": 3, "keys": 70, "size": 24, "width": 20},
    "padding": {"heads": 4, "shared": 2, "keys": 90, "size": 16, "width": 16, "padded": True},
    "softcap": {
        "heads": 4,
        "shared": 2,
        "keys": 70,
        "size": 16,
        "width": 16,
        "scaling": 0.5,
        "softcap": 2.0,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "method",
    [VAR(0.7, 0.1, 0.1), GIFT(2.0, beta=1.3, head_fraction=0.4)],
    ids=["var", "gift"],
)
def test_a_row_equals_its_twin(method: Any, shape: str, interpreter: None) -> None:
    call = row_of(**SHAPES[shape])
    groups = groups_of(method, call.key.shape[2])
    with torch.no_grad():
        assert fused.serves(call)
        found = fused.launch(call, groups, method.shares)
        twin = fused.twin(call, groups, method.shares)
        stock = call.output(call.weights(torch.zeros(1, dtype=torch.long)))
    torch.testing.assert_close(found, twin, rtol=0, atol=2e-6)
    assert (stock - twin).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_in_half_precision(dtype: torch.dtype, interpreter: None) -> None:
    """Float32 inside: what differs from the twin is the rounding of the output."""
    call = row_of(4, 2, 100, 16, 16, dtype=dtype)
    method = VAR(0.7, 0.1, 0.1)
    groups = groups_of(method, 100)
    found = fused.launch(call, groups, method.shares)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found, fused.twin(call, groups, method.shares), rtol=step, atol=1e-6)


def test_keys_and_groups_are_read_where_they_lie(interpreter: None) -> None:
    """A static cache and the buffers of a generation are longer than what is used of them."""
    call, method = row_of(4, 2, 90, 16, 16), VAR(0.7, 0.1, 0.1)
    groups = groups_of(method, 90)
    cut = call.without_tail(70)
    assert not cut.key.is_contiguous()
    found = fused.launch(cut, groups[..., :70], method.shares)
    torch.testing.assert_close(found, fused.twin(cut, groups[..., :70], method.shares))


@pytest.mark.parametrize(
    ("kind", "names"),
    [("llava-gqa", ("var",)), ("llava", ("gift",)), ("qwen2-vl", ("var", "vhr"))],
)
def test_generations_equal_the_reference(
    kind: str, names: Sequence[str], launched: list[int]
) -> None:
    model = planted(kind)
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(names)) as patch:
        output = generate(model, batch, steps=3)
        layers = {layer for name in names[:1] for layer in patch.heads[name].any(1).nonzero()[:, 0]}
    assert error(model, batch, output, names) <= CLOSE
    assert set(launched) == {int(layer) for layer in layers}
    assert len(launched) == 2 * len(layers) + 1  # two generated tokens were read; and one trial


def test_a_static_cache(launched: list[int]) -> None:
    model = planted("llava-gqa")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(("var",))):
        output = generate(model, batch, steps=3, cache_implementation="static")
    assert error(model, batch, output, ("var",)) <= CLOSE
    assert launched


def test_what_the_kernels_leave_to_torch(launched: list[int]) -> None:
    """Two edits in one layer, single heads, and calls that need gradients."""
    model = planted("llava")
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with wrap(model, *ours(("var",))) as patch:
        patch.heads["var"][:, 0] = False
        generate(model, batch, steps=3)
    assert not launched
    with wrap(model, *ours(("var", "gift"))):
        output = generate(model, batch, steps=3)
    assert error(model, batch, output, ("var", "gift")) <= CLOSE
    assert set(launched) == {0, 1, 3}  # VAR alone, VAR alone, GIFT alone; both act in layer 2
    assert not fused.serves(row_of(4, 1, 64, 16, 16))  # gradients are on here


def test_kernels_that_disagree_are_left_out(interpreter: None) -> None:
    exact = torch.tensor([1.0, 2.0])
    with pytest.warns(UserWarning, match="A fused kernel is left out for row .it is 2 apart"):
        assert dispatch.tried("row", lambda: 2 * exact, lambda: exact) is exact
    assert dispatch.tried("row", lambda: 2 * exact, lambda: exact) is exact
    assert dispatch.tried("other", lambda: 1.001 * exact, lambda: exact) is not exact


def test_kernels_that_fail_are_left_out(interpreter: None) -> None:
    def broken() -> Tensor:
        raise RuntimeError("no such card")

    exact = torch.tensor([1.0, 2.0])
    with pytest.warns(UserWarning, match="left out for row .RuntimeError: no such card.; plain"):
        assert dispatch.tried("row", broken, lambda: exact) is exact


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads", [3, 8, 28])
def test_shares_of_the_heads(heads: int, seed: int, interpreter: None) -> None:
    """Both methods' few numbers a head, with equal masses, none, and a row with nothing left."""
    generator = torch.Generator().manual_seed(seed)
    masses = torch.rand(4, 4, heads, 1, generator=generator).div(3)
    masses[1, :, 1] = masses[1, :, 0]
    masses[2, :3] = 0
    masses[3, 0], masses[3, 1], masses[3, 2] = 0, 0, 1
    groups = torch.zeros(4, 4, 1)
    found = launch.sink_shares(masses, 0.6, 0.5, 0.1)
    torch.testing.assert_close(found, var.sink_shares(masses, groups, 0.6, 0.5, 0.1))
    for beta in (0.0, 0.7, 1.0):
        for fraction in (0.1, 0.5, 1.0):
            found = launch.gaze_shares(masses, beta, gift.how_many(heads, fraction))
            torch.testing.assert_close(found, gift.gaze_shares(masses, beta, fraction))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "dims"), [(64, (3,)), (1500, (1499, 7, 30)), (64, (0, 63))])
def test_sinks_of_new_tokens(
    size: int, dims: tuple[int, ...], dtype: torch.dtype, interpreter: None
) -> None:
    hidden, column = new_tokens(size, dims, dtype)
    assert torch.equal(launch.sink_column(hidden, torch.tensor(dims), 3.0)[..., 0], column)


def test_without_triton_torch_does_it(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlm_patch.primitives.kernels", None)
    monkeypatch.delattr("vlm_patch.primitives.kernels", raising=False)
    dispatch.kernels.cache_clear()
    warned = pytest.warns(UserWarning, match="Triton is not installed: .* pip install triton")
    with torch.no_grad(), warned:
        assert not dispatch.possible("cuda")
    dispatch.kernels.cache_clear()


def test_the_cpu_never_imports_triton() -> None:
    code = (
        "import sys, vlm_patch\n"
        "from eval.support.agreement import planted, ours\n"
        "from tests.support.agreement import generate\n"
        "from eval.support import tiny\n"
        "model = planted('llava')\n"
        "with vlm_patch.wrap(model, *ours(['var'])):\n"
        "    generate(model, tiny.inputs(model, tiny.ONE_IMAGE), steps=2)\n"
        "assert 'vlm_patch.primitives.kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_kernels_compile_for_real_cards(tmp_path: Path) -> None:
    """To machine code, which the interpreter above cannot promise."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.compile_kernels"]
    lines = subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout
    found = {tuple(line.split()) for line in lines.splitlines()}
    names = ("row_masses", "row_output", "sink_column", "sink_shares", "gaze_shares")
    assert found == {(name, card, "True") for name in names for card in ("A100", "H100")}

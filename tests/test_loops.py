"""The compiled loops for a generated token on a CPU: against torch, which defines them, and, in
whole generations, against the slow reference.
"""

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.support import tiny
from eval.support.agreement import NO_PROCESSOR, error, generate, new_tokens, ours, planted
from vlm_patch import GIFT, VAR, cpu, wrap
from vlm_patch.method import Memory, append, reweigh, room
from vlm_patch.methods import gift, looped, var

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "error:Numba is installed")
CLOSE = 1e-5


def rows_and_image(heads: int, keys: int) -> tuple[Tensor, Tensor]:
    """Weights `[4, H, 1, K]` and an image in the middle: two equal heads, a sample that hardly
    looks at the image, one that hardly looks at anything else.
    """
    generator = torch.Generator().manual_seed(heads * keys)
    scores = 3 * torch.randn(4, heads, 1, keys, generator=generator)
    image = torch.zeros(4, keys, dtype=torch.bool)
    image[:, keys // 4 : keys - keys // 4] = True
    scores[1, -1] = scores[1, 0]
    scores[2] -= 30 * image[2]
    scores[3] += 6 * image[3]
    return scores.softmax(-1), image


def strided(groups: Tensor) -> Tensor:
    """The same as part of a longer buffer, which is how they come."""
    longer = torch.full((*groups.shape[:2], 2 * groups.shape[2]), torch.nan)
    longer[..., : groups.shape[2]] = groups
    return longer[..., : groups.shape[2]]


SIZES = [(1, 5), (3, 64), (8, 87), (28, 150)]


@pytest.mark.parametrize(("heads", "keys"), SIZES)
@pytest.mark.parametrize("numbers", [(0.6, 0.5, 0.2), (1.0, 0.0, 0.0), (0.3, 0.9, 0.5)])
def test_a_row_of_var(numbers: Sequence[float], heads: int, keys: int) -> None:
    weights, image = rows_and_image(heads, keys)
    sinks = torch.rand(4, keys, generator=torch.Generator().manual_seed(1)) < 0.3
    sinks[0] |= image[0]  # nothing is left to give to
    groups = strided(var.key_groups(image, sinks).float())
    found = looped.sink_row(weights, groups, *numbers)
    twin = reweigh(weights, groups, lambda m, g: var.sink_shares(m, g, *numbers))
    torch.testing.assert_close(found, twin, rtol=0, atol=2e-6)
    assert heads < 8 or (twin - weights).abs().max() > 1e-3
    assert torch.equal(found[0], weights[0])


@pytest.mark.parametrize(("heads", "keys"), SIZES)
@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_a_row_of_gift(fraction: float, beta: float, heads: int, keys: int) -> None:
    weights, image = rows_and_image(heads, keys)
    query = ~image & (torch.arange(keys) > keys // 2)
    gain = 1 + 9 * torch.rand(4, keys, generator=torch.Generator().manual_seed(2))
    groups = strided(gift.key_groups(image, query, gain))
    count = gift.how_many(heads, fraction)
    found = looped.gaze_row(weights, groups, beta, count)
    twin = reweigh(weights, groups, lambda m, _: gift.gaze_shares(m, beta, fraction))
    torch.testing.assert_close(found, twin, rtol=1e-5, atol=2e-6)
    assert (twin - weights).abs().max() > 1e-3


def test_nothing_left_for_gift() -> None:
    """A row whose only weight is on the question, with beta 0: it stays as it is."""
    weights = torch.tensor([0.0, 1.0]).expand(1, 2, 1, 2).contiguous()
    groups = gift.key_groups(*torch.eye(2, dtype=torch.bool)[:, None], torch.ones(1, 2))
    assert torch.equal(looped.gaze_row(weights, groups, 0.0, 1), weights)


@pytest.mark.parametrize(("size", "dims"), [(64, (3,)), (1500, (1499, 7, 30)), (64, (0, 63))])
def test_sinks_of_new_tokens(size: int, dims: tuple[int, ...]) -> None:
    hidden, column = new_tokens(size, dims)
    groups = torch.full((5, 4, 9), 7.0)
    looped.sink_column(hidden, torch.tensor(dims), 3.0, groups, 6)
    assert torch.equal(groups[..., 6], column)
    groups[..., 6] = 7.0
    assert (groups == 7.0).all()


def test_a_sink_at_its_threshold() -> None:
    """Score 2 exactly, of |x| = 2 and RMS 1, reaches tau = 2 and no more."""
    hidden = torch.tensor([2.0, 0.0, 0.0, 0.0]).view(1, 1, 4)
    for tau, sink in ((2.0, 1.0), (2.001, 0.0)):
        groups = torch.zeros(1, 4, 1)
        looped.sink_column(hidden, torch.tensor([0]), tau, groups, 0)
        assert groups[0, 1, 0] == sink


class Other(Tensor):
    pass


def test_what_the_loops_leave_to_torch() -> None:
    row = torch.ones(2, 4, 1, 8)
    assert not cpu.serves(row)  # gradients are on here
    with torch.no_grad():
        assert cpu.serves(row)
        assert not cpu.serves(row.double())
        assert not cpu.serves(row.bfloat16())
        assert not cpu.serves(row.transpose(1, 3))
        assert not cpu.serves(torch.ones(cpu.MOST))
        assert not cpu.serves(row.clone().requires_grad_())
        assert not cpu.serves(row.to("meta"))
        assert not cpu.serves(row.as_subclass(Other))


@pytest.fixture
def looped_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the loops that edited a row."""
    names: list[str] = []
    edited = looped._edited

    def noted(loop: Any, *more: Any) -> Tensor:
        names.append(loop.__name__)
        return edited(loop, *more)

    monkeypatch.setattr(looped, "_edited", noted)
    return names


GENERATIONS = [
    ("llava", ("var",)),
    ("llava-gqa", ("gift",)),
    ("qwen2-vl", ("var", "gift", "vhr")),
    ("sliding", ("var",)),
]


def built(kind: str) -> Any:
    return tiny.plant(tiny.sliding_llava()) if kind == "sliding" else planted(kind)


@pytest.mark.parametrize(("kind", "names"), GENERATIONS)
def test_generations_equal_the_reference(
    kind: str, names: Sequence[str], looped_rows: list[str]
) -> None:
    model = built(kind)
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(names)) as patch:
        output = generate(model, batch, steps=3)
        # two generated tokens are read; GIFT edits the last row of a prompt too
        loops = {"var": ("sink_row", 2), "gift": ("gaze_row", 3)}
        layers = {name: int(patch.heads[name].any(1).sum()) for name in names if name in loops}
        count = {loops[name][0]: loops[name][1] * layers[name] for name in layers}
    assert error(model, batch, output, names) <= CLOSE
    assert {name: looped_rows.count(name) for name in looped_rows} == count


@pytest.mark.parametrize(("kind", "names"), GENERATIONS)
def test_generations_without_numba(
    kind: str,
    names: Sequence[str],
    looped_rows: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same in plain torch, which is what most users have."""
    monkeypatch.setattr(cpu, "loops", lambda: None)
    model = built(kind)
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(names)):
        output = generate(model, batch, steps=3)
    assert error(model, batch, output, names) <= CLOSE
    assert not looped_rows


@pytest.mark.parametrize("method", [VAR(require_visual_sink=True), VAR(semantics="release")])
def test_rules_that_have_no_loop(method: VAR, looped_rows: list[str]) -> None:
    assert method.row(torch.ones(1, 2, 1, 4), torch.ones(1, 4, 4)) is None
    assert GIFT().row(torch.ones(1, 2, 1, 4), torch.ones(1, 4, 4)).shape == (1, 2, 1, 4)
    assert looped_rows == ["gaze_row"]


def test_without_numba_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cpu.loops.cache_clear()
    assert cpu.loops() is None
    cpu.loops.cache_clear()
    assert not recwarn.list


def test_a_numba_that_does_not_work_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlm_patch.loops", None)
    monkeypatch.delattr("vlm_patch.loops", raising=False)
    cpu.loops.cache_clear()
    with pytest.warns(UserWarning, match=r"not used \(ModuleNotFoundError: .* set NUMBA_CACHE_DIR"):
        assert cpu.loops() is None
    cpu.loops.cache_clear()


def test_room_in_a_buffer() -> None:
    memory: Memory = {}
    assert room(memory, ("groups", 0), 1) is None
    buffer = append(memory, ("groups", 0), torch.ones(2, 4, 200), 0)
    assert room(memory, ("groups", 0), 400) is buffer
    assert room(memory, ("groups", 0), 401) is None
    with torch.inference_mode():
        inside = append(memory, ("other", 0), torch.ones(2, 4, 2), 0)
        assert room(memory, ("other", 0), 3) is inside
    assert room(memory, ("other", 0), 3) is None  # could not be written here
    larger = append(memory, ("other", 0), torch.zeros(2, 4, 1), 2)
    assert larger[0, 0, :4].tolist() == [1, 1, 0, 0]
    assert room(memory, ("other", 0), 3) is larger

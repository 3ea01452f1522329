"""The same generations on a card as on the CPU, and as the slow reference gives them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import StaticCache

import vlm_patch
from eval.studies import demo
from eval.support import tiny
from eval.support.agreement import ours, planted
from eval.support.ways import MODES, SIDES, measure
from tests.eval.support.test_modes import REFUSED
from tests.gpu.conftest import DEVICE, apart
from tests.support.agreement import NO_PROCESSOR, new_tokens
from tests.support.kernel_rows import CARD, EDITS, SHAPES, Shape, case
from tests.support.on_device import CASES, CPU, ELSEWHERE, modes_on, moved
from vlm_patch import GIFT, VAR
from vlm_patch.engine.kernels.layer import LayerKernel, serves, write_groups
from vlm_patch.methods import var
from vlm_patch.primitives import dispatch

CLOSE = 3e-5
MIXED = "all, map from an edited layer"
WAYS = [name for name, mode in MODES.items() if mode.known and name not in ELSEWHERE]
pytestmark = pytest.mark.filterwarnings(
    NO_PROCESSOR,
    "error:A fused kernel is left out",
    "ignore:no published settings",
    "ignore:VAR does nothing",
)


def close(name: str, found: torch.Tensor, expected: torch.Tensor, most: float = CLOSE) -> None:
    """Notes how far both are apart, at most `most`."""
    off = float((found.to(CPU).double() - expected.to(CPU).double()).abs().max())
    apart[name] = max(off, apart.get(name, 0.0))
    assert off <= most, f"{name}: {off:.1e} apart, at most {most:g} expected"


# ---- the kernels against what defines them

CHECKS = [
    *((shape, names, torch.bfloat16) for shape in CARD for names in ("var", "gift", "var, gift")),
    *((shape, "var", torch.float16) for shape in ("LLaVA-1.5-7B", "Qwen2-VL-7B, prompt")),
    ("LLaVA-1.5-7B", "gift, var", torch.float16),
    *((shape, names, torch.float32) for shape in SHAPES for names in ("var", "gift, var")),
    ("part of a block", "gift, shares by torch", torch.float32),
    ("LLaVA-1.5-7B", "var", torch.float32),
    ("Qwen2-VL-7B", "gift", torch.float32),
]

if DEVICE.type == "cuda":

    @pytest.mark.parametrize(("shape", "names", "dtype"), CHECKS)
    @torch.no_grad()
    def test_rows(shape: str, names: str, dtype: torch.dtype) -> None:
        made = case(EDITS[names], {**SHAPES, **CARD}[shape], dtype, DEVICE)
        assert serves(made.call)
        (expected, groups), (found, written) = made.by_torch(), made.by_kernel()
        most = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        where = made.edited()[..., None]
        name = f"kernel, {names} {dtype}"
        close(name, found * where, expected * where, most * max(1.0, float(expected.abs().max())))
        for one, other in zip(written, groups, strict=True):
            close("kernel, groups", one, other, 1e-6)

    @torch.no_grad()
    def test_a_large_gain_in_float16() -> None:
        made = case([GIFT(60.0)], CARD["LLaVA-1.5-7B"], torch.float16, DEVICE)
        close("kernel, e^60 in float16", made.by_kernel()[0], made.by_torch()[0], 4e-3)

    @torch.no_grad()
    def test_a_kernel_is_launched_past_the_jit() -> None:
        made = case(EDITS["var, gift"], CARD["LLaVA-1.5-7B"], torch.bfloat16, DEVICE)
        made.by_kernel()
        kernel = LayerKernel(made.call, made.edits, made.rows, made.hidden)
        assert kernel.finish is not None
        assert kernel.attend.bound is not None, "a version of Triton that launch.KNOWN leaves out"
        assert kernel.finish.bound is not None

    @torch.no_grad()
    def test_sinks_of_new_rows() -> None:
        hidden, column = moved(new_tokens(1500, (1499, 7, 30), torch.bfloat16), DEVICE)
        made = case([VAR(tau=3.0, dims=(1499, 7, 30))], Shape(keys=5, new=5), device=DEVICE)
        made.forward.image = torch.zeros(1, 5, dtype=torch.bool, device=DEVICE)
        state = var.SinkState()
        write_groups(made.edits[0].method, 0, hidden.transpose(0, 1), made.forward, state)
        close("kernel, sinks", state.groups[0][0, :, :5].T, column, 0.0)

    def test_the_kernels_are_used() -> None:
        with torch.no_grad():
            assert dispatch.possible(DEVICE.type)


# ---- whole generations


def near_the_reference(name: str, side: str) -> None:
    row = measure(name, side)
    assert row.max_error is not None, row
    apart[f"reference, {side}"] = max(row.max_error, apart.get(f"reference, {side}", 0))
    assert row.max_error <= CLOSE, row


@pytest.mark.parametrize("name", WAYS)
def test_ways_of_generating(name: str) -> None:
    """Against the float64 reference, which stays on the CPU; what VHR refuses, without it."""
    refused = (name, MIXED) in REFUSED
    for side in ("var", "gift, map from an edited layer") if refused else (MIXED,):
        with modes_on(DEVICE):
            near_the_reference(name, side)


@pytest.mark.parametrize("side", [side for side in SIDES if side != MIXED])
@pytest.mark.parametrize("name", ["greedy", "beams", "second turn on the returned cache"])
def test_each_method_alone(name: str, side: str) -> None:
    with modes_on(DEVICE):
        near_the_reference(name, side)


@pytest.mark.parametrize("name", CASES)
def test_what_the_cpu_gives(name: str) -> None:
    expected, found = CASES[name](CPU), CASES[name](DEVICE)
    for one, other in zip(found, expected, strict=True):
        close("the CPU", one, other)


@pytest.mark.parametrize("name", ["var", "gift", "vhr-unfiltered"])
@torch.no_grad()
def test_bfloat16(name: str) -> None:
    """Methods cost bfloat16 not much more than it costs the stock model, median over 5 models."""
    costs: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for seed in range(1, 6):
        exact = tiny.plant(tiny.llava(seed=seed)).to(DEVICE)
        half = copy.deepcopy(exact).bfloat16()
        batch = tiny.inputs(exact.to(CPU), tiny.BATCH_OF_3)
        exact.to(DEVICE)
        for patched in costs:
            logits = []
            for model in (exact, half):
                with vlm_patch.wrap(model, *ours((name,))) as patch:
                    given = moved(batch, DEVICE)
                    given["pixel_values"] = given["pixel_values"].to(model.dtype)
                    if not patched:
                        patch.remove()
                    logits.append(model(**given).logits[:, -1].float())
            costs[patched].append((logits[0] - logits[1]).abs().mean().to(CPU))
    ours_, stock = (torch.stack(costs[patched]).median() for patched in (True, False))
    apart[f"bfloat16, {name} by stock"] = float(ours_ / stock)
    assert ours_ <= 2 * stock


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_a_compiled_loop(mode: str) -> None:
    """Steps with a static cache; logits are copied before the next step overwrites them."""
    backend = {"mode": mode} if DEVICE.type == "cuda" else {"backend": "eager"}
    model, names = planted("llava"), ("var", "gift", "vhr")
    batch = moved(tiny.inputs(model, tiny.ONE_IMAGE), DEVICE)
    model.to(DEVICE)
    with vlm_patch.wrap(model, *ours(names)):
        found = []
        for compiled in (False, True):
            torch._dynamo.reset()
            cache = StaticCache(config=model.config, max_cache_len=64)
            run = torch.compile(model.forward, **backend) if compiled else model.forward
            step = model(**batch, past_key_values=cache, use_cache=True).logits[:, -1:].clone()
            found.append([step])
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                token = {"input_ids": step.argmax(-1), "past_key_values": cache}
                step = run(**token, use_cache=True).logits[:, -1:].clone()
                found[-1].append(step)
    for one, other in zip(*found, strict=True):
        close(f"compiled, {mode}", one, other)


@pytest.mark.parametrize("side", [*("var", "gift", "vhr", "paint"), "all and paint"])
@torch.no_grad()
def test_a_step_as_one_graph(side: str) -> None:
    """Captured as a CUDA graph, for a second prompt too; then `generate`, which compiles itself."""
    on_card = DEVICE.type == "cuda"
    how: Any = {"mode": "reduce-overhead"} if on_card else {"backend": "eager"}
    model = planted("llava", kv_heads=2)
    prompts = [[*tiny.ONE_IMAGE[0], *more] for more in ((), (27, 28))]
    batches = [moved(tiny.inputs(model, [ids]), DEVICE) for ids in prompts]
    model.to(DEVICE)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    with vlm_patch.wrap(model, *ours(SIDES[side])):
        run = torch.compile(model.forward, fullgraph=True, **how)
        cache: Any = StaticCache(config=model.config, max_cache_len=64)
        for batch in batches:
            found = []
            for forward in (model.forward, run):
                cache.reset()
                step = model(**batch, past_key_values=cache, use_cache=True).logits[:, -1:]
                found.append([step])
                for _ in range(5):
                    torch.compiler.cudagraph_mark_step_begin()
                    token = {"input_ids": step.argmax(-1), "past_key_values": cache}
                    step = forward(**token, use_cache=True).logits[:, -1:].clone()
                    found[-1].append(step)
            for one, other in zip(*found, strict=True):
                close(f"one graph, {side}", one, other)
        assert counters["stats"]["unique_graphs"] == 1
        assert counters["inductor"]["cudagraph_skips"] == 0
        expected = torch.cat([step.argmax(-1) for step in found[0]], 1)
        options = {"cache_implementation": "static", "do_sample": False, "max_new_tokens": 6}
        answer = model.generate(**batches[1], **options, min_new_tokens=6)
        assert torch.equal(answer[:, -6:-3], expected[:, :3])
        assert not counters["graph_break"]
        assert counters["inductor"]["cudagraph_skips"] == 0


# ---- the demo


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` from start to end, on few scenes."""
    for name in demo.RUNS:
        settings = yaml.safe_load((demo.CONFIGS / f"{name}.yaml").read_text())
        settings["chair"] = {**settings.get("chair", {}), "images": 4, "max_new_tokens": 32}
        settings["pope"] = {**settings.get("pope", {}), "images": 2, "per_image": 1}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(demo, "CONFIGS", tmp_path)
    demo.demo(tmp_path / "out", str(DEVICE))
    assert (tmp_path / "out" / "scenes.png").exists()
    for name in demo.RUNS:
        made = yaml.safe_load((tmp_path / "out" / name / "config.yaml").read_text())
        assert made["environments"][0]["device"].startswith(str(DEVICE))

"""The speed table on tiny models; nothing here depends on how long anything takes."""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_patch
from eval.__main__ import main
from eval.errors import EvalError
from eval.speed import counts, goals, measure, memory
from eval.speed import table as speed_table
from eval.speed.clock import Budget
from eval.speed.models import LLAVA_7B, TINY_VISION, Dims, Loaded, build, decoder, pictured
from eval.speed.shapes import METHODS, SHAPES, Shape, acting, card_shapes, chosen, layers
from eval.speed.sides import attention_clock, check_acting, sides, twin
from eval.support import pages, tiny
from eval.support.agreement import MODELS, ours, planted, reference
from eval.support.release_style import release_style
from tests.support.agreement import NO_PROCESSOR, generate

CPU = torch.device("cpu")
SMALL = Dims(64, 4, 4, 16, 128)
GROUPED = Dims(64, 4, 2, 16, 128)
COMPARED = [
    ("var",),
    ("gift",),
    ("gift-inside",),
    ("vhr",),
    ("var", "gift", "vhr"),
    ("vhr", "gift-inside", "var"),
]


def small(count: int = 4, dims: Dims = SMALL, **phases: float) -> Shape:
    return layers("tiny", dims, count, 120, **phases)


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Shape]:
    """Every shape replaced by one so small that its figures mean nothing."""
    own = {
        "stack-640": small(prefill=60, decode=60, attention=60),
        "layer-1500": small(1, GROUPED, prefill=60, decode=60),
        "pocket": Shape(
            "tiny pocket",
            lambda device: build(decoder(SMALL, 2), device),
            pictured,
            {"generate": 60, "idle": 60},
            batches=(1, 2),
            tokens=3,
        ),
    }
    only(monkeypatch, own)
    return own


@pytest.fixture
def tiny_card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Shape]:
    """The shapes of a card on tiny models, but for its memory, and with one that is compiled."""

    def load(count: int) -> Callable[[torch.device], Loaded]:
        return lambda device: build(decoder(SMALL, count, 100), device)

    card = card_shapes(load(2), load(2), 90, 110)
    left_out = "card-memory", "card-compiled-3000"
    own = {n: replace(s, tokens=3, steps=2) for n, s in card.items() if n not in left_out}
    only(monkeypatch, own)
    return own


def only(monkeypatch: pytest.MonkeyPatch, shapes: Mapping[str, Shape]) -> None:
    monkeypatch.setattr(measure, "IDLE_STEPS", 2)
    monkeypatch.setattr(measure, "IDLE_PAIRS", 2)
    for name in list(SHAPES):
        monkeypatch.delitem(SHAPES, name)
    for name, shape in shapes.items():
        monkeypatch.setitem(SHAPES, name, shape)


@pytest.mark.filterwarnings(NO_PROCESSOR)
@pytest.mark.parametrize("names", COMPARED, ids="+".join)
@pytest.mark.parametrize("kind", MODELS)
def test_release_style_computes_what_the_library_computes(kind: str, names: Sequence[str]) -> None:
    """Two implementations without shared code, on a prompt and eight steps."""
    model = planted(kind)
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    ids = batch["input_ids"][0]
    image = ids == tiny.IMAGE
    query = torch.arange(len(ids)) > image.nonzero().max()
    stock = generate(model, batch)
    with vlm_patch.wrap(model, *ours(names)):
        expected = generate(model, batch)
    with release_style(model, reference(names), image, query):
        found = generate(model, batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    assert not torch.allclose(found.logits[0], stock.logits[0], atol=0.01)
    again = generate(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, stock.logits, strict=True))


def test_release_style_refuses_semantics_it_does_not_have() -> None:
    model, mask = tiny.llava(), torch.ones(4, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match="semantics other than 'paper'"),
        release_style(model, reference(["var-release"]), mask, mask),
    ):
        pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dims", [SMALL, GROUPED], ids=["heads", "grouped heads"])
@pytest.mark.parametrize("count", [1, 4])
def test_both_implementations_of_a_shape_agree(count: int, dims: Dims, method: str) -> None:
    """What the table compares does the same work."""
    shape = small(count, dims)
    loaded = shape.load(CPU)
    wanted = [("stock", ""), ("ours", method), ("release", method)]
    with sides(loaded, shape.make_prompt(loaded, 1), wanted) as (stock, library, release):
        for side in (stock, library, release):
            side.prefill()
            side.decode(2)
        assert check_acting(library, stock) > 0
        torch.testing.assert_close(library.logits, release.logits, rtol=0, atol=1e-5)
        after = [side.step() for side in (stock, library, release)]
    torch.testing.assert_close(after[1], after[2], rtol=0, atol=1e-5)
    assert not torch.equal(after[0], after[1])


def test_sides_share_weights_and_leave_the_model_alone() -> None:
    loaded = small().load(CPU)
    other = twin(loaded.model)
    pairs = zip(loaded.model.parameters(), other.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert other.config is not loaded.model.config


def test_a_method_that_does_nothing_is_not_timed() -> None:
    shape = small()
    loaded = shape.load(CPU)
    wanted = [("stock", ""), ("idle", "all")]
    with sides(loaded, shape.make_prompt(loaded, 1), wanted) as (stock, idle):
        stock.prefill()
        idle.prefill()
        assert torch.equal(stock.logits, idle.logits)
        with pytest.raises(EvalError, match="idle all changes no logit by more than 0"):
            check_acting(idle, stock)


def test_decode_leaves_the_prompt_as_it_was() -> None:
    shape = small()
    loaded = shape.load(CPU)
    with sides(loaded, shape.make_prompt(loaded, 1), [("ours", "all")]) as (side,):
        side.prefill()
        before = [layer.keys.clone() for layer in side.cache.layers]
        side.decode(3)
        assert all(
            torch.equal(a, layer.keys) for a, layer in zip(before, side.cache.layers, strict=True)
        )


def test_the_attention_clock_counts_each_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("eval.speed.sides.now", lambda device: next(ticks))
    shape = small(3)
    loaded = shape.load(CPU)
    for kind in ("stock", "eager", "ours"):
        with (
            sides(loaded, shape.make_prompt(loaded, 1), [(kind, "var")]) as (side,),
            attention_clock(CPU) as seconds,
        ):
            side.model(**side.prompt.inputs)
        assert seconds == [3]  # one tick a call, and ours does not count the stock one within


def test_sides_alternate() -> None:
    said: list[str] = []

    def call(name: str) -> Callable[[], float]:
        return lambda: float(said.append(name) or len(said))

    others = {name: call(name) for name in "abcd"}
    pairs = measure.interleaved(call("S"), others, rounds=4, coarse=["c", "d"])
    assert "".join(said) == "SaSbScd" + "SaSb" * 2 + "SaSbScd"
    assert pairs["a"] == [(1, 2), (8, 9), (12, 13), (16, 17)]
    assert pairs["c"] == [(5, 6), (20, 21)]
    assert pairs["d"] == [(5, 7), (20, 22)]


def test_no_round_begins_after_its_time() -> None:
    pairs = measure.interleaved(lambda: 1.0, {"a": lambda: 2.0}, rounds=9, seconds=0)
    assert pairs == {"a": [(1.0, 2.0)]}


def test_the_command_writes_the_table(
    tiny_shapes: dict[str, Shape], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed"
    assert main(["speed", "--repeats", "2", "--device", "cpu", "--out", str(out)]) == 0
    record = json.loads((out / "speed.json").read_text())
    assert {row["shape"] for row in record["rows"]} == set(tiny_shapes)
    assert record["machine"]["threads"] == torch.get_num_threads()
    for row in record["rows"]:
        pairs = 1 if row["kind"] in measure.COARSE else 2
        finer = 2 if row["phase"] == "idle" else 1
        assert len(row["values"]) == len(row["stock"]) == finer * pairs
        both = zip(row["values"], row["stock"], strict=True)
        shares = sorted(own / stock for own, stock in both)
        assert (row["ratio"]["min"], row["ratio"]["max"]) == (shares[0], shares[-1])
        assert (row["change"] is not None) == (row["kind"] in ("ours", "release"))
    kinds = {(row["phase"], row["batch"], row["kind"], row["method"]) for row in record["rows"]}
    assert ("generate", 1, "release", "all") in kinds
    assert ("generate", 2, "ours", "all") in kinds
    assert ("generate", 2, "release", "all") not in kinds
    assert ("prefill", 1, "text only", "") in kinds
    assert ("decode", 1, "again", "") in kinds
    table = (out / "speed.md").read_text()
    assert table in capsys.readouterr().out
    assert "| prefill, 4 stacked 7B layers, S = 640" in table
    assert "captions/s" in table
    assert "| GIFT in 2, map of 1 (of 4)" in table
    assert main(["speed", "--from", str(out / "speed.json")]) == 0
    assert table in capsys.readouterr().out


@pytest.fixture
def card_record(tiny_card: dict[str, Shape], tmp_path: Path) -> dict[str, Any]:
    record = measure.speed(tmp_path, ",".join(tiny_card), None, 1, None, "cpu")
    record["machine"]["device"] = "cuda:0 (a card)"
    return record


def test_every_line_of_the_card_on_tiny_models(card_record: dict[str, Any]) -> None:
    """What a card measures, on the CPU; steps are compiled by the backend "eager"."""
    rows = card_record["rows"]
    assert card_record["failed"] == {}
    assert not [row for row in rows if row["failed"]]
    lines = [goal for goal in goals.CARD if goal.shape in SHAPES]
    asked = {(goal.shape, goal.phase, goal.batch) for goal in lines}
    of_kind = {(row["shape"], row["phase"], row["batch"]) for row in rows}
    assert asked <= of_kind
    for shape, phase, batch in asked:
        key = (shape, phase, batch)
        found = [r for r in rows if (r["shape"], r["phase"], r["batch"]) == key]
        sides = {(row["kind"], row["method"]) for row in found}
        assert phase in ("launches", "waits") or ("again", "") in sides
        if phase == "idle":
            assert ("idle", "all") in sides
        else:
            assert {("ours", method) for method in METHODS} <= sides
        assert all(len(row["values"]) >= 1 for row in found)
    table = speed_table.summary(card_record)
    printed = [line for line in table.splitlines() if line.startswith("| ")]
    titles = [line.split("|")[1].strip() for line in printed[2:]]
    assert titles == [goal.title for goal in lines]


def test_a_line_that_fails_says_why_and_the_rest_goes_on(
    tiny_card: dict[str, Shape], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> Loaded:
        raise RuntimeError("out of memory\nand more")

    class Broken:
        def __init__(self, model: Any, prompt: Any, *more: Any) -> None:
            if vlm_patch.unwrap(model):
                raise RuntimeError("no graph of this")
            warnings.warn("A kernel is left out", stacklevel=2)
            self.logits = torch.zeros(1, 1, 2)
            self.decode = float

    monkeypatch.setattr("eval.speed.sides.Compiled", Broken)
    monkeypatch.setitem(SHAPES, "card-answers", replace(SHAPES["card-answers"], load=broken))
    record = measure.speed(tmp_path, "card-answers,card-compiled-640", "var,gift", 1, None, "cpu")
    assert record["failed"] == {"card-answers": "RuntimeError: out of memory"}
    record["machine"]["device"] = "cuda:0"
    table = speed_table.summary(record)
    assert "| failed (<= 1.03) | failed (<= 1.03) |" in table
    assert "(var, gift): RuntimeError: no graph of this\n" in table
    assert "- failed: card-answers: RuntimeError: out of memory\n" in table
    assert "- warned: A kernel is left out\n" in table
    again = next(row for row in record["rows"] if row["kind"] == "again")
    assert len(again["values"]) == 1
    assert not again["failed"]


def test_what_takes_longer_leaves_less_for_the_rest() -> None:
    endless = Budget(100.0)
    assert [endless.take(60.0), endless.take(40.0)] == [60.0, 40.0]
    short = Budget(100.0, time.perf_counter() + 50.0)
    assert short.take(60.0) == pytest.approx(30.0, abs=0.5)
    assert short.take(20.0) == 20.0  # 50 seconds are left, and 40 were planned
    assert Budget(10.0, time.perf_counter() - 1).take(10.0) == 0.0


@pytest.mark.parametrize("count", [counts.launches, counts.waits])
def test_counts(count: Callable[..., int]) -> None:
    values = torch.arange(6.0)

    def run() -> None:
        if values.sum() > 3 and values[values > 2].view(3, 1).sum().item() == 12:
            values.add_(0)

    # sum, compare, bool; compare, index, sum, item; add: views and the select of a view are none
    assert count(run, CPU) == {counts.launches: 8, counts.waits: 3}[count]


def row(
    shape: str, phase: str, kind: str, method: str, ratio: float, **more: Any
) -> dict[str, Any]:
    return {
        "shape": shape,
        "title": shape,
        "phase": phase,
        "batch": 1,
        "layers": 4,
        "kind": kind,
        "method": method,
        "on": "",
        "values": [ratio, ratio],
        "stock": [1.0, 1.0],
        "value": ratio,
        "ratio": {"median": ratio, "min": ratio, "max": ratio},
        "change": None,
        "failed": "",
    } | more


def cells(*rows: dict[str, Any], device: str = "cpu") -> dict[tuple[str, str], str]:
    """What the table says, by line and column."""
    record = {"rows": rows, "minutes": 1.0, "machine": {"device": device}}
    text = speed_table.summary(record)
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line] for line in lines]
    return {
        (line[0], column): cell for line in body for column, cell in zip(header, line, strict=True)
    }


def test_bounds_are_judged_as_written() -> None:
    goal = "decode, 7B layer, 1500 keys"
    found = cells(
        row("layer-1500", "decode", "ours", "var", 1.03),
        row("layer-1500", "decode", "ours", "gift", 1.0301),
        row("layer-1500", "decode", "again", "", 1.01),
    )
    assert found[goal, "VAR, all layers"] == "1.030 (<= 1.03)"
    assert found[goal, "GIFT"] == "**1.030** (<= 1.03)"
    assert found[goal, "all three"] == "- (<= 1.05)"
    assert found[goal, "stock, again"] == "1.010"


def test_the_rows_of_vhr_come_to_its_bound() -> None:
    found = cells(
        row("stack-640", "prefill", "ours", "vhr", 1.12),
        row("stack-640", "prefill", "ours", "all", 1.18),
        row("stack-640", "prefill", "text only", "", 0.11),
    )
    goal = "prefill, 4 stacked 7B layers, S = 640"
    assert found[goal, "VHR"] == "1.120 (<= 1.13)"
    assert found[goal, "all three"] == "**1.180** (<= 1.17)"


def test_memory_release_style_and_idle_cost() -> None:
    found = cells(
        row("memory-3000", "memory", "ours", "var", 2.0, values=[231.0], stock=[100.0]),
        row("attention-3000", "attention", "ours", "var", 1.1),
        row("attention-3000", "attention", "release", "var", 5.5),
        row("pocket", "idle", "idle", "all", 1.0, values=[1.00011], stock=[1.0]),
    )
    assert found["peak memory above stock, S = 3000, MB", "VAR, all layers"] == "**+131** (<= 130)"
    assert found["the same, release-style by ours", "VAR, all layers"] == "5.0 (>= 4)"
    assert found["every head off, us a layer", "all three"] == "27.5 (<= 30)"


def test_questions_a_second_and_counts_on_a_card() -> None:
    found = cells(
        row("card-answers", "answers", "ours", "var", 1.25, batch=16),
        row("card-answers", "answers", "ours", "gift", 1.0, batch=16),
        row("card-640", "launches", "ours", "var", 1.0, values=[22.5], stock=[22.0]),
        device="cuda:0",
    )
    goal = "answers of 2 tokens, questions a second by stock's, S = 645, batch 16"
    assert found[goal, "VAR, all layers"] == "**0.800** (>= 0.92)"
    assert found[goal, "GIFT"] == "1.000 (>= 0.95)"
    assert found["launches a token and layer", "VAR, all layers"] == "22.5, stock 22.0"


def test_the_page_holds_a_table_of_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = pages.table("speed", "speed-cpu")
    assert all(f"| {goal.title} " in cpu for goal in goals.CPU)
    (tmp_path / "speed.md").write_text((pages.DOCS / "speed.md").read_text())
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    record = {
        "rows": [row("card-640", "decode", "ours", "var", 0.97)],
        "minutes": 3.0,
        "machine": {"device": "cuda:0 (H100)"},
    }
    (tmp_path / "speed.json").write_text(json.dumps(record))
    assert main(["speed", "--from", str(tmp_path / "speed.json"), "--docs"]) == 0
    assert "| 0.970 (<= 1.00) |" in pages.table("speed", "speed-card")
    assert pages.table("speed", "speed-cpu") == cpu


def test_memory_of_a_prefill_is_read_in_a_process_of_its_own() -> None:
    """Release-style code holds the S x S weights of every head, and their scores."""
    wanted = [("stock", ""), ("release", "var")]
    stock, release = memory.peaks("attention-1500", wanted, CPU, 1)
    assert release - stock > 32 * 1500 * 1500 * 4 / memory.MEGABYTE


def test_where_methods_act() -> None:
    seven_b = acting(decoder(LLAVA_7B, 32))
    assert (seven_b.saliency, seven_b.gift) == (11, tuple(range(12, 23)))
    assert seven_b.vhr == tuple(range(17, 32))
    four = acting(decoder(LLAVA_7B, 4))
    assert (four.saliency, four.gift, four.vhr) == (1, (2,), (2, 3))


def test_shapes_by_name() -> None:
    assert chosen("pocket, stack-640", CPU) == ["pocket", "stack-640"]
    assert chosen("all", CPU) == list(SHAPES)
    assert "pocket" in chosen(None, CPU)
    assert not any(name.startswith("card-") for name in chosen(None, CPU))
    assert all(name.startswith("card-") for name in chosen(None, torch.device("cuda")))
    planned = sum(SHAPES[name].planned for name in chosen(None, torch.device("cuda")))
    assert planned <= measure.CARD_SECONDS
    with pytest.raises(EvalError, match="found 'stack-64', expected all, or some of"):
        chosen("stack-64", CPU)


def test_the_whole_model_on_a_stand_in() -> None:
    """The path of the 7B model: ids and pixels, bfloat16, generate at two batch sizes."""
    loaded = build(decoder(SMALL, 4, 100), CPU, TINY_VISION, torch.bfloat16)
    for batch in (1, 3):
        prompt = pictured(loaded, batch)
        with sides(loaded, prompt, [("stock", ""), ("ours", "all")]) as (stock, side):
            stock.prefill()
            side.prefill()
            assert check_acting(side, stock) > 0
            assert side.generate(3) > 0
            assert side.logits.shape == (batch, 1, 100)


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--methods", "vra", "--out", str(tmp_path)]) == 1
    assert "--methods: found 'vra', expected some of ['var'" in capsys.readouterr().err

"""A second prompt in the forward of the first: what two forwards give, and no trace of it after."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import vlm_patch
from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.family import made
from vlm_patch import VHR, ExtraPrompt, ForwardContext, Method, Watcher
from vlm_patch.engine import packing
from vlm_patch.engine.packing import CannotPack, Packing
from vlm_patch.models.tensor_parallel import WHOLE, Shard

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)
SHARES = "its extra prompt shares the prompt's forward"
ALONE = "its extra prompt takes a forward of its own, since "
QUESTION_FIRST = [[1, 9, 30, 31, tiny.IMAGE, 41], [1, tiny.IMAGE, 8, tiny.IMAGE, 9, 22, 50, 60]]


@contextmanager
def unpacked() -> Iterator[None]:
    """Every second prompt in a forward of its own."""
    with mock.patch.object(Packing, "pack", side_effect=CannotPack("a test asks for it")):
        yield


@contextmanager
def choices() -> Iterator[list[Tensor]]:
    """The heads `[B, H]` that VHR chooses, in the order of its choices."""
    found: list[Tensor] = []
    real = VHR.choose

    def choose(method: VHR, with_image: Tensor, text_only: Tensor) -> Tensor:
        found.append(real(method, with_image, text_only))
        return found[-1]

    with mock.patch.object(VHR, "choose", choose):
        yield found


def decoder_of(model: Any) -> Any:
    return model.model.language_model


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """Rows of every forward of the decoder's first layer."""
    seen: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden.shape[1])

    handle = decoder_of(model).layers[0].register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@cache
def model_of(kind: str, attn: str = "sdpa", exact: bool = True) -> Any:
    if kind.startswith("sliding"):
        model = tiny.sliding_llava(window=int(kind.removeprefix("sliding ")), attn=attn)
    else:
        model = planted(kind, attn=attn)
    return tiny.float64(model) if exact else model


def batch_of(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    batch = tiny.inputs(model, rows)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch


def placed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with the positions that `generate` gives."""
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def both(run: Any) -> tuple[Any, Any]:
    """What `run` gives with the second prompt in the same forward, and in one of its own; the heads
    chosen are the same.
    """
    with choices() as shared:
        packed = run()
    with choices() as apart, unpacked():
        expected = run()
    assert len(shared) > 0
    assert all(torch.equal(a, b) for a, b in zip(shared, apart, strict=True))
    return packed, expected


# ---- the same as two forwards


@pytest.mark.parametrize("calls", ["one call", "two calls"])
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("llava", tiny.MIXED_BATCH),
        ("llava", QUESTION_FIRST),
        ("llava-gqa", tiny.MIXED_BATCH),
        ("qwen2-vl", tiny.MIXED_BATCH),
        ("sliding 12", tiny.MIXED_BATCH),
        ("sliding 5", tiny.MIXED_BATCH),
    ],
)
@pytest.mark.parametrize(
    "names",
    [("vhr",), ("var", "gift", "vhr"), ("vhr-paper", "paint", "gift", "var-release")],
    ids=" ".join,
)
def test_a_generation(
    names: Sequence[str], kind: str, rows: Any, calls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    batch = batch_of(model, rows)
    monkeypatch.setitem(packing.MOST_ROWS_AT_ONCE, "cpu", 1024 * (calls == "one call"))

    def run() -> Any:
        with vlm_patch.wrap(model, *ours(names)) as patch:
            output = generate(model, batch, steps=3)
            assert (SHARES in patch.describe()) == (Packing.pack is PACK)
            return output

    packed, expected = both(run)
    assert torch.equal(packed.sequences, expected.sequences)
    for mine, other in zip(packed.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


PACK = Packing.pack


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llava", "llava-gqa", "qwen2-vl"])
def test_beams_in_float32(kind: str, attn: str) -> None:
    model = model_of(kind, attn, False)
    batch = batch_of(model, tiny.BATCH_OF_3)

    def run() -> Any:
        with vlm_patch.wrap(model, *ours(("var", "vhr"))):
            return generate(model, batch, steps=3, num_beams=2)

    packed, expected = both(run)
    assert torch.equal(packed.sequences, expected.sequences)
    for mine, other in zip(packed.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("calls", ["one call", "two calls"])
@pytest.mark.parametrize(
    "kind",
    ["gemma3", "paligemma", "qwen2_5_vl", "qwen3_vl", "gemma4", "cohere2_vision", "blip-2"],
)
def test_families(kind: str, calls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of image that look ahead, prefixes, m-rope, features added behind layers, windows."""
    family = made(kind)
    monkeypatch.setitem(packing.MOST_ROWS_AT_ONCE, "cpu", 1024 * (calls == "one call"))

    def run() -> Any:
        with vlm_patch.wrap(family.model, VHR(layers=tuple(range(family.depth)))) as patch:
            found = family.generate()
            assert (SHARES in patch.describe()) == (Packing.pack is PACK)
            return found

    packed, expected = both(run)
    assert torch.equal(packed[1], expected[1])
    torch.testing.assert_close(packed[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("most", [0, 1024])
def test_gradients(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llava")
    monkeypatch.setitem(packing.MOST_ROWS_AT_ONCE, "cpu", most)
    batch = batch_of(model, tiny.ONE_IMAGE)
    weight = decoder_of(model).layers[0].self_attn.q_proj.weight

    def run() -> Tensor:
        with vlm_patch.wrap(model, *ours(("var", "vhr"))):
            loss = model(**batch).logits.logsumexp(-1).sum()
            (gradient,) = torch.autograd.grad(loss, weight)
            return gradient

    packed, expected = both(run)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("most", [0, 1024])
def test_autocast(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llava", exact=False)
    monkeypatch.setitem(packing.MOST_ROWS_AT_ONCE, "cpu", most)
    batch = batch_of(model, tiny.ONE_IMAGE)

    def run() -> Tensor:
        with (
            torch.no_grad(),
            vlm_patch.wrap(model, *ours(("vhr",))),
            torch.autocast("cpu", torch.bfloat16),
        ):
            logits: Tensor = model(**batch).logits
            return logits

    packed, expected = both(run)
    torch.testing.assert_close(packed, expected, rtol=0, atol=0.05)


# ---- no trace of it


@pytest.mark.parametrize("calls", ["one call", "two calls"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llava", "sliding 12"])
def test_outputs_and_cache_hold_the_prompt_alone(
    kind: str, attn: str, calls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = attn == "sdpa"  # eager attention rounds to float32
    model = model_of(kind, attn, exact)
    batch = placed(batch_of(model, tiny.MIXED_BATCH))
    monkeypatch.setitem(packing.MOST_ROWS_AT_ONCE, "cpu", 1024 * (calls == "one call"))

    def run() -> Any:
        known = DynamicCache(config=decoder_of(model).config)
        with torch.no_grad(), vlm_patch.wrap(model, *ours(("var", "gift", "vhr"))):
            output = model(
                **batch,
                past_key_values=known,
                output_hidden_states=True,
                output_attentions=attn == "eager",
                logits_to_keep=2,
            )
        assert "update" not in vars(known)
        return output, known

    (packed, kept), (expected, other) = both(run)
    rows = batch["input_ids"].shape[1]
    assert kept.get_seq_length() == rows
    assert packed.logits.shape == expected.logits.shape
    close = {"rtol": 0, "atol": 1e-12 if exact else 1e-5}
    for mine, theirs in zip(kept.layers, other.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, **close)
        torch.testing.assert_close(mine.values, theirs.values, **close)
    states = [(packed.logits, expected.logits)]
    states += zip(packed.hidden_states, expected.hidden_states, strict=True)
    states += zip(packed.attentions or (), expected.attentions or (), strict=True)
    assert len(states) == (10 if attn == "eager" else 6)
    valid = batch["attention_mask"].bool()
    for mine, theirs in states:
        assert mine.shape == theirs.shape
        if mine.ndim == 3 and mine.shape[1] == rows:  # padding sees nothing, or anything
            mine, theirs = mine[valid], theirs[valid]
        elif mine.ndim == 4:
            mine, theirs = (weights.transpose(1, 2)[valid] for weights in (mine, theirs))
        torch.testing.assert_close(mine, theirs, **close)


def test_without_a_cache_and_as_a_tuple() -> None:
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    for options in ({"use_cache": False}, {"return_dict": False}):

        def run(options: dict[str, bool] = options) -> Any:
            with torch.no_grad(), vlm_patch.wrap(model, *ours(("vhr",))):
                return model(**batch, **options)

        packed, expected = both(run)
        assert type(packed) is type(expected)
        assert packed[0].shape == expected[0].shape == (1, 25, tiny.VOCABULARY)
        torch.testing.assert_close(packed[0], expected[0], rtol=0, atol=1e-12)


def test_a_prompt_is_one_forward() -> None:
    """9 of the 25 rows are text."""
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    with vlm_patch.wrap(model, *ours(("vhr",))), forwards(model) as rows:
        generate(model, batch, steps=3)
        assert rows == [25 + 9, 1, 1]
    with vlm_patch.wrap(model, *ours(("vhr",))), forwards(model) as rows, unpacked():
        generate(model, batch, steps=3)
        assert rows == [9, 25, 1, 1]


def test_an_error_leaves_the_cache_as_it_was() -> None:
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    known = DynamicCache(config=decoder_of(model).config)

    def fail(module: nn.Module, args: Any) -> None:
        assert "update" in vars(known)
        raise ZeroDivisionError

    handle = decoder_of(model).layers[2].register_forward_pre_hook(fail)
    with vlm_patch.wrap(model, *ours(("vhr",))), pytest.raises(ZeroDivisionError):
        model(**batch, past_key_values=known)
    handle.remove()
    assert "update" not in vars(known)


# ---- where it cannot be


@dataclass(frozen=True)
class Second(Method):
    """Reads the prompt a second time, and keeps the rows it sees."""

    name: ClassVar[str] = "second"

    def extra_prompt(
        self, forward: ForwardContext, state: Any, layers: list[int]
    ) -> ExtraPrompt | None:
        inputs = {
            "inputs_embeds": forward.inputs["inputs_embeds"],
            "attention_mask": forward.valid.long(),
            "position_ids": (forward.valid.cumsum(1) - 1).clamp_min(0),
        }
        return ExtraPrompt(inputs, Watcher(heads=lambda layer, output: None))


def described(model: Any, *methods: Any, batch: Any = None, **options: Any) -> tuple[str, Any]:
    """How the last method says that its second prompt was read, and the logits."""
    given = batch_of(model, tiny.ONE_IMAGE) if batch is None else batch
    with torch.no_grad(), vlm_patch.wrap(model, *methods) as patch:
        logits = model(**given, **options).logits
        return patch.describe().splitlines()[-1].rpartition("; ")[2], logits


def test_before_a_prompt_it_says_what_is_known() -> None:
    with vlm_patch.wrap(model_of("llava"), VHR(layers=(1,))) as patch:
        assert patch.describe().endswith(f"; {SHARES}")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, None),
        ({"layer_types": ["chunked_attention"]}, "its layers are of kind chunked_attention"),
        ({"attention_chunk_size": 8}, "it attends in chunks"),
        ({"num_kv_shared_layers": 2}, "its layers share keys and values"),
        ({"alibi": True}, "its attention depends on the distance in the sequence (ALiBi)"),
        ({"rope_parameters": {"rope_type": "default"}}, None),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "the length decides its positions"),
        ({"rope_scaling": {"full_attention": {"type": "longrope"}}}, "the length decides its pos"),
        ({"_attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2'"),
    ],
    ids=str,
)
def test_models_that_need_two_forwards(facts: dict[str, Any], reason: str | None) -> None:
    decoder = Mock(config=SimpleNamespace(**{"_attn_implementation": "sdpa"} | facts))
    found = Packing(decoder, "cache", True, False, WHOLE).obstacle()
    assert found is None if reason is None else str(found).startswith(reason)


def test_heads_split_over_processes_need_two_forwards() -> None:
    decoder = Mock(config=SimpleNamespace(_attn_implementation="sdpa"))
    found = Packing(decoder, "cache", True, False, Shard(0, 2)).obstacle()
    assert found == "its heads are split over processes"


def test_forwards_that_cannot_be_shared() -> None:
    model = model_of("llava")
    static = StaticCache(config=decoder_of(model).config, max_cache_len=64)
    padded = batch_of(model, tiny.BATCH_OF_3)
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("a StaticCache has places for", (VHR(layers=(1,)),), {"past_key_values": static}),
        ("it was given no positions, and the prompt is padded", ours(("vhr",)), {"batch": padded}),
        ("a method reads the prompt twice", ours(("gift-inside", "vhr")), {}),
        ("another one shares the prompt's", (Second(), VHR(layers=(1,))), {}),
    ]
    for reason, methods, options in cases:
        assert described(model, *methods, **options)[0].startswith(ALONE + reason)
    assert described(model, VHR(layers=(1,)), batch=placed(padded))[0] == SHARES


def test_training_reads_it_in_a_forward_of_its_own() -> None:
    model = planted("llava").train()
    said, _ = described(model, VHR(layers=(1,)))
    assert said == f"{ALONE}the model is training"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("qwen3_5", "some layers have no softmax attention over the text's own tokens"),
        ("mllama", "some layers have no softmax attention over the text's own tokens"),
        ("kosmos-2", "it counts positions by padding"),
    ],
)
def test_families_that_need_two_forwards(kind: str, reason: str) -> None:
    family = made(kind)
    layers = {"qwen3_5": (1,), "mllama": (0, 2), "kosmos-2": (0, 1)}[kind]
    with vlm_patch.wrap(family.model, VHR(layers=layers)) as patch:
        assert patch.describe().endswith(ALONE + reason)
        family.generate()
        assert patch.describe().endswith(ALONE + reason)


def test_an_input_of_unknown_rows() -> None:
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    unknown = torch.zeros(1, 25, 3)
    inside = decoder_of(model)
    inputs = {"inputs_embeds": inside.embed_tokens(batch["input_ids"].clamp_max(119))}
    image = batch["input_ids"] == tiny.IMAGE
    with torch.no_grad(), vlm_patch.wrap(model, VHR(layers=(1,))) as patch, patch.prompt(image):
        inside(**inputs, kind_of_row=unknown)
        assert patch.describe().endswith(
            f"{ALONE}what its decoder takes as 'kind_of_row' is not known of other rows"
        )
        inside(**inputs, vision_rows=image)
        assert patch.describe().endswith(SHARES)


# ---- masks


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_made_before(dtype: torch.dtype, window: int | None) -> None:
    """3 rows that see all of each other; behind them 4, the first of which is padding."""
    kind = "full_attention" if window is None else "sliding_attention"
    given = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    own = torch.tensor([[0, 1, 1, 1]])
    lowest = torch.finfo(torch.float32).min
    mask = given if dtype == torch.bool else torch.where(given, 0.0, lowest)
    masks = packing._Masks(torch.ones(1, 3, dtype=torch.bool), own, window)
    found = masks.behind({kind: mask})[kind][0, 0]
    seen = found if dtype == torch.bool else found == 0
    assert seen[:3].int().tolist() == [[1, 1, 1, 0, 0, 0, 0]] * 3
    assert seen[3:, :3].int().tolist() == [[0, 0, 0]] * 4
    expected = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    if window:
        expected[3] = [0, 0, 1, 1]
    assert seen[3:, 3:].int().tolist() == expected
    assert masks.behind(None).tolist() == [[1, 1, 1, 0, 1, 1, 1]]
    plain = packing._Masks(masks.valid, torch.ones_like(own), window)
    assert plain.behind(None) is None
    assert (plain.behind({kind: None})[kind] is None) == (window is None)


def test_a_mask_of_other_rows_is_not_extended() -> None:
    masks = packing._Masks(torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1, 1, 1]]), 2)
    for given in (torch.ones(1, 5), torch.ones(1, 1, 3, 3), {"chunked_attention": None}):
        with pytest.raises(CannotPack, match=r"holds other rows too|with and without|of kind"):
            masks.behind(given)
    masks.window = None
    with pytest.raises(CannotPack, match=r"a mask of shape \[1, 1, 3, 8\] holds other keys too"):
        masks.behind(torch.ones(1, 1, 3, 8))

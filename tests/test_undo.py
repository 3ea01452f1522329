"""Taking a patch off leaves nothing behind; copies of a patched model are stock models."""

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from eval.support import tiny
from eval.support.agreement import CALIBRATION
from tests.support.untouched import (
    answers,
    check_error_in_method,
    check_interrupt,
    check_untouched,
    files,
    state_of,
)
from vlm_patch import (
    ADHH,
    GIFT,
    IAT,
    M3ID,
    PAI,
    PAINT,
    SPARC,
    VAF,
    VAR,
    VCD,
    VHR,
    AdaIAT,
    Devils,
    DoLa,
    MassTarget,
    PatchError,
    patch,
    wrap,
)
from vlm_patch.method import Method

METHODS = (
    VAR(dims=tiny.SINK_DIMS, tau=3.0),
    GIFT(alpha=3.0, saliency_layer=1, layers=(2, 3)),
    VHR(layers=(1, 2, 3)),
    PAINT(layers=(1, 2, 3)),
    PAI(layers=(1, 2)),
    VAF(layers=(1, 2)),
    Devils(layers=(1, 2)),
    ADHH("1-2:*"),
    MassTarget(layers=(3,)),
    SPARC(tau=0.2, layer=2, layers=(1, 2, 3)),
    IAT(layers=(1, 2)),
    AdaIAT(CALIBRATION, layers=(2, 3)),
)
LOGITS = (VHR(layers=(1, 2, 3)), VCD(), M3ID(), DoLa(layers=(1,)))
"""Second streams and early layers, beside a method inside the layers."""
KINDS = {"llava": tiny.llava, "qwen2-vl": tiny.qwen2_vl}
pytestmark = pytest.mark.filterwarnings("ignore:No processor was given")


def logits(model: nn.Module) -> Tensor:
    """The prompt's logits, and those of 4 steps that follow it."""
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with torch.no_grad():
        steps = model.generate(
            **batch,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        ).logits
        return torch.cat((model(**batch).logits.flatten(), *[step.flatten() for step in steps]))


def planted(kind: str = "llava") -> nn.Module:
    model: nn.Module = tiny.plant(KINDS[kind]())
    logits(model)  # transformers itself marks a model when it first runs
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(kind: str, tmp_path: Path) -> None:
    model = tiny.plant(KINDS[kind]())
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    check_untouched(model, lambda: answers(model, batch), METHODS, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind_of_streams(kind: str, tmp_path: Path) -> None:
    model = tiny.plant(KINDS[kind]())
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    check_untouched(model, lambda: answers(model, batch), LOGITS, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_is_seen_while_it_is_on(kind: str) -> None:
    """So that being untouched afterwards means something."""
    model = planted(kind)
    before, stock = state_of(model), logits(model)
    with wrap(model, *METHODS):
        assert not torch.equal(logits(model), stock)
        assert state_of(model) != before
    assert "generate" not in model.__dict__


def test_a_patched_model_saves_what_the_stock_model_saves(tmp_path: Path) -> None:
    model = planted()
    model.save_pretrained(tmp_path / "stock")
    keys = list(model.state_dict())
    with wrap(model, *METHODS):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path / "patched")
    assert files(tmp_path / "patched") == files(tmp_path / "stock")


def test_the_end_of_with_takes_it_off_also_after_an_error() -> None:
    model = planted()
    before = state_of(model)
    with wrap(model, *METHODS) as handle:
        assert isinstance(handle, patch.Patch)
    assert state_of(model) == before
    with pytest.raises(ZeroDivisionError), wrap(model, *METHODS):
        raise ZeroDivisionError
    assert state_of(model) == before


def test_an_error_inside_a_forward_leaves_the_patch_whole() -> None:
    """A prompt that is refused, and a layer that fails: the next prompt runs as if alone."""
    model = planted()
    before, stock = state_of(model), logits(model)
    with wrap(model, *METHODS):
        patched = logits(model)
        wrong = tiny.inputs(model)
        wrong["input_ids"] = wrong["input_ids"].flip(1)
        wrong["attention_mask"] = torch.ones_like(wrong["input_ids"])
        wrong["attention_mask"][:, -1] = 0
        with pytest.raises(PatchError, match="right padding"):
            model(**wrong)
        fail = model.get_decoder().layers[2].mlp.register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            model(**tiny.inputs(model))
        fail.remove()
        assert torch.equal(logits(model), patched)
    assert state_of(model) == before
    assert torch.equal(logits(model), stock)


def _fail(module: nn.Module, args: object) -> None:
    raise ZeroDivisionError


def test_an_error_in_a_pass_of_our_own_leaves_the_patch_whole() -> None:
    """VHR's image-ablated forward fails inside the forward that asked for it."""
    model = planted()
    with wrap(model, *METHODS):
        patched = logits(model)
        fail = model.get_decoder().layers[0].mlp.register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            model(**tiny.inputs(model))
        fail.remove()
        assert torch.equal(logits(model), patched)


STAGES = {
    "var": ("probe", "before_forward", "observe_hidden", "edited_rows", "edit_weights"),
    "gift": ("before_forward", "edited_rows", "watched_rows", "observe", "edit_weights"),
    "vhr": ("extra_prompt", "before_forward", "edit_heads", "choose"),
    "paint": ("before_forward", "edited_rows", "edit_scores"),
    "pai": ("before_forward", "edited_rows", "coefficients", "moved"),
    "vaf": ("before_forward", "edited_rows", "edit_scores"),
    "devils": ("before_forward", "edited_rows", "coefficients", "moved"),
    "adhh": ("before_forward", "edited_rows", "groups", "shares"),
    "iat": ("before_forward", "edited_rows", "coefficients", "moved"),
    "adaiat": ("before_forward", "edited_rows", "edit_weights"),
    "sparc": ("before_forward", "edited_rows", "watched_rows", "observe", "groups"),
    "mass_target": ("before_forward", "edited_rows", "groups", "shares"),
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_error_at_any_stage_of_a_method(method: Method) -> None:
    model = planted()
    before = state_of(model)
    for stage in STAGES[method.name]:
        check_error_in_method(
            model, lambda: answers(model, tiny.inputs(model)), METHODS, method, stage
        )
        assert state_of(model) == before


@pytest.mark.parametrize("at", [1, 2, 5, 8, 11, 14])
def test_an_interrupt_anywhere(at: int) -> None:
    """In a pass of a method's own, in the prompt, between and within steps."""
    model = planted()
    before = state_of(model)
    check_interrupt(model, lambda: answers(model, tiny.inputs(model)), METHODS, at)
    assert state_of(model) == before


@pytest.mark.parametrize("stage", ["branches", "edit_logits"])
@pytest.mark.parametrize("method", LOGITS[1:3], ids=lambda method: method.name)
def test_an_error_at_any_stage_of_an_edit_of_logits(method: Method, stage: str) -> None:
    model = planted()
    before = state_of(model)
    ask = lambda: answers(model, tiny.inputs(model))  # noqa: E731
    check_error_in_method(model, ask, LOGITS, method, stage)
    assert state_of(model) == before


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 7, 9])
def test_an_interrupt_anywhere_of_streams(at: int) -> None:
    """In the prompt of a stream, in the first one's, and in a token of all."""
    model = planted()
    before = state_of(model)
    check_interrupt(model, lambda: answers(model, tiny.inputs(model)), LOGITS, at)
    assert state_of(model) == before


def test_a_patch_can_be_taken_off_in_the_middle_of_generating() -> None:
    model = planted()
    before, stock = state_of(model), logits(model)
    handle = wrap(model, *METHODS)

    def stop(ids: Tensor, scores: Tensor) -> Tensor:
        handle.remove()
        return scores

    model.generate(**tiny.inputs(model), max_new_tokens=3, logits_processor=[stop])
    assert state_of(model) == before
    assert torch.equal(logits(model), stock)


def test_a_refused_wrap_touches_nothing() -> None:
    model = planted()
    before = state_of(model)
    for methods, error in (((), ValueError), (("war",), ValueError), (("var", "var"), ValueError)):
        with pytest.raises(error):
            wrap(model, *methods)
    with pytest.raises(PatchError):
        wrap(model, *METHODS, processor=object())
    with pytest.raises(ValueError, match="out of range"):
        wrap(model, *METHODS, layers=[9])
    assert state_of(model) == before


def test_remove_twice_and_wrap_again() -> None:
    model = planted()
    before = state_of(model)
    first = wrap(model, *METHODS)
    patched = logits(model)
    first.remove()
    first.remove()
    assert state_of(model) == before
    second = wrap(model, *METHODS)
    first.remove()  # an old handle does not take a new patch off
    assert torch.equal(logits(model), patched)
    second.remove()
    assert state_of(model) == before


def test_a_generate_that_the_user_put_there_comes_back() -> None:
    model = planted()
    stock, calls = model.generate, []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return stock(*args, **kwargs)

    model.generate = own
    with wrap(model, *METHODS):
        assert model.generate is not own
        logits(model)
    assert calls == [0]
    assert model.generate is own


def test_hooks_of_the_user_stay_also_those_put_on_meanwhile() -> None:
    model = planted()
    calls: list[str] = []
    model.register_forward_pre_hook(lambda module, args: calls.append("before"))
    with wrap(model, *METHODS):
        model.get_decoder().register_forward_hook(lambda *args: calls.append("within"))
    model(**tiny.inputs(model))
    assert calls == ["before", "within"]


def test_the_attention_implementation_can_change_while_patched() -> None:
    model, other = planted(), planted()
    other.set_attn_implementation("eager")
    stock = logits(other)
    with wrap(model, *METHODS):
        model.set_attn_implementation("eager")
        patched = logits(model)
        with wrap(other, *METHODS):
            assert torch.equal(patched, logits(other))
    assert model.get_decoder().layers[0].self_attn.config is model.config.get_text_config()
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert torch.equal(logits(model), stock)


# ---- copies


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_a_stock_model_and_can_be_patched_itself(kind: str) -> None:
    model = planted(kind)
    stock = logits(model)
    with wrap(model, *METHODS) as handle:
        patched = logits(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), stock)
        assert torch.equal(logits(model), patched)
        with wrap(twin, *METHODS) as other:
            assert torch.equal(logits(twin), patched)
            other.heads["var"][:] = False
            assert torch.equal(logits(model), patched)
            handle.heads["vhr"][:] = False
            assert not torch.equal(logits(model), patched)
        assert torch.equal(logits(twin), stock)
    assert torch.equal(logits(model), stock)
    with wrap(twin, *METHODS):
        assert torch.equal(logits(twin), patched)
    assert torch.equal(logits(copy.deepcopy(twin)), stock)


def test_a_deep_copy_generates_with_its_own_weights() -> None:
    model = planted()
    with wrap(model, *METHODS):
        twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.neg_()
    assert twin.generate.__wrapped__.__self__ is twin
    assert not torch.equal(logits(twin), logits(model))


def test_a_pickle_and_a_saved_file_hold_a_stock_model() -> None:
    """Before its first forward: from then on transformers' own hooks refuse to be pickled."""
    stock, model = logits(tiny.llava()), tiny.llava()
    with wrap(model, *METHODS) as handle:
        pickled = pickle.dumps(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        patched = logits(model)
        assert not torch.equal(patched, stock)
        for other in (pickle.loads(pickled), torch.load(file, weights_only=False)):
            assert torch.equal(logits(other), stock)
            assert torch.equal(logits(model), patched)
            with wrap(other, *METHODS):
                assert torch.equal(logits(other), patched)
            assert torch.equal(logits(other), stock)
        handle.remove()
    assert torch.equal(logits(model), stock)


def test_a_model_that_ran_can_be_pickled_where_the_stock_model_can() -> None:
    """transformers 5 leaves hooks of its own that refuse; a patch neither adds nor takes that."""
    model = planted()
    stock, found = logits(model), [_pickled(model)]
    with wrap(model, *METHODS):
        logits(model)
        found.append(_pickled(model))
    if isinstance(found[0], str):
        assert "output_capturing_hook" in found[0]
        assert found[1] == found[0]
    else:
        assert all(torch.equal(logits(pickle.loads(data)), stock) for data in found)


def _pickled(model: nn.Module) -> bytes | str:
    """The pickle, or why there is none."""
    try:
        return pickle.dumps(model)
    except AttributeError as error:
        return str(error)


def test_a_deep_copy_saves_what_the_stock_model_saves(tmp_path: Path) -> None:
    model = planted()
    model.save_pretrained(tmp_path / "stock")
    with wrap(model, *METHODS):
        logits(model)
        copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "stock")


def test_a_saved_state_dict_is_that_of_the_stock_model() -> None:
    model, stock, patched = planted(), io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), stock)
    with wrap(model, *METHODS):
        logits(model)
        torch.save(model.state_dict(), patched)
    assert patched.getvalue() == stock.getvalue()


def test_a_state_dict_loads_into_a_patched_model() -> None:
    model, other = planted(), tiny.llava(seed=2)
    with wrap(model, *METHODS):
        patched = logits(model)
    with wrap(other, *METHODS):
        other.load_state_dict(model.state_dict())
        assert torch.equal(logits(other), patched)


# ---- several models, many rounds


def test_two_models_patched_at_once_do_not_mix() -> None:
    llava, qwen = planted(), planted("qwen2-vl")
    alone = []
    for model, methods in ((llava, METHODS[:2]), (qwen, METHODS[1:])):
        with wrap(model, *methods):
            alone.append(logits(model))
    with wrap(llava, *METHODS[:2]) as first, wrap(qwen, *METHODS[1:]):
        assert torch.equal(logits(llava), alone[0])
        assert torch.equal(logits(qwen), alone[1])
        assert torch.equal(logits(llava), alone[0])
        with first.disabled():
            assert torch.equal(logits(qwen), alone[1])


def live_objects() -> dict[str, int]:
    """How many tensors, modules, and objects of this library there are."""
    gc.collect()
    kinds = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        kinds["tensors"] += issubclass(kind, Tensor)
        kinds["modules"] += issubclass(kind, nn.Module)
        kinds["ours"] += str(kind.__module__).startswith("vlm_patch.")
    return dict(kinds)


def test_200_rounds_of_wrap_generate_remove_leak_nothing() -> None:
    model = tiny.plant(tiny.llava(layers=2))
    batch = tiny.inputs(model)
    methods = (METHODS[0], GIFT(alpha=3.0, saliency_layer=0, layers=(1,)), VHR(layers=(1,)))
    found, resident = [], []
    for rounds in (20, 200):
        for _ in range(rounds):
            with wrap(model, *methods):
                model.generate(**batch, max_new_tokens=2, do_sample=False)
        found.append(live_objects())
        resident.append(psutil.Process().memory_info().rss)
    assert found[0] == found[1]
    assert resident[1] - resident[0] < 4 * 2**20  # one cache of 27 kB a round would be more


def test_prompts_leave_nothing_in_a_patch_that_stays() -> None:
    model = planted()
    with wrap(model, *METHODS):
        counts = []
        for rounds in (1, 5):
            for _ in range(rounds):
                logits(model)
            counts.append(live_objects())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_cache_is_freed_without_waiting_for_the_garbage_collector(beams: int) -> None:
    """A cache on a GPU is large: it must not hang in a cycle until the collector happens to run."""
    model = planted()
    with wrap(model, *METHODS):
        cache = DynamicCache(config=model.config.get_text_config())
        gc.collect()
        gc.disable()
        try:
            model.generate(
                **tiny.inputs(model), past_key_values=cache, max_new_tokens=3, num_beams=beams
            )
            held = weakref.ref(cache)
            del cache
            assert held() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_takes_along_what_is_remembered(
    clone: Callable[[DynamicCache], DynamicCache],
) -> None:
    """Two answers that go on from copies of one prompt, and reorder their beams, do not mix."""
    model = planted()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    order = torch.tensor([2, 0, 1])
    step = {"input_ids": torch.full((3, 1), 60), "attention_mask": mask}
    with wrap(model, *METHODS), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        twin = clone(cache)
        twin.reorder_cache(order)
        plain = model(**step, past_key_values=cache).logits
        other = model(**{**step, "attention_mask": mask[order]}, past_key_values=twin).logits
    torch.testing.assert_close(other, plain[order], rtol=0, atol=1e-6)
    assert not torch.allclose(plain[order], plain)

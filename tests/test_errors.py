"""The text of every error and warning: what was found, what was expected, the cure.

Those about models are in test_model.py, about head tables in test_heads.py, about processors and
spaCy in test_question.py.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from eval.support import tiny
from vlm_patch import GIFT, PAINT, VAR, VHR, PatchError, UnsupportedModelError, wrap
from vlm_patch.engine import attention
from vlm_patch.engine.generate_guard import REFUSED
from vlm_patch.engine.hooks import MissingHandler

TOKENS = PAINT(layers=(1, 2, 3))
SINKS = VAR(dims=tiny.SINK_DIMS, tau=3.0)
GAZE = GIFT(alpha=3.0, saliency_layer=0, layers=(1, 2, 3))
HEADS = VHR(layers=(1, 2, 3))


def message(error: type[Exception], act: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        act()
    return str(caught.value)


def heard(act: Callable[[], Any]) -> list[str]:
    """What `act` warns of, with the default filter switched off."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        act()
    return [str(item.message) for item in record]


def quiet(act: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return act()


# ---- wrap


NAMES = "expected one of ['deco', 'dola', 'gift', 'icd', 'm3id', 'paint', 'var', 'vcd', 'vhr']"


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ((), "no method given: expected for example wrap(model, VAR(), VHR())"),
        (("var", "var"), "var was given twice: one instance of each method is enough"),
        (("gift", VHR(), GIFT()), "gift was given twice: one instance of each method is enough"),
        (("VAR",), f"unknown method 'VAR': {NAMES}; did you mean 'var'?"),
        (("gfit",), f"unknown method 'gfit': {NAMES}; did you mean 'gift'?"),
        (("vhr2",), f"unknown method 'vhr2': {NAMES}; did you mean 'vhr'?"),
        (("zzz",), f"unknown method 'zzz': {NAMES}"),
        (
            (VAR,),
            "found <class 'vlm_patch.methods.var.VAR'> as a method: write VAR(), a name of "
            "['deco', 'dola', 'gift', 'icd', 'm3id', 'paint', 'var', 'vcd', 'vhr'], or an import "
            "path such as 'my_package.my_file:MyMethod'",
        ),
        (
            (7,),
            "found 7 as a method: pass one such as VAR(), a name of "
            "['deco', 'dola', 'gift', 'icd', 'm3id', 'paint', 'var', 'vcd', 'vhr'], or an import "
            "path such as 'my_package.my_file:MyMethod'",
        ),
    ],
    ids=str,
)
def test_methods(methods: tuple[Any, ...], text: str) -> None:
    assert message(ValueError, lambda: wrap(tiny.llava(), *methods)) == text


def test_already_wrapped() -> None:
    model = tiny.llava()
    text = (
        "this LlavaForConditionalGeneration is already wrapped: call remove() on its patch first, "
        "or vlm_patch.unwrap(model) if that was lost, "
        "or give all methods to one wrap(model, VAR(), VHR())"
    )
    with wrap(model, SINKS):
        assert message(PatchError, lambda: wrap(model, HEADS)) == text
    wrap(model, HEADS).remove()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"layers": [4]}, "layer 4 is out of range: this model has 4 layers, 0 to 3"),
        ({"layers": "2-9"}, "layer 4 is out of range: this model has 4 layers, 0 to 3"),
        ({"layers": []}, "no layer given: expected at least one of 0 to 3"),
        ({"heads": "1:4"}, "head 4 is out of range: this model has 4 heads, 0 to 3"),
        ({"heads": {7: [0]}}, "layer 7 is out of range: this model has 4 layers, 0 to 3"),
        (
            {"heads": {"gift": "1:0"}},
            "heads: found 'gift', expected methods of this patch: ['var']",
        ),
        (
            {"heads": torch.ones(2, 4).bool()},
            "head table: found torch.bool of shape (2, 4), expected torch.bool of shape (4, 4) for "
            "this model",
        ),
    ],
    ids=str,
)
def test_layers_and_heads(given: dict[str, Any], text: str) -> None:
    assert message(ValueError, lambda: wrap(tiny.llava(), SINKS, **given)) == text


def test_an_unsupported_model_is_a_value_error_and_stays_as_it_is() -> None:
    config = hf.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9, intermediate_size=8
    )
    model = hf.LlamaForCausalLM(config)
    assert "is no vision-language model" in message(ValueError, lambda: wrap(model, "var"))
    assert issubclass(UnsupportedModelError, ValueError)
    assert issubclass(PatchError, RuntimeError)
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("name", ["vars", "gift"])
def test_disabling_a_method_that_is_not_there(name: str) -> None:
    patch = wrap(tiny.llava(), SINKS, HEADS)
    text = message(ValueError, lambda: patch.disabled("var", name).__enter__())
    assert text.startswith(f"unknown method {name!r}: expected one of ['var', 'vhr']")
    assert text.endswith("; did you mean 'var'?") == (name == "vars")
    assert "disabled" not in patch.describe()


# ---- values of the methods


SHARE = "expected a number from 0 to 1"
WHOLE = "expected an integer of at least 0"
AT_LEAST_0 = "expected a finite number of at least 0"
BELOW_1 = (
    "expected at most 1, since beyond it negative scores would change their sign (published values "
    "are 0.3 to 0.7)"
)
TABLE = "expected a list of a number per head for every layer"
SEVERAL = "expected a list or a range of integers, such as [1, 2]"


@pytest.mark.parametrize(
    ("method", "values", "text"),
    [
        (VAR, {"move_fraction": -0.1}, f"VAR move_fraction: found -0.1, {SHARE}"),
        (VAR, {"move_fraction": 1.5}, f"VAR move_fraction: found 1.5, {SHARE}"),
        (VAR, {"move_fraction": True}, f"VAR move_fraction: found True, {SHARE}"),
        (VAR, {"rho_nonsink": float("nan")}, f"VAR rho_nonsink: found nan, {SHARE}"),
        (VAR, {"rho_nonsink": "0.5"}, f"VAR rho_nonsink: found '0.5', {SHARE}"),
        (
            VAR,
            {"min_image_mass": -1},
            "VAR min_image_mass: found -1, expected a finite number of at least 0",
        ),
        (VAR, {"tau": 0}, "VAR tau: found 0, expected a finite number above 0"),
        (VAR, {"tau": float("inf")}, "VAR tau: found inf, expected a finite number above 0"),
        (VAR, {"first_layer": -1}, f"VAR first_layer: found -1, {WHOLE}"),
        (VAR, {"first_layer": 1.5}, f"VAR first_layer: found 1.5, {WHOLE}"),
        (VAR, {"dims": [3, -1]}, f"VAR dims: found -1, {WHOLE}"),
        (VAR, {"dims": 3}, f"VAR dims: found 3, {SEVERAL}"),
        (
            VAR,
            {"semantics": "Paper"},
            'VAR semantics: found \'Paper\', expected "paper" or "release"',
        ),
        (PAINT, {"alpha": 1.2}, f"PAINT alpha: found 1.2, {BELOW_1}"),
        (PAINT, {"beta": 2}, f"PAINT beta: found 2, {BELOW_1}"),
        (PAINT, {"alpha": -0.1}, f"PAINT alpha: found -0.1, {AT_LEAST_0}"),
        (PAINT, {"rho": 1.5}, f"PAINT rho: found 1.5, {SHARE}"),
        (PAINT, {"rho_sp": True}, f"PAINT rho_sp: found True, {SHARE}"),
        (PAINT, {"layers": 3}, f"PAINT layers: found 3, {SEVERAL}"),
        (
            PAINT,
            {"semantics": "pai"},
            'PAINT semantics: found \'pai\', expected "paper" or "release"',
        ),
        (PAINT, {"sensitivity": 3}, f"PAINT sensitivity: found 3, {TABLE}"),
        (PAINT, {"sensitivity": [[1], 2]}, f"PAINT sensitivity: found [[1], 2], {TABLE}"),
        (
            PAINT,
            {"sensitivity": [[1, -1]]},
            f"PAINT sensitivity: found -1, {AT_LEAST_0}",
        ),
        (
            PAINT,
            {"sensitivity": [[0, 0]]},
            "PAINT sensitivity: found no number above 0, expected at least one",
        ),
        (GIFT, {"alpha": float("inf")}, "GIFT alpha: found inf, expected a finite number"),
        (GIFT, {"beta": -0.5}, "GIFT beta: found -0.5, expected a finite number of at least 0"),
        (GIFT, {"head_fraction": 2}, f"GIFT head_fraction: found 2, {SHARE}"),
        (GIFT, {"saliency_layer": -1}, f"GIFT saliency_layer: found -1, {WHOLE}"),
        (GIFT, {"layers": ["1"]}, f"GIFT layers: found '1', {WHOLE}"),
        (GIFT, {"layers": "1-3"}, f"GIFT layers: found '1-3', {SEVERAL}"),
        (
            GIFT,
            {"words": "some"},
            'GIFT words: found \'some\', expected "content", "spacy", "all" or a mask',
        ),
        (
            GIFT,
            {"words": torch.ones(3)},
            "GIFT words: found torch.float32 of shape (3,), expected a bool mask "
            "[batch, prompt length]",
        ),
        (VHR, {"alpha": float("nan")}, "VHR alpha: found nan, expected a finite number"),
        (VHR, {"layers": 2}, f"VHR layers: found 2, {SEVERAL}"),
        (VHR, {"layers": [True]}, f"VHR layers: found True, {WHOLE}"),
        (
            VHR,
            {"semantics": ""},
            'VHR semantics: found \'\', expected "release" or "paper"',
        ),
    ],
    ids=str,
)
def test_a_value_out_of_its_range(method: Any, values: dict[str, Any], text: str) -> None:
    assert message(ValueError, lambda: method(**values)) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda: VAR(move_fraction=0, rho_nonsink=0, min_image_mass=0, tau=1e-9, first_layer=0),
        lambda: VAR(move_fraction=1, rho_nonsink=1.0, min_image_mass=7),
        lambda: GIFT(alpha=-2, beta=0, head_fraction=0, layers=[]),
        lambda: GIFT(head_fraction=1, layers=range(2)),
        lambda: VHR(alpha=0, layers=()),
    ],
)
def test_the_ends_of_a_range_belong_to_it(make: Callable[[], Any]) -> None:
    make()


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (VAR(dims=[3, 64]), "VAR dims: found 64, but this model has only 0 to 63"),
        (VAR(first_layer=4), "VAR first_layer: found 4, but this model has only 0 to 3"),
        (GIFT(1.0, layers=[4], saliency_layer=0), "GIFT layers: found 4"),
        (GIFT(1.0, layers=[1], saliency_layer=4), "GIFT saliency_layer: found 4"),
        (VHR(layers=[1, 9]), "VHR layers: found 9, but this model has only 0 to 3"),
    ],
    ids=str,
)
def test_a_value_out_of_the_model(method: Any, text: str) -> None:
    found = message(ValueError, lambda: wrap(tiny.llava(), method))
    assert found.startswith(text)
    assert re.search(r", but this model has only 0 to \d+$", found)


def test_releases_var_below_layer_2() -> None:
    model = tiny.plant(tiny.llava())
    var = VAR(dims=tiny.SINK_DIMS, tau=3.0, semantics="release")
    with wrap(model, var, heads="1-2"):
        assert message(PatchError, lambda: model(**tiny.inputs(model))) == (
            'VAR(semantics="release") never acts below layer 2, but layer 1 is on'
        )


# ---- prompts


def test_right_padding() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    for name in ("input_ids", "attention_mask"):
        batch[name][1:] = batch[name][1:].roll(-2, 1)
    batch["attention_mask"][2] = torch.tensor([1] * 25 + [0] * 2)
    text = (
        "a prompt ends in padding: found right padding, expected left padding. "
        'Set processor.tokenizer.padding_side = "left" before the processor makes the batch. '
        "To score answers, read the left-padded prompts in one forward with use_cache=True, then "
        "feed the answers behind that cache one token at a time, as they would be generated; "
        "padding behind the shorter ones does no harm there."
    )
    with wrap(model, SINKS) as patch:
        assert message(PatchError, lambda: model(**batch)) == text
        with patch.disabled():
            model(**batch)


EMBEDS = (
    "the image tokens of this prompt cannot be told: the model was called with inputs_embeds, or "
    "not through its own forward or generate. Call the wrapped model with input_ids, or give the "
    "mask: with patch.prompt(image=mask, query=mask)."
)


def test_embeddings_and_a_part_of_the_model_without_masks() -> None:
    model = tiny.llava()
    embeds = torch.zeros(1, 25, tiny.WIDTH)
    with wrap(model, SINKS):
        assert message(PatchError, lambda: model(inputs_embeds=embeds)) == EMBEDS
        assert (
            message(PatchError, lambda: model.generate(inputs_embeds=embeds, max_new_tokens=1))
            == EMBEDS
        )
        assert message(PatchError, lambda: model.get_decoder()(inputs_embeds=embeds)) == EMBEDS
        ids = tiny.inputs(model)["input_ids"]
        assert message(PatchError, lambda: model.model(input_ids=ids)) == EMBEDS


SHORT = "but the prompt is 27 tokens long (padding included) in a batch of 3"


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(3, 27), "found torch.float32 of shape (3, 27), expected bool [batch, prompt"),
        (torch.ones(27).bool(), "found torch.bool of shape (27,), expected bool [batch, prompt"),
        ([[True]], "found list, expected bool [batch, prompt length]"),
        (np.ones((3, 27), dtype=bool), "found ndarray, expected bool [batch, prompt length]"),
        (torch.ones(3, 26).bool(), f"found shape (3, 26), {SHORT}"),
        (torch.ones(2, 27).bool(), f"found shape (2, 27), {SHORT}"),
        (torch.ones(6, 27).bool(), f"found shape (6, 27), {SHORT}"),
        (torch.ones(0, 27).bool(), f"found shape (0, 27), {SHORT}"),
    ],
    ids=["float", "flat", "list", "numpy", "short", "two", "six", "none"],
)
def test_masks_by_hand(mask: Any, text: str) -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, GAZE) as patch:
        for name in ("image", "query"):
            with patch.prompt(**{name: mask}):
                found = message(PatchError, lambda: quiet(lambda: model(**batch)))
            assert found.startswith(f"{name} mask: {text}")


def test_a_mask_of_words_that_does_not_fit() -> None:
    model = tiny.llava()
    gift = GIFT(1.0, saliency_layer=0, layers=[1], words=torch.ones(1, 9).bool())
    with wrap(model, gift):
        found = message(PatchError, lambda: quiet(lambda: model(**tiny.inputs(model))))
    assert found == (
        "words mask: found shape (1, 9), but the prompt is 25 tokens long (padding included) in a "
        "batch of 1"
    )


# ---- caches


def step(rows: int, keys: int) -> dict[str, Tensor]:
    ids = torch.full((rows, 1), 60)
    return {"input_ids": ids, "attention_mask": torch.ones(rows, keys + 1, dtype=torch.long)}


UNSEEN = (
    "the cache holds 25 tokens that this patch did not see: it was off, or not put on, when they "
    "were read. Start from the prompt with an empty cache."
)


def test_a_cache_that_was_filled_without_the_patch() -> None:
    model = tiny.llava()
    cache = model(**tiny.inputs(model), use_cache=True).past_key_values
    with wrap(model, SINKS) as patch:
        assert message(PatchError, lambda: model(**step(1, 25), past_key_values=cache)) == UNSEEN
        with patch.disabled():
            other = model(**tiny.inputs(model), use_cache=True).past_key_values
        assert message(PatchError, lambda: model(**step(1, 25), past_key_values=other)) == UNSEEN


def test_a_cache_of_another_patch() -> None:
    model = tiny.llava()
    with wrap(model, SINKS):
        cache = model(**tiny.inputs(model), use_cache=True).past_key_values
    with wrap(model, SINKS):
        assert message(PatchError, lambda: model(**step(1, 25), past_key_values=cache)) == UNSEEN


def test_a_cache_that_grew_while_the_patch_was_off() -> None:
    model = tiny.llava()
    with wrap(model, SINKS) as patch:
        cache = model(**tiny.inputs(model), use_cache=True).past_key_values
        with patch.disabled():
            model(**step(1, 25), past_key_values=cache)
        found = message(PatchError, lambda: model(**step(1, 26), past_key_values=cache))
    assert found == UNSEEN.replace("25", "26")


def test_a_batch_that_changed() -> None:
    model = tiny.llava()
    with wrap(model, SINKS):
        cache = model(**tiny.inputs(model, tiny.BATCH_OF_3), use_cache=True).past_key_values
        type(cache).batch_select_indices(cache, torch.tensor([0, 2]))  # unseen by the patch
        assert message(PatchError, lambda: model(**step(2, 27), past_key_values=cache)) == (
            "the cache was filled with a batch of 3, this forward has 2. Start from the prompt "
            "with an empty cache."
        )


class OwnCache(DynamicCache):
    """A kind of cache that the library does not know."""


def test_another_kind_of_cache() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model)
    cache = OwnCache(config=model.config.get_text_config())
    text = (
        "a OwnCache is not supported on a patched model: what it keeps of a prompt is not known. "
        "Use a DynamicCache (the default), a StaticCache or a QuantizedCache, or run inside `with "
        "patch.disabled():`"
    )
    with wrap(model, SINKS) as patch:
        assert message(PatchError, lambda: model(**batch, past_key_values=cache)) == text
        with patch.disabled():
            model.generate(**batch, past_key_values=cache, max_new_tokens=2)


def missed(where: str, past: int) -> str:
    return (
        f"var is on, but was off in {where} while a part of the first {past} tokens was read, so "
        "it does not know them. Switch methods and layers before a prompt."
    )


def unchosen(layer: int) -> str:
    return (
        f"vhr is on in layer {layer}, but chose no heads there: they are chosen when a "
        "conversation's first prompt is read, with its image. Switch layers before the prompt."
    )


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (SINKS, missed("layer 0", 25)),
        (
            GAZE,
            "gift is on, but was off when the prompt was read, so it has no map. Switch it on "
            "before the prompt.",
        ),
        (HEADS, unchosen(1)),
        (TOKENS, missed("every layer", 25).replace("var", "paint")),
    ],
    ids=["var", "gift", "vhr", "paint"],
)
def test_a_method_switched_on_within_a_generation(method: Any, text: str) -> None:
    model = tiny.plant(tiny.llava())
    other = HEADS if method is SINKS else SINKS
    with wrap(model, method, other) as patch:
        cache = DynamicCache(config=model.config.get_text_config())
        with patch.disabled(method.name):
            model(**tiny.inputs(model), past_key_values=cache)
        assert message(PatchError, lambda: model(**step(1, 25), past_key_values=cache)) == text


@pytest.mark.parametrize(
    ("method", "text"), [(SINKS, missed("layer 2", 25)), (HEADS, unchosen(2))], ids=["var", "vhr"]
)
def test_a_layer_switched_on_within_a_generation(method: Any, text: str) -> None:
    model = tiny.plant(tiny.llava())
    with wrap(model, method, layers=[1]) as patch:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**tiny.inputs(model), past_key_values=cache)
        patch.heads[method.name] = "1-2"
        assert message(PatchError, lambda: model(**step(1, 25), past_key_values=cache)) == text


def test_a_method_that_was_off_for_some_steps() -> None:
    model = tiny.plant(tiny.llava())
    with wrap(model, SINKS, HEADS) as patch:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**tiny.inputs(model), past_key_values=cache)
        with patch.disabled("var"):
            model(**step(1, 25), past_key_values=cache)
        found = message(PatchError, lambda: model(**step(1, 26), past_key_values=cache))
    assert found == missed("every layer", 26)


# ---- ways of generating


REFUSING: dict[str, Any] = {
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "custom_generate": "a/repository",
    "use_mtp": True,
    "assistant_early_exit": 2,
}


def refusal(name: str) -> str:
    passing, reason = REFUSED[name]
    return (
        f"generate({name}={REFUSING[name]!r}) cannot run with methods on: {reason}. Leave {name} "
        f"at {passing[-1]!r}, or generate inside `with patch.disabled():`"
    )


def test_every_option_is_tested() -> None:
    assert list(REFUSING) == list(REFUSED)
    assert refusal("dola_layers") == (
        "generate(dola_layers='low') cannot run with methods on: transformers loads it as code "
        "from the hub, which works on the cache in ways of its own. Leave dola_layers at None, or "
        "generate inside `with patch.disabled():`"
    )


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_of_generate(name: str) -> None:
    model = tiny.llava()
    batch = tiny.inputs(model)
    with wrap(model, SINKS):
        found = message(PatchError, lambda: model.generate(**batch, **{name: REFUSING[name]}))
    assert found == refusal(name)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "custom_generate"])
def test_an_option_in_a_generation_config(name: str) -> None:
    """Given by name, by position, or as the model's own; also beside another config."""
    model = tiny.llava()
    batch = tiny.inputs(model)
    ids, rest = batch.pop("input_ids"), batch
    config = GenerationConfig()
    setattr(config, name, REFUSING[name])
    plain = GenerationConfig(max_new_tokens=2)
    with wrap(model, SINKS):
        calls: list[Callable[[], Any]] = [
            lambda: model.generate(ids, generation_config=config, **rest),
            lambda: model.generate(ids, config, **rest),
        ]
        for call in calls:
            assert message(PatchError, call) == refusal(name)
        setattr(model.generation_config, name, REFUSING[name])
        calls = [
            lambda: model.generate(ids, **rest),
            lambda: model.generate(ids, plain, **rest),
        ]
        for call in calls:
            assert message(PatchError, call) == refusal(name)


def test_an_option_that_is_set_back_by_name() -> None:
    model = tiny.llava()
    model.generation_config.dola_layers = "low"
    with wrap(model, SINKS):
        found = model.generate(**tiny.inputs(model), dola_layers=None, max_new_tokens=2)
    assert found.shape == (1, 27)


def test_values_that_change_nothing_pass() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model)
    with wrap(model, SINKS):
        plain = model.generate(**batch, max_new_tokens=3, do_sample=False)
        given = {"use_mtp": False, "penalty_alpha": 0.0, "guidance_scale": 1.0}
        given = {name: value for name, value in given.items() if hasattr(GenerationConfig(), name)}
        found = model.generate(**batch, max_new_tokens=3, do_sample=False, **given)
    assert torch.equal(found, plain)


def test_guidance_and_a_prompt_in_chunks() -> None:
    model = tiny.llava()
    both = {"prefill_chunk_size": 8, "guidance_scale": 1.5}
    with wrap(model, SINKS):
        found = message(PatchError, lambda: model.generate(**tiny.inputs(model), **both))
    assert found == (
        "generate(prefill_chunk_size=8, guidance_scale=1.5) cannot run with methods on: the "
        "prompts of both branches could not be told apart in pieces. Leave one of the two out, or "
        "generate inside `with patch.disabled():`"
    )


def test_refused_ways_work_while_nothing_is_on() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model)
    early = {"assistant_model": tiny.llava(seed=2), "assistant_early_exit": 2}

    def run() -> str:
        """A LLaVA does not know where to exit: transformers' own error."""
        return message(AttributeError, lambda: model.generate(**batch, **early))

    stock = run()
    with wrap(model, SINKS) as patch:
        with patch.disabled():
            assert run() == stock
        patch.heads["var"][:] = False
        assert run() == stock


UNCHUNKED = [
    "vhr chooses its heads by the last row of the prompt and amplifies them in all rows "
    "before it, so a prompt cannot be read in chunks: leave prefill_chunk_size out, or "
    'generate inside `with patch.disabled("vhr"):`',
    "VAR does not know the sink channels of this model, and looks for them in a prompt that is "
    "read at once from its beginning. Run such a prompt first (no prefill_chunk_size, an empty "
    "cache), or pass VAR(dims=...).",
    "gift watches a layer that is not below those it edits, which behind a cache needs one "
    "that can be cut: use a DynamicCache of a model without sliding window and linear "
    "attention, or watch a lower layer",
]

if tiny.FEATURES:

    def test_a_prompt_in_chunks() -> None:
        """VHR needs all of it at once; GIFT too, where it watches a layer that it edits."""
        model = tiny.plant(tiny.llava())
        batch = tiny.inputs(model)
        chunks = {"prefill_chunk_size": 8, "max_new_tokens": 2}
        late = GIFT(alpha=3.0, saliency_layer=1, layers=(1, 2))
        texts = []
        for method in (HEADS, VAR(), late):
            cache = {"cache_implementation": "static"} if method is late else {}
            with wrap(model, method):
                texts.append(
                    message(
                        PatchError,
                        lambda kw=cache: quiet(lambda: model.generate(**batch, **chunks, **kw)),
                    )
                )
        assert texts == UNCHUNKED


def test_training_with_dropout() -> None:
    model = tiny.llava(attention_dropout=0.1).train()
    with wrap(model, SINKS):
        assert message(PatchError, lambda: model(**tiny.inputs(model), use_cache=False)) == (
            "a patched model cannot train with attention dropout: call model.eval()"
        )
        model.eval()
        model(**tiny.inputs(model))


# ---- attention that cannot be edited


def call(**changes: Any) -> attention.Call:
    states = torch.zeros(1, 4, 2, 16)
    given = {"mask": None, "options": {}} | changes
    return attention.Call(
        layer=3,
        module=nn.Identity(),
        query=states,
        key=states,
        value=states,
        stock=lambda: (states, None),
        **given,
    )


@pytest.mark.parametrize("name", attention.UNKNOWN_TERMS)
def test_an_unknown_term_of_attention(name: str) -> None:
    attention.check(call(options={name: None}))
    found = message(
        UnsupportedModelError, lambda: attention.check(call(options={name: torch.ones(1)}))
    )
    assert found == (
        f"layer 3 passes {name!r} to its attention, which this library cannot edit; leave that "
        "layer out: wrap(model, ..., layers=...)"
    )


def test_an_unknown_kind_of_mask() -> None:
    cure = 'load the model with attn_implementation="sdpa" or "eager"'
    found = message(UnsupportedModelError, lambda: attention.check(call(mask="block mask")))
    assert found == f"layer 3 uses a str: {cure}"
    flash = torch.ones(1, 2)
    found = message(UnsupportedModelError, lambda: attention.check(call(mask=flash)))
    assert found == f"layer 3 uses a 2-dimensional mask (a flash kernel): {cure}"


def test_a_layer_that_runs_twice_and_was_handed_nothing() -> None:
    assert message(PatchError, lambda: MissingHandler().attend(call())) == (
        "layer 3 was not handed what this patch does in it, which is needed where layers run "
        "twice: train without gradient checkpointing, or inside `with patch.disabled():`"
    )


# ---- warnings


def test_without_a_processor_it_is_said_once() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model)

    def twice() -> None:
        with wrap(model, GAZE):
            model(**batch)
            model.generate(**batch, max_new_tokens=2)

    assert heard(twice) == [
        "No processor was given to wrap, so the question cannot be told from the text around it: "
        "all text after the image counts as the question, and all of its words as content. Pass "
        "wrap(..., processor=processor)."
    ]


def test_methods_that_need_no_question_do_not_ask_for_a_processor() -> None:
    model = tiny.llava()
    assert heard(lambda: wrap(model, SINKS, HEADS).model(**tiny.inputs(model))) == []


@pytest.mark.parametrize("query", [torch.zeros(1, 20).bool(), None], ids=["given", "derived"])
def test_a_question_before_the_image(query: Tensor | None) -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, [[tiny.BOS, 5, 6, 7, tiny.IMAGE]])
    stock = model(**batch).logits

    def ask() -> None:
        with wrap(model, GAZE) as patch, patch.prompt(query=query):
            assert torch.equal(model(**batch, use_cache=False).logits, stock)

    assert heard(ask)[-1] == (
        "GIFT leaves 1 of 1 prompts as they are: the question stands before the image (or there is "
        "none), so no gaze can shift over the image. Put the image first."
    )


def test_a_prompt_without_an_image() -> None:
    model = tiny.llava()
    rows = [[tiny.BOS, 30, 31], [tiny.BOS, 32], *tiny.ONE_IMAGE]

    def twice() -> None:
        with wrap(model, SINKS):
            for _ in range(2):
                model(**tiny.inputs(model, rows))

    assert heard(twice) == ["2 of 3 prompts hold no image: they run as in the stock model."]


def test_var_finds_no_sink() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model)
    stock = model(**batch).logits

    def twice() -> None:
        with wrap(model, "var"):
            for _ in range(2):
                assert torch.equal(model(**batch).logits, stock)

    (text,) = heard(twice)
    assert re.fullmatch(
        r"VAR does nothing on this model: no attention sink was found\. Tokens take up to "
        r"12\.\d% of the attention, but not as sinks do: the values of those that take 10% have "
        r"at least 0\.\d\d times the median size, those of a sink 0\.5 times at most\. If you "
        r"know its sink channels, pass VAR\(dims=\.\.\.\)\.",
        text,
    )


def test_var_cannot_look_for_sinks_without_text_after_the_image() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, [[tiny.BOS, 5, tiny.IMAGE]])
    assert heard(lambda: wrap(model, "var").model(**batch)) == [
        "VAR does nothing on this model: no attention sink was found. The first prompt has no text "
        "after its image, so nothing could be checked. If you know its sink channels, pass "
        "VAR(dims=...)."
    ]

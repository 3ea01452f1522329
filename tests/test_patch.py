"""Putting methods on, switching them, and what a patch says about itself."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from eval.support import tiny
from vlm_patch import GIFT, VAR, VHR, PatchError, wrap
from vlm_patch.heads import numbers
from vlm_patch.method import Method

METHODS: dict[str, Method] = {
    "var": VAR(dims=tiny.SINK_DIMS, tau=3.0),
    "gift": GIFT(alpha=3.0, saliency_layer=0, layers=(1, 2, 3)),
    "vhr": VHR(layers=(1, 2, 3)),
}
KINDS: dict[str, Callable[..., nn.Module]] = {
    "llava": tiny.llava,
    "gqa": lambda **more: tiny.llava(kv_heads=2, **more),
    "qwen2-vl": tiny.qwen2_vl,
}

pytestmark = pytest.mark.filterwarnings("ignore:No processor was given")


def planted(kind: str = "llava", attn: str = "sdpa") -> nn.Module:
    model: nn.Module = tiny.plant(KINDS[kind](attn=attn))
    return model


def logits(model: nn.Module, rows: Any = tiny.BATCH_OF_3) -> Tensor:
    """The prompt's logits, and those of 4 steps that follow it."""
    batch = tiny.inputs(model, rows)
    ways = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        steps = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, **ways).logits
        return torch.cat((model(**batch).logits.flatten(), *[step.flatten() for step in steps]))


@contextmanager
def watched(model: nn.Module, rows: Any = tiny.BATCH_OF_3) -> Iterator[list[list[Tensor]]]:
    """By layer, what enters the output projection `[B, S, H, Dv]` in a prompt and in one step."""
    found: list[list[Tensor]] = []
    handles = []
    for block in model.get_decoder().layers:
        found.append([])
        handles.append(
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda module, args, into=found[-1]: into.append(args[0].unflatten(-1, (4, -1)))
            )
        )
    yield found
    for handle in handles:
        handle.remove()


def head_outputs(model: nn.Module) -> list[list[Tensor]]:
    """See `watched`; VHR's text, in rows behind the prompt's, does not count."""
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with watched(model) as found:
        model.generate(**batch, max_new_tokens=2, prefix_allowed_tokens_fn=lambda sample, ids: [60])
    rows = batch["input_ids"].shape[1]
    return [[output[:, :rows] for output in layer] for layer in found]


def blocks(model: nn.Module) -> tuple[Tensor, ...]:
    with torch.no_grad():
        states: tuple[Tensor, ...] = model(
            **tiny.inputs(model, tiny.BATCH_OF_3), output_hidden_states=True
        ).hidden_states
    return states


# ---- switches


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_head_off_is_the_stock_model(kind: str, attn: str) -> None:
    model = planted(kind, attn)
    stock = logits(model)
    with wrap(model, *METHODS.values()) as patch:
        assert not torch.equal(logits(model), stock)
        for name in patch.heads:
            patch.heads[name][:] = False
        assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_method_with_every_head_off_leaves_the_others_alone(kind: str, name: str) -> None:
    model = planted(kind)
    rest = [method for other, method in METHODS.items() if other != name]
    with wrap(model, *rest):
        expected = logits(model)
    with wrap(model, *METHODS.values()) as patch:
        together = logits(model)
        patch.heads[name][:] = False
        assert torch.equal(logits(model), expected)
        assert not torch.equal(together, expected)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_disabled_is_the_stock_model_for_a_moment(kind: str, attn: str) -> None:
    model = planted(kind, attn)
    stock = logits(model)
    with wrap(model, *METHODS.values()) as patch:
        patched = logits(model)
        with patch.disabled():
            assert torch.equal(logits(model), stock)
        assert torch.equal(logits(model), patched)


@pytest.mark.parametrize("name", METHODS)
def test_one_disabled_method_leaves_the_others_alone(name: str) -> None:
    model = planted()
    rest = [method for other, method in METHODS.items() if other != name]
    with wrap(model, *rest):
        expected = logits(model)
    with wrap(model, *METHODS.values()) as patch, patch.disabled(name):
        assert torch.equal(logits(model), expected)


def test_disabled_is_nested_and_ends_after_an_error() -> None:
    model = planted()
    stock, alone = logits(model), {}
    for name in ("var", "vhr"):
        with wrap(model, METHODS[name]):
            alone[name] = logits(model)
    with wrap(model, METHODS["var"], METHODS["vhr"]) as patch:
        both = logits(model)
        with patch.disabled("vhr"):
            assert torch.equal(logits(model), alone["var"])
            with patch.disabled("var", "vhr"):
                assert torch.equal(logits(model), stock)
            with pytest.raises(ZeroDivisionError), patch.disabled("var"):
                raise ZeroDivisionError
            assert torch.equal(logits(model), alone["var"])
        with patch.disabled("var"):
            assert torch.equal(logits(model), alone["vhr"])
        assert torch.equal(logits(model), both)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_head_changes_its_own_slice_and_nothing_else(kind: str, name: str) -> None:
    """Before the output projection of the one layer that is on, in a prompt and in a step."""
    model = planted(kind)
    stock, moved = head_outputs(model), []
    for head in range(4):
        with wrap(model, METHODS[name], heads={2: [head]}):
            found = head_outputs(model)
        others = [other for other in range(4) if other != head]
        for time in range(2):
            for layer in (0, 1):
                assert torch.allclose(found[layer][time], stock[layer][time], rtol=0, atol=1e-5)
            mine, theirs = found[2][time], stock[2][time]
            assert torch.allclose(mine[:, :, others], theirs[:, :, others], rtol=0, atol=1e-5)
            same = torch.allclose(mine[:, :, head], theirs[:, :, head], rtol=0, atol=1e-3)
            moved.append(not same)
    assert any(moved[0::2])
    assert any(moved[1::2])


def test_gift_changes_only_the_last_row_of_a_prompt() -> None:
    model = planted()
    stock = head_outputs(model)
    with wrap(model, METHODS["gift"], layers=[2]):
        found = head_outputs(model)
    assert torch.equal(found[2][0][:, :-1], stock[2][0][:, :-1])
    assert not torch.equal(found[2][0][:, -1:], stock[2][0][:, -1:])


def test_var_leaves_rows_before_the_end_of_the_image_alone() -> None:
    model = planted()
    stock = head_outputs(model)
    with wrap(model, METHODS["var"], layers=[2]):
        found = head_outputs(model)
    for row, end in enumerate((21, 17, 23)):  # of BATCH_OF_3, padded to 27
        assert torch.equal(found[2][0][row, :end], stock[2][0][row, :end])
    assert not torch.equal(found[2][0], stock[2][0])


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_leaves_the_ones_below_it_alone(name: str) -> None:
    model = planted()
    stock = blocks(model)
    with wrap(model, METHODS[name], layers=[2]):
        found = blocks(model)
    same = [torch.equal(a, b) for a, b in zip(stock, found, strict=True)]
    assert same == [True, True, True, False, False]  # the input of each block, then the output


def test_heads_switched_between_two_generations() -> None:
    model = planted()
    alone = {}
    for heads in ("1:0,1", "1-2:*"):
        with wrap(model, METHODS["var"], heads=heads):
            alone[heads] = logits(model)
    stock = logits(model)
    assert not torch.equal(alone["1:0,1"], alone["1-2:*"])
    with wrap(model, METHODS["var"], heads="1:0,1") as patch:
        assert torch.equal(logits(model), alone["1:0,1"])
        patch.heads["var"] = "1-2:*"
        assert torch.equal(logits(model), alone["1-2:*"])
        patch.heads["var"][1, 2:] = False
        patch.heads["var"][2] = False
        assert torch.equal(logits(model), alone["1:0,1"])
        table = patch.heads["var"]
        table.zero_()
        assert torch.equal(logits(model), stock)


def test_a_table_that_was_replaced_no_longer_counts() -> None:
    model = planted()
    with wrap(model, METHODS["var"]) as patch:
        old = patch.heads["var"]
        patch.heads["var"] = "1"
        expected = logits(model)
        old[:] = False
        assert torch.equal(logits(model), expected)


# ---- wrap


def test_by_name_and_by_instance() -> None:
    model = tiny.llava()
    with pytest.warns(UserWarning, match="scaled"), wrap(model, "vhr"):
        named = logits(model)
    with wrap(model, VHR(layers=(1, 2, 3))):
        assert torch.equal(logits(model), named)
    with wrap(model, "var", VHR(layers=[1])) as patch:
        assert list(patch.heads) == ["var", "vhr"]


def test_methods_act_in_the_order_given() -> None:
    model = planted()
    found = []
    for names in (("var", "gift"), ("gift", "var")):
        with wrap(model, *[METHODS[name] for name in names]) as patch:
            assert list(patch.heads) == list(names)
            found.append(logits(model))
    assert not torch.allclose(*found)


def cells(table: Tensor) -> str:
    """A table as text: the heads of each layer."""
    return "; ".join(
        f"{layer}:{','.join(map(str, row.nonzero().flatten().tolist()))}"
        for layer, row in enumerate(table)
        if row.any()
    )


@pytest.mark.parametrize(
    ("given", "var", "vhr"),
    [
        ({}, "0:0,1,2,3; 1:0,1,2,3; 2:0,1,2,3", "1:0,1,2,3; 2:0,1,2,3; 3:0,1,2,3"),
        ({"layers": "2-3"}, "2:0,1,2,3", "2:0,1,2,3; 3:0,1,2,3"),
        ({"layers": 2}, "2:0,1,2,3", "2:0,1,2,3"),
        ({"heads": "2:0"}, "2:0", "2:0"),
        ({"heads": {1: [3], 2: "*"}}, "1:3; 2:0,1,2,3", "1:3; 2:0,1,2,3"),
        ({"heads": {"var": "2:0"}}, "2:0", "1:0,1,2,3; 2:0,1,2,3; 3:0,1,2,3"),
        ({"heads": {"var": "2:0", "vhr": {1: [1]}}}, "2:0", "1:1"),
        ({"heads": "2-3:0", "layers": [2]}, "2:0", "2:0"),
        ({"heads": torch.eye(4).bool()}, "0:0; 1:1; 2:2; 3:3", "0:0; 1:1; 2:2; 3:3"),
        ({"heads": "3:1"}, "3:1", "3:1"),  # also where the method is not by default
    ],
    ids=str,
)
def test_layers_and_heads(given: Mapping[str, Any], var: str, vhr: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch = wrap(tiny.llava(), METHODS["var"], METHODS["vhr"], **given)
    assert cells(patch.heads["var"]) == var
    assert cells(patch.heads["vhr"]) == vhr


def test_layers_and_heads_that_have_none_in_common() -> None:
    model = tiny.llava()
    with pytest.warns(UserWarning, match=r"^var is off in every layer") as record:
        patch = wrap(model, METHODS["var"], METHODS["vhr"], layers=[3])
    assert [str(item.message) for item in record] == [
        "var is off in every layer: its layers 0-2 and the layers and heads given have none in "
        "common"
    ]
    assert record[0].filename == __file__
    assert not patch.heads["var"].any()
    assert cells(patch.heads["vhr"]) == "3:0,1,2,3"


def test_a_method_that_is_off_leaves_the_stock_model() -> None:
    model = planted()
    stock = logits(model)
    with pytest.warns(UserWarning, match="off in every layer"):
        patch = wrap(model, METHODS["var"], layers=[3])
    assert torch.equal(logits(model), stock)
    patch.remove()


# ---- what it says


def test_describe() -> None:
    patch = wrap(tiny.llava(), *METHODS.values())
    patch.heads["var"][1, 3] = False
    patch.heads["vhr"] = "2"
    expected = """\
LlavaForConditionalGeneration (float32 on cpu): LlamaModel, 4 layers x 4 heads, \
softmax attention in 0-3
  VAR(move_fraction=0.6, rho_nonsink=0.5, min_image_mass=0.2, tau=3.0, dims=(3, 10), \
first_layer=0, exclude_last_layer=True, require_visual_sink=False, semantics=paper): \
on in layers 0-2, with some heads off in 1
  GIFT(alpha=3.0, beta=1.0, saliency_layer=0, layers=1-3, head_fraction=0.5, words=content): \
on in layers 1-3
  VHR(alpha=2.0, layers=1-3, filter=True, semantics=release): \
on in layers 2; its extra prompt shares the prompt's forward"""
    assert patch.describe() == repr(patch) == str(patch) == expected
    patch.heads["vhr"][:] = False
    with patch.disabled("gift"):
        lines = patch.describe().splitlines()
    assert lines[2].endswith(": on in layers 1-3, disabled at the moment")
    assert lines[3].endswith(": off")


def test_describe_with_several_saliency_layers() -> None:
    gift = GIFT(alpha=1.0, saliency_layer=[0, 2], layers=[1, 3])
    assert "saliency_layer=[0, 2], layers=1, 3" in wrap(tiny.llava(), gift).describe()


def test_describe_with_a_mask_of_words() -> None:
    gift = GIFT(alpha=1.0, saliency_layer=0, layers=[1], words=torch.ones(1, 25).bool())
    assert "layers=1, head_fraction=0.5, words=mask (1, 25)" in repr(wrap(tiny.llava(), gift))


# ---- defaults


def llava_of(depth: int, width: int, heads: int) -> nn.Module:
    text = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
    )
    vision = hf.CLIPVisionConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
    config = hf.LlavaConfig(vision_config=vision, text_config=text)
    with torch.device("meta"):
        return hf.LlavaForConditionalGeneration(config)


def qwen2_vl_7b() -> nn.Module:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 3584, "num_heads": 1}
    with torch.device("meta"):
        return hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(text_config=text, vision_config=vision)
        )


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "llava-1.5-7b": lambda: llava_of(32, 4096, 32),
    "llava-1.5-13b": lambda: llava_of(40, 5120, 40),
    "qwen2-vl-7b": qwen2_vl_7b,
    "other": lambda: llava_of(24, 1024, 16),
}
SETTLED = [
    # model, method, what it settles on, its layers, what is scaled
    ("llava-1.5-7b", "var", "tau=20.0, dims=(1415, 2533)", "0-30", None),
    ("llava-1.5-7b", "gift", "alpha=5.0, beta=1.0, saliency_layer=11", "12-22", None),
    ("llava-1.5-7b", "vhr", "alpha=2.0", "1, 18-31", None),
    ("llava-1.5-13b", "var", "tau=22.36", "0-38", None),
    ("llava-1.5-13b", "var", "dims=(2100, 4743)", "0-38", None),
    ("llava-1.5-13b", "gift", "alpha=5.0, beta=1.0, saliency_layer=10", "14-20", None),
    ("llava-1.5-13b", "vhr", "alpha=2.0", "1, 22-39", f"VHR layers={[1, *range(22, 40)]}"),
    ("qwen2-vl-7b", "var", "tau=18.708", "0-26", None),
    ("qwen2-vl-7b", "var", "dims=(458, 2570)", "0-26", None),
    ("qwen2-vl-7b", "gift", "alpha=4.0, beta=1.0, saliency_layer=14", "5-18", None),
    ("qwen2-vl-7b", "vhr", "alpha=2.0", "1, 16-27", f"VHR layers={[1, *range(16, 28)]}"),
    ("other", "var", "tau=None, dims=None, first_layer=0", "0-22", None),
    (
        "other",
        "gift",
        "alpha=4.0, beta=1.0, saliency_layer=7",
        "8-15",
        f"GIFT alpha=4.0, GIFT layers={tuple(range(8, 16))}, GIFT saliency_layer=7",
    ),
    ("other", "vhr", "alpha=2.0", "1, 14-23", f"VHR layers={[1, *range(14, 24)]}"),
]


@pytest.mark.parametrize(("shape", "name", "values", "layers", "scaled"), SETTLED)
def test_defaults_of_a_model(
    shape: str, name: str, values: str, layers: str, scaled: str | None
) -> None:
    model = SHAPES[shape]()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        patch = wrap(model, name)
    assert values in patch.describe()
    on = patch.heads[name].any(1).nonzero().flatten().tolist()
    assert on == numbers(layers, len(patch.heads[name]), "layer")
    assert f": on in layers {layers}" in patch.describe()
    said = [str(item.message) for item in record]
    assert len(said) == (scaled is not None)
    if scaled is not None:
        config = model.config.get_text_config()
        assert said[0] == (
            f"no published settings for a {config.model_type} of {config.num_hidden_layers} layers "
            f"and width {config.hidden_size}; scaled from other models: {scaled}. Pass your own to "
            "silence this."
        )
        assert record[0].filename == __file__


def test_scaled_defaults_are_said_in_one_warning_of_what_was_not_given() -> None:
    model = tiny.llava()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        wrap(model, GIFT(alpha=2.0, layers=[2]), "vhr")
        logits(model)
    scaled = [str(item.message) for item in record if "scaled" in str(item.message)]
    assert scaled == [
        "no published settings for a llama of 4 layers and width 64; scaled from other models: "
        "GIFT saliency_layer=0, VHR layers=[1, 2, 3]. Pass your own to silence this."
    ]


def test_what_is_given_wins_over_the_profile() -> None:
    own = GIFT(alpha=1.5, saliency_layer=3, layers=[5])
    patch = wrap(SHAPES["llava-1.5-7b"](), own, VAR(dims=[7], tau=9.0))
    assert "GIFT(alpha=1.5, beta=1.0, saliency_layer=3, layers=5," in patch.describe()
    assert "tau=9.0, dims=(7,)" in patch.describe()


def test_wrap_does_not_change_the_methods_it_is_given() -> None:
    gift = GIFT()
    with pytest.warns(UserWarning, match="scaled"):
        wrap(tiny.llava(), gift)
    assert (gift.alpha, gift.saliency_layer, gift.layers) == (None, None, None)


# ---- masks by hand


@pytest.mark.parametrize("name", METHODS)
def test_embeddings_with_the_masks_give_what_ids_give(name: str) -> None:
    model = planted()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    image = batch["input_ids"] == tiny.IMAGE
    query = ~image & (image.cumsum(1) > 0) & batch["attention_mask"].bool()
    embedded = {k: v for k, v in batch.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    ways = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        stock = model(**batch).logits
        with wrap(model, METHODS[name]) as patch:
            expected, tokens = model(**batch).logits, model.generate(**batch, **ways)
            with patch.prompt(image=image, query=query):
                assert torch.equal(model(**embedded).logits, expected)
                generated = model.generate(**embedded, **ways)
    assert torch.equal(generated, tokens[:, -generated.shape[1] :])
    assert not torch.equal(expected, stock)


def test_another_question_gives_another_map() -> None:
    model = planted()
    batch = tiny.inputs(model)
    found = []
    for place in (20, 23):
        query = torch.zeros(1, 25, dtype=torch.bool)
        query[0, place] = True
        with wrap(model, METHODS["gift"]) as patch, patch.prompt(query=query), torch.no_grad():
            found.append(model(**batch).logits)
    assert not torch.equal(*found)


def test_a_removed_patch_says_so() -> None:
    patch = wrap(tiny.llava(), VHR())
    patch.remove()
    assert "(removed: the model is stock)" in patch.describe()
    with pytest.raises(PatchError, match="was taken off: put the methods on again with wrap"):
        patch.__enter__()

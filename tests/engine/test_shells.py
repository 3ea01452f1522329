"""What a model may be inside of when it is wrapped: compiled, distributed, adapted."""

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TextIteratorStreamer, pipeline

import vlm_patch
from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.support.agreement import NO_PROCESSOR
from tests.support.untouched import state_of
from vlm_patch import GIFT, VAR, VHR, PatchError, UnsupportedModelError, unwrap, wrap
from vlm_patch.engine.attention import SLOT

pytestmark = [
    pytest.mark.filterwarnings(NO_PROCESSOR),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
NAMES = ("var", "gift", "vhr")
FEW = (
    VAR(tau=3.0, dims=tiny.SINK_DIMS, exclude_last_layer=False),
    VHR(layers=(1,)),
    GIFT(3.0, saliency_layer=0, layers=(1,)),
)
"""For two layers, which are compiled in half the time of four."""
STEPS = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """Also without the compiler's trace in pytest's log, which takes longer than compiling."""
    torch.compiler.reset()
    trace = logging.getLogger("torch.__trace")
    before, trace.propagate = trace.propagate, False
    yield
    trace.propagate = before
    torch.compiler.set_stance("default")


def accelerated(model: nn.Module) -> Any:
    plugin = accelerate.utils.TorchDynamoPlugin(backend="eager", use_regional_compilation=False)
    return accelerate.Accelerator(cpu=True, dynamo_plugin=plugin).prepare(model)


def adapted(model: nn.Module) -> Any:
    """In an adapter that changes nothing."""
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    return peft.get_peft_model(model, lora).eval()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return model


SHELLS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "adapted, compiled": lambda model: compiled(adapted(model)),
    "compiled, adapted": lambda model: adapted(compiled(model)),
    "prepared by accelerate": accelerated,
}


@pytest.mark.parametrize("name", SHELLS)
def test_a_model_in_a_shell(name: str) -> None:
    """Forward and generate are as of the bare model, also in a shell that was compiled before, and
    stock again afterwards; the model and its shell know of each other's patch. One is really
    compiled, which takes long.
    """
    torch.compiler.set_stance("default" if name == "compiled" else "force_eager")
    bare, model = planted("llava", layers=2), planted("llava", layers=2)
    shell = SHELLS[name](model)
    batch = tiny.inputs(bare, tiny.ONE_IMAGE)
    two = STEPS | {"max_new_tokens": 2, "min_new_tokens": 2}
    with torch.no_grad():
        stock = bare(**batch).logits
        torch.testing.assert_close(shell(**batch).logits, stock)
        with wrap(bare, *FEW):
            expected, answer = bare(**batch).logits, bare.generate(**batch, **two)
        with wrap(shell, *FEW):
            torch.testing.assert_close(shell(**batch).logits, expected)
            assert torch.equal(shell.generate(**batch, **two), answer)
            with pytest.raises(PatchError, match="already wrapped"):
                wrap(model, "vhr")
        torch.testing.assert_close(shell(**batch).logits, stock)
    wrap(model, *FEW)
    assert unwrap(shell)
    assert not unwrap(model)


def test_distributed_data_parallel() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        bare = planted("llava")
        shell = DistributedDataParallel(planted("llava"))
        batch = tiny.inputs(bare, tiny.BATCH_OF_3)
        with torch.no_grad(), wrap(bare, *ours(NAMES)), wrap(shell, *ours(NAMES)):
            torch.testing.assert_close(shell(**batch).logits, bare(**batch).logits)
            answer = shell.module.generate(**batch, **STEPS)
            assert torch.equal(answer, bare.generate(**batch, **STEPS))
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_is_refused() -> None:
    model = planted("llava")
    before = state_of(model)
    with pytest.raises(UnsupportedModelError) as caught:
        wrap(nn.DataParallel(model), "vhr")
    assert str(caught.value) == (
        "DataParallel runs copies of the model, made anew at every forward, on which no method is "
        "on: wrap the model inside it (model.module) and run it by itself, or one process per GPU "
        "with DistributedDataParallel"
    )
    assert state_of(model) == before


def test_a_pipeline_that_holds_a_compiled_model() -> None:
    from PIL import Image

    content = [
        {"type": "image", "image": Image.effect_noise((32, 32), 80).convert("RGB")},
        {"type": "text", "text": "Is there a dog in the image?"},
    ]
    answers = []
    for shell in (planted("llava"), compiled(planted("llava"))):
        ask = pipeline("image-text-to-text", model=shell, processor=tiny.processor())
        with wrap(shell, *ours(NAMES)):
            said = ask(text=[{"role": "user", "content": content}], generate_kwargs=STEPS)
        answers.append(said[0]["generated_text"][-1]["content"])
    assert answers[0] == answers[1]


# ---- flex attention


METHODS = [[VAR()], [VAR(dims=tiny.SINK_DIMS)], [GIFT(words="all")], [VHR()]]


@pytest.mark.parametrize("methods", METHODS)
def test_flex_attention_is_refused_alike(methods: list[Any]) -> None:
    model = planted("llava")
    before = model.config.text_config._attn_implementation
    for wanted in ("flex_attention", {"text_config": "flex_attention"}):
        model.set_attn_implementation(wanted)
        with pytest.raises(UnsupportedModelError) as caught:
            wrap(model, *methods)
        assert str(caught.value) == (
            "layer 0 of the decoder runs flex_attention, whose masks are functions and whose rows "
            "no method can edit: load the model with from_pretrained(..., "
            'attn_implementation="sdpa"), or switch it by model.set_attn_implementation("sdpa")'
        )
        model.set_attn_implementation(before)


def test_flex_attention_is_refused_once_it_is_switched_on() -> None:
    model = planted("llava")
    with torch.no_grad(), wrap(model, *ours(["vhr"])):
        model.set_attn_implementation({"text_config": "flex_attention"})
        with pytest.raises(UnsupportedModelError, match="of the decoder runs flex_attention"):
            model(**tiny.inputs(model))


def test_flex_attention_of_the_vision_tower_is_none_of_ours() -> None:
    model = planted("llava")
    model.config.vision_config._attn_implementation = "flex_attention"
    wrap(model, *ours(NAMES)).remove()


# ---- a handle that was lost


def test_the_way_back_from_the_model_alone() -> None:
    """A notebook cell run twice: its handle is overwritten by the error."""
    model = planted("llava")
    batch = tiny.inputs(model)
    stock, before = model(**batch).logits, state_of(model)
    wrap(model, *ours(NAMES))
    gc.collect()
    with pytest.raises(PatchError, match=r"or vlm_patch\.unwrap\(model\) if that was lost"):
        wrap(model, *ours(NAMES))
    assert vlm_patch.unwrap(model)
    assert state_of(model) == before
    assert torch.equal(model(**batch).logits, stock)
    assert not vlm_patch.unwrap(model)
    wrap(model, *ours(NAMES)).remove()


def test_a_handle_knows_that_it_was_taken_off() -> None:
    model = planted("llava")
    patch = wrap(model, *ours(NAMES))
    assert unwrap(model)
    assert "removed: the model is stock" in patch.describe()
    patch.remove()
    with wrap(model, *ours(NAMES)):
        patch.remove()
        assert unwrap(model)


def test_copies_lead_back_to_no_patch() -> None:
    model = planted("llava")
    with wrap(model, *ours(NAMES)):
        twin = copy.deepcopy(model)
        assert not unwrap(twin)
        with wrap(twin, *ours(["vhr"])):
            assert unwrap(twin)
        slot = model.get_decoder().layers[0].self_attn.__dict__[SLOT]
        assert slot.patch is not None
        assert pickle.loads(pickle.dumps(slot)).patch is None
        assert unwrap(model)


def test_a_lost_model_takes_its_patch_along() -> None:
    model = planted("llava")
    alive = weakref.ref(wrap(model, *ours(NAMES)))
    gc.collect()
    assert alive() is not None
    del model
    gc.collect()
    assert alive() is None


def test_unwrap_of_something_else() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is no transformers model"):
        unwrap(nn.Linear(2, 2))


# ---- streams, scores


def test_a_streamer_in_a_thread() -> None:
    model, processor = planted("llava"), tiny.processor()
    batch = tiny.inputs(model)
    options = STEPS | {"max_new_tokens": 12, "min_new_tokens": 12}
    with wrap(model, *ours(NAMES), processor=processor):
        expected = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :]
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(
            target=model.generate, kwargs={**batch, **options, "streamer": streamer}
        )
        thread.start()
        streamed = "".join(streamer)
        thread.join()
        assert streamed == processor.tokenizer.decode(expected)


def test_scores_of_right_padded_answers() -> None:
    """As the message on right padding says: the prompts first, then token by token."""
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    answers = torch.tensor([[60, 61, 62], [63, 64, tiny.PAD], [65, tiny.PAD, tiny.PAD]])

    def scored(batch: dict[str, Tensor], answers: Tensor) -> Tensor:
        mask = batch["attention_mask"]
        output = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
        found = [output.logits[:, -1]]
        for step in answers.T[:, :, None]:
            mask = torch.cat([mask, (step != tiny.PAD).long()], 1)
            output = model(
                input_ids=step,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=output.past_key_values,
            )
            found.append(output.logits[:, -1])
        return torch.stack(found[:-1], 1)

    with torch.no_grad(), wrap(model, *ours(NAMES)):
        found = scored(batch, answers)
        for row, length in enumerate((3, 2, 1)):
            alone = scored(tiny.single(model, batch, row), answers[row : row + 1, :length])
            torch.testing.assert_close(found[row, :length], alone[0], rtol=0, atol=1e-5)

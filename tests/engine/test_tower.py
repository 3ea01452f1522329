"""What a method is shown of the vision tower: every score takes the way of its patch's features."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from eval.support import tiny
from eval.support.build import build
from vlm_patch import PAINT, PatchError, UnsupportedModelError, wrap
from vlm_patch.engine import tower
from vlm_patch.engine.attention import Call
from vlm_patch.method import ForwardContext, Method, Patches, State, TowerRead

CLS, COLUMNS = TowerRead(0), TowerRead(-2, "patches")


@dataclass(frozen=True, eq=False)
class Looks(Method):
    """Edits nothing; keeps what it is shown, and the embeddings that enter the decoder."""

    name: ClassVar[str] = "looks"
    seen: dict[str, Any] = field(default_factory=dict)

    def tower_reads(self) -> tuple[TowerRead, ...]:
        return CLS, COLUMNS

    def before_forward(self, forward: ForwardContext, state: State) -> None:
        if forward.position.starts:
            self.seen.update(patches=forward.patches, embeds=forward.inputs["inputs_embeds"])


def shown(model: Any, **inputs: Any) -> tuple[Patches, Tensor]:
    looks = Looks()
    with wrap(model, looks), torch.no_grad():
        model(**inputs)
    return looks.seen["patches"], looks.seen["embeds"]


# ---- where scores land


def codes(scores: Tensor) -> Tensor:
    """A number of its own for every patch `[N, P]` of a call."""
    return torch.arange(scores.numel(), dtype=torch.float32).view_as(scores)


def code_patches(tower: nn.Module, drop: int) -> None:
    """Lets a tower give the code of every patch, behind its `drop` other tokens."""

    def write(module: nn.Module, args: Any, output: Any) -> None:
        states = [output.last_hidden_state, *(output.hidden_states or ())]
        for state in (state for state in states if state is not None):
            kept = state[:, drop:]
            kept.copy_(codes(kept[..., 0])[..., None].expand_as(kept))

    tower.register_forward_hook(write)


class MeanCode(nn.Module):
    """In a projector's place: the mean code of a token's `count` patches, in channel 0."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.width, self.count = width, count

    def forward(self, features: Tensor) -> Tensor:
        coded = features.unflatten(-1, (self.count, -1))[..., 0].mean(-1, keepdim=True)
        return nn.functional.pad(coded, (0, self.width - 1))


def prompt(model: Any, sizes: list[int]) -> Tensor:
    """Token ids of one prompt with images of so many tokens, and text between them."""
    ids = [1]
    for size in sizes:
        ids += [*[model.config.image_token_id] * size, 6, 7]
    return torch.tensor([ids])


if tiny.FEATURES:

    @pytest.mark.parametrize(
        ("kind", "side", "count", "cls", "per_token"),
        [
            ("llava", 336, 2, True, 1),
            ("vipllava", 336, 2, True, 5),
            ("paligemma", 224, 2, False, 1),
            ("llava_next", 336, 8, True, 1),
            ("internvl", 448, 3, True, 4),
        ],
    )
    def test_a_score_lands_where_the_features_of_its_patch_do(
        kind: str, side: int, count: int, cls: bool, per_token: int
    ) -> None:
        """The tower gives numbers in the place of features, and `received` the same numbers."""
        model = build(kind)
        if kind == "vipllava":
            model.config.vision_feature_layers = [0, 1, -1, -2, -3]
        width = model.get_input_embeddings().weight.shape[1]
        given: dict[str, Any] = {"pixel_values": torch.zeros(count, 3, side, side)}
        if kind == "llava_next":  # a base and four tiles, cut at the side; a base and two
            given["image_sizes"] = torch.tensor([[400, 672], [300, 672]])
            model.model.image_newline.data.fill_(torch.nan)
        code_patches(model.model.vision_tower, int(cls))
        model.model.multi_modal_projector = MeanCode(width, per_token)
        with torch.no_grad():
            sizes = [len(image) for image in model.get_image_features(**given).pooler_output]
        if kind == "internvl":  # two tiles of one image, and one alone
            sizes = [sizes[0] + sizes[1], sizes[2]]
        ids = prompt(model, sizes)
        if kind == "paligemma":
            given["token_type_ids"] = torch.zeros_like(ids)

        def read(call: Call, rows: str, found: bool, shard: Any) -> Tensor:
            assert found is cls
            return codes(call.query[:, 0, int(cls) :, 0])

        with mock.patch.object(tower, "received", read):
            patches, embeds = shown(model, input_ids=ids, **given)
        image = ids == model.config.image_token_id
        expected = embeds[..., 0]
        for scores in patches.scores.values():
            assert scores[~image].isnan().all()
            torch.testing.assert_close(scores[image], expected[image], equal_nan=True)
        real = ~patches.scores[CLS].isnan()
        assert (image & ~real).any() == (kind == "llava_next")
        runs = (image & ~image.roll(1, 1)).cumsum(1) - 1
        assert torch.equal(patches.image, runs.masked_fill(~real, -1))


def test_every_beam_has_the_scores_of_its_prompt() -> None:
    model, looks = tiny.llava(), Looks()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    alone, _ = shown(model, **batch)
    with wrap(model, looks):
        model.generate(**batch, num_beams=2, max_new_tokens=1)
    for read, scores in looks.seen["patches"].scores.items():
        expected = alone.scores[read].repeat_interleave(2, 0)
        torch.testing.assert_close(scores, expected, equal_nan=True)


# ---- what is read


@pytest.mark.parametrize("budget", [1, 2**26])
def test_attention_that_patches_get(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "ROWS_BUDGET", budget)
    model = tiny.llava(attn="eager")
    batch = tiny.inputs(model)
    patches, _ = shown(model, **batch)
    with torch.no_grad():
        vision = model.model.vision_tower(batch["pixel_values"], output_attentions=True)
    first = vision.attentions[0][0]
    image = batch["input_ids"] == tiny.IMAGE
    expected = first[:, 0, 1:].sum(0), first[:, 1:, 1:].mean(1).sum(0)
    for read, scores in zip((CLS, COLUMNS), expected, strict=True):
        torch.testing.assert_close(patches.scores[read][image], scores)


def test_the_tower_is_read_once_and_only_while_a_method_is_on() -> None:
    model = tiny.plant(tiny.llava())
    batch = tiny.inputs(model)
    heard: list[int] = []

    def read(call: Call, *rest: Any) -> Tensor:
        heard.append(call.layer)
        return original(call, *rest)

    original = tower.received
    with mock.patch.object(tower, "received", read), wrap(model, PAINT(rho_sp=0.1)) as patch:
        model.generate(**batch, max_new_tokens=3)
        assert heard == [0, 0, 0]
        with patch.disabled():
            model.generate(**batch, max_new_tokens=3)
        patch.heads["paint"][:] = False
        model.generate(**batch, max_new_tokens=3)
        if tiny.FEATURES:
            model.get_image_features(batch["pixel_values"])
        assert heard == [0, 0, 0]
        assert not patch._tower.scores


# ---- refused


def refusal(act: Callable[[], Any], error: type[Exception] = PatchError) -> str:
    with pytest.raises(error) as caught:
        act()
    return str(caught.value)


ENCODED = (
    "paint reads the attention of the vision tower, but the images of this prompt were encoded "
    "before, so that it was not seen. Call the model or generate with pixel_values instead of "
    "image features or embeddings."
)


if tiny.FEATURES:

    def test_images_that_were_encoded_before() -> None:
        """Also right behind a prompt whose images were seen."""
        model = tiny.plant(tiny.llava())
        batch = tiny.inputs(model)
        given = {
            **batch,
            "mm_encoder_outputs": {"image": model.get_image_features(batch.pop("pixel_values"))},
        }
        del given["pixel_values"]
        with wrap(model, PAINT()):
            model(**tiny.inputs(model))
            assert refusal(lambda: model(**given)) == ENCODED
            model.generate(**tiny.inputs(model), max_new_tokens=1)
            assert refusal(lambda: model.generate(**given, max_new_tokens=1)) == ENCODED


def test_tokens_that_are_not_the_tower_s() -> None:
    model = tiny.plant(tiny.qwen2_vl())
    heard = wrap(model, PAINT())._tower
    heard.scores = {read: [torch.zeros(1, 64)] for read in heard.reads}
    image = torch.zeros(2, 20, dtype=torch.bool)
    image[:, :12] = True
    assert refusal(lambda: heard.place(image, "paint")) == (
        "paint: the vision tower's patches make 16 image tokens, but the prompt has 24, so it is "
        "not known which is which. Prompts must hold all tokens of the images they come with."
    )
    heard.listen(dict.fromkeys(("pixel_values", "pixel_values_videos"), image))
    heard.scores = {read: [torch.zeros(1, 64)] for read in heard.reads}
    assert refusal(lambda: heard.place(image, "paint")) == (
        "paint cannot tell images from videos in one prompt: give one of the two"
    )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "instructblip",
            "its image tokens are made by queries that look at all patches, so none stands for one",
        ),
        ("qwen2_5_vl", "its tower looks inside windows, so that no row compares all patches"),
        (
            "gemma3",
            "how its patches become image tokens is not known, only for llava, vipllava, "
            "paligemma, qwen2_vl, qwen3_vl, qwen3_vl_moe, internvl, llava_next",
        ),
    ],
)
def test_models_whose_patches_cannot_be_told(kind: str, reason: str) -> None:
    model = build(kind)
    assert refusal(lambda: wrap(model, PAINT()), UnsupportedModelError) == (
        f"paint is not supported on this model, since it reads the vision tower: {reason}"
    )


def test_a_tower_of_one_layer() -> None:
    model = build("llava")
    del model.model.vision_tower.encoder.layers[1:]
    assert refusal(lambda: wrap(model, PAINT()), UnsupportedModelError) == (
        "paint reads 2 layers of the vision tower, and this model's has 1 whose attention can be "
        "reached"
    )

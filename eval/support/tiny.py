"""Tiny random models that behave enough like real ones: sharp attention, massive activations.

Every model has a vocabulary of 120 ids; one image is 16 placeholders (Qwen2-VL: by its grid).
With the default seed, planted, VHR's filter and GIFT's clip act in some rows of MIXED_BATCH, and
no decision of any method lies within float32 rounding of its threshold.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from eval.support.prompts import TAKES_FEATURES
from eval.support.reference import Sample, capture
from eval.support.tiny_text import BOS as BOS
from eval.support.tiny_text import EOS as EOS
from eval.support.tiny_text import IMAGE as IMAGE
from eval.support.tiny_text import PAD as PAD
from eval.support.tiny_text import SINK_WORD as SINK_WORD
from eval.support.tiny_text import VIDEO as VIDEO
from eval.support.tiny_text import VISION_END, VISION_START
from eval.support.tiny_text import VOCABULARY as VOCABULARY
from eval.support.tiny_text import processor as processor
from eval.support.tiny_text import tokenizer as tokenizer

WIDTH = 64
# of the random weights; the head's keeps float32 rounding of the logits near 1e-6
GAINS = {"q_proj": 1.6, "k_proj": 1.6, "lm_head": 0.4, "out_proj": 0.3, "attn.proj": 0.3}
SINK_DIMS = (3, 10)
FEATURES = TAKES_FEATURES
"""Whether transformers encodes images before a prompt runs. Where it does not, a prompt cannot run
in chunks, nor prompts of several images be repeated, and no image features can be given."""
EXACT_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen2VLRMSNorm")
# image token -> the activation that `plant` gives it; its pixels are the same in every image
MARKS = {2: 20.0, 5: 6.0, 6: 20.0}

# rows of token ids; IMAGE stands for one whole image
ONE_IMAGE: Sequence[Sequence[int]] = [[BOS, 5, 6, IMAGE, 21, 22, 23, 24, 25, 26]]
TWO_IMAGES: Sequence[Sequence[int]] = [[BOS, 5, IMAGE, 40, 41, 42, IMAGE, 50, 51, 52, 53, 54]]
BATCH_OF_3: Sequence[Sequence[int]] = [
    [BOS, 5, 6, IMAGE, 21, 22, 23, 24, 25, 26],
    [BOS, IMAGE, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39],
    [BOS, 5, 8, 9, 6, IMAGE, 41, 42, SINK_WORD, 43],
]
MIXED_BATCH: Sequence[Sequence[int]] = [*BATCH_OF_3, *TWO_IMAGES]


def llava(
    layers: int = 4, seed: int = 1, attn: str = "sdpa", kv_heads: int = 4, **text_kw: Any
) -> LlavaForConditionalGeneration:
    """LLaVA with a 2-layer CLIP tower and a Llama decoder of `layers` x 4 heads, width 64."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    text = LlamaConfig(**_text(layers, kv_heads) | text_kw)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    model: LlavaForConditionalGeneration = _redrawn(
        _made(LlavaForConditionalGeneration, config, attn), seed
    )
    return model


def sliding_llava(
    window: int = 12, attn: str = "sdpa", kv_heads: int = 2, **options: Any
) -> LlavaForConditionalGeneration:
    """A planted LLaVA whose layers see the newest keys only, so that image keys drop out of
    sight.
    """
    full: Any = llava(attn=attn, kv_heads=kv_heads, **options)
    text = MistralConfig(**full.config.text_config.to_dict() | {"sliding_window": window})
    config = LlavaConfig(**full.config.to_dict() | {"text_config": text})
    model = _made(LlavaForConditionalGeneration, config, attn).eval()
    model.load_state_dict(full.state_dict())
    planted: LlavaForConditionalGeneration = plant(model)
    return planted


def qwen2_vl(
    layers: int = 4, seed: int = 1, attn: str = "sdpa", kv_heads: int = 2, **text_kw: Any
) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL (m-rope, biased q/k/v) of `layers` x 4 heads, width 64."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        text_config=_text(layers, kv_heads)
        | {"rope_scaling": rope, "rope_theta": 10000.0}
        | text_kw,
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model: Qwen2VLForConditionalGeneration = _redrawn(
        _made(Qwen2VLForConditionalGeneration, config, attn), seed
    )
    return model


def _text(layers: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _made(kind: Any, config: PretrainedConfig, attn: str) -> Any:
    return kind._from_config(config, attn_implementation=attn)


def _redrawn(model: Any, seed: int) -> Any:
    """Weights that keep activations near unit size and make attention sharp.

    transformers' own initialisation leaves attention so flat that no method changes anything.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
            elif "embed" in name and "patch" not in name:
                weight.copy_(noise)
            else:
                gain = next((GAINS[part] for part in GAINS if part in name), 1.0)
                weight.copy_(noise * gain / weight[0].numel() ** 0.5)
        model.get_input_embeddings().weight[PAD] = 0
    return model.eval()


def plant(
    model: Any, dims: Sequence[int] = SINK_DIMS, words: Sequence[int] = (BOS, SINK_WORD)
) -> Any:
    """Give `model` massive activations in the channels `dims`, in place; returns it.

    BOS, SINK_WORD and the image tokens of MARKS become sinks at tau about 2.5 to 4: the strong
    ones in every layer, the weak ones only in the first. `reference.sinks` tells the rest.
    """
    last = _last_of_projector(model)
    marked = _marked_features(model, last)
    with torch.no_grad():
        for sign, channel in zip((1, -1, 1, -1), dims, strict=False):
            model.get_input_embeddings().weight[list(words), channel] = 40.0 * sign
            last.weight[channel] = sign * marked[:-1]
            last.bias[channel] = sign * marked[-1]
    return model


@torch.no_grad()
def _marked_features(model: Any, last: nn.Linear) -> Tensor:
    """[in + 1]: weight and bias that read off `last`'s input how strongly a token is marked."""
    caught: list[Tensor] = []
    handle = last.register_forward_hook(lambda module, args, output: caught.append(args[0]))
    model(**inputs(model, [[BOS, *[IMAGE] * 40]], seed=99, grids=((1, 8, 8),)))
    handle.remove()
    features = caught[0].flatten(0, -2).double()
    features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    target = torch.zeros(len(features), 1, dtype=features.dtype)
    for place, size in MARKS.items():
        target[place::16] = size
    solution: Tensor = torch.linalg.lstsq(features, target).solution
    return solution[:, 0].float()


def _last_of_projector(model: Any) -> nn.Linear:
    """The linear layer that writes image features into the decoder's channels."""
    qwen = isinstance(model, Qwen2VLForConditionalGeneration)
    last: nn.Linear = (
        model.model.visual.merger.mlp[-1] if qwen else model.model.multi_modal_projector.linear_2
    )
    return last


def float64(model: Any) -> Any:
    """A float64 copy whose norms compute in float64 too; transformers' own round to float32."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if type(module).__name__ in EXACT_NORMS:
            module.forward = MethodType(_exact_rms_norm, module)
    return exact


def _exact_rms_norm(norm: Any, x: Tensor) -> Tensor:
    weight: Tensor = norm.weight
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def inputs(
    model: Any,
    rows: Sequence[Sequence[int]] = ONE_IMAGE,
    seed: int = 1,
    grids: Sequence[tuple[int, int, int]] = ((1, 8, 8), (1, 4, 8), (1, 8, 4), (1, 8, 8)),
) -> dict[str, Tensor]:
    """A left-padded batch of `rows`, in which IMAGE stands for one whole image.

    LLaVA's images have 16 tokens; Qwen2-VL's follow `grids` in turn (t * h * w / 4 tokens) and
    get vision-start and vision-end markers around them.
    """
    qwen = isinstance(model, Qwen2VLForConditionalGeneration)
    count = sum(row.count(IMAGE) for row in map(list, rows))
    grid = torch.tensor([grids[number % len(grids)] for number in range(count)])
    sizes = iter((grid.prod(-1) // 4).tolist() if qwen else [16] * count)
    ids = _left_padded([_spread(row, sizes, qwen) for row in rows])
    found = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    generator = torch.Generator().manual_seed(seed)
    if count and qwen:
        patches = int(grid.prod(-1).sum())
        pixels = torch.randn(patches, 3 * 2 * 8 * 8, generator=generator)
        found["pixel_values"] = _marked_patches(pixels, grid)
        found["image_grid_thw"] = grid
    elif count:
        found["pixel_values"] = _marked_images(torch.randn(count, 3, 32, 32, generator=generator))
    return found | _token_types(model, ids)


def _token_types(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What Qwen2-VL is told of every token; older versions of transformers do not ask for it."""
    asked = "mm_token_type_ids" in inspect.signature(type(model).forward).parameters
    return {"mm_token_type_ids": (ids == IMAGE).int()} if asked else {}


def _marked_images(pixels: Tensor) -> Tensor:
    """LLaVA: token k is the 8 x 8 patch k of its image."""
    for place in MARKS:
        top, left = 8 * (place // 4), 8 * (place % 4)
        pixels[:, :, top : top + 8, left : left + 8] = _pattern(place, 3, 8, 8)
    return pixels


def _marked_patches(pixels: Tensor, grid: Tensor) -> Tensor:
    """Qwen2-VL: token k is the four consecutive patches from 4 k of its image."""
    starts = [0, *grid.prod(-1).cumsum(0).tolist()[:-1]]
    for place in MARKS:
        for start in starts:
            pixels[start + 4 * place : start + 4 * place + 4] = _pattern(place, 4, 384)
    return pixels


def _pattern(place: int, *shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 + place))


def _spread(row: Sequence[int], sizes: Iterator[int], markers: bool) -> list[int]:
    spread: list[int] = []
    for token in row:
        if token != IMAGE:
            spread.append(token)
        elif markers:
            spread += [VISION_START, *[IMAGE] * next(sizes), VISION_END]
        else:
            spread += [IMAGE] * next(sizes)
    return spread


def _left_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])


def single(model: Any, batch: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """Row `row` of `inputs(...)` as a batch of one without padding."""
    kept = batch["attention_mask"].bool()
    ids = [batch["input_ids"][index][kept[index]] for index in range(len(kept))]
    found = {"input_ids": ids[row][None], "attention_mask": torch.ones_like(ids[row])[None]}
    found |= _token_types(model, found["input_ids"])
    before, here = (sum(map(_images, ids[:end])) for end in (row, row + 1))
    if here == before:
        return found
    if "image_grid_thw" not in batch:
        return found | {"pixel_values": batch["pixel_values"][before:here]}
    ends = [0, *batch["image_grid_thw"].prod(-1).cumsum(0).tolist()]
    return found | {
        "pixel_values": batch["pixel_values"][ends[before] : ends[here]],
        "image_grid_thw": batch["image_grid_thw"][before:here],
    }


def samples(
    model: Any, batch: Mapping[str, Tensor], generated: Tensor | None = None, **masks: Tensor | None
) -> list[Sample]:
    """One reference sample per row of `batch`; model must be unpatched.

    generated: ids [batch, n] that follow the prompts. masks: query=, content=, image= as bool
    [batch, padded prompt], the shape in which a user gives them.
    """
    found = []
    for row, kept in enumerate(batch["attention_mask"].bool()):
        own = {name: mask[row][kept] for name, mask in masks.items() if mask is not None}
        ids = None if generated is None else generated[row]
        found.append(capture(model, single(model, batch, row), ids, **own))
    return found


def _images(ids: Tensor) -> int:
    """How many runs of placeholders ids [S] have."""
    image = (ids == IMAGE).int()
    return int((image.diff(prepend=torch.zeros(1, dtype=torch.int)) == 1).sum())

"""Every way of generating, measured against the slow reference: `python -m eval modes` prints it.

A function per way gives the largest difference of a logit for the methods of a side, or raises the
refusal. Tiny random models, float32 unless a note says otherwise.
"""

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from transformers import CompileConfig, DynamicCache, cache_utils
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import vlm_patch
from eval.support import tiny
from eval.support.agreement import (
    answer_logits,
    distance,
    generated,
    ours,
    own_forwards,
    planted,
    reference,
)
from eval.support.reference import Sample, Turn, capture, logits, trace
from eval.support.simulated_device import spread
from eval.support.tensor_parallel import errors
from vlm_patch import PatchError
from vlm_patch.engine.attention import REASON

CLOSE = 1e-5
SIDES: dict[str, tuple[str, ...]] = {
    "var": ("var",),
    "gift": ("gift",),
    "gift, map from an edited layer": ("gift-inside",),
    "vhr": ("vhr",),
    "all": ("var", "gift", "vhr"),
    "all, map from an edited layer": ("var", "gift-inside", "vhr"),
    "paint": ("paint",),
    "all and paint": ("paint", "var", "gift-inside", "vhr"),
    "pai": ("pai",),
    "vaf": ("vaf",),
    "devils": ("devils",),
    "adhh": ("adhh",),
    "mass target": ("mass-target",),
    "iat": ("iat",),
    "adaiat": ("adaiat",),
    "sparc": ("sparc",),
    "attention-side": ("pai", "vaf", "devils", "iat", "adhh", "adaiat", "mass-target"),
    "steering": ("steering",),
    "nullu": ("nullu",),
    "memvr": ("memvr",),
    "vista": ("vista",),
    "paint with its contrast": ("paint-guided",),
    "vcd": ("vcd",),
    "icd": ("icd",),
    "m3id": ("m3id",),
    "dola": ("dola",),
    "deco": ("deco",),
    "var and the logits' side": ("var", "vcd", "m3id", "dola"),
}
Names: TypeAlias = Sequence[str]
STEPS = 6
# a placeholder that is generated makes the stock model look for its image where nothing is cached
PLAIN = {"do_sample": False, "suppress_tokens": [tiny.IMAGE, tiny.VIDEO, tiny.EOS]}


@dataclass(frozen=True)
class Row:
    """What came out for one way and method; max_error None: refused, and the note says why."""

    mode: str
    method: str
    max_error: float | None
    ok: bool
    note: str


@dataclass(frozen=True)
class Mode:
    """One way of generating. measure: given the methods, how far the logits are off. known: whether
    this version of transformers has it.
    """

    name: str
    measure: Callable[[Names], float]
    note: str
    known: bool


MODES: dict[str, Mode] = {}


def mode(
    name: str, note: str = "", known: bool = True
) -> Callable[[Callable[[Names], float]], Any]:
    """Adds the function below to the ways of generating."""

    def add(measure: Callable[[Names], float]) -> Callable[[Names], float]:
        MODES[name] = Mode(name, measure, note, known)
        return measure

    return add


def measure(name: str, side: str) -> Row:
    """One row of the table."""
    found = MODES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            error = found.measure(SIDES[side])
        except PatchError as refusal:
            return Row(name, side, None, True, f"refused: {refusal}")
    return Row(name, side, error, error <= CLOSE, found.note)


# ---- models, prompts, what came out


@cache
def model_of(kind: str = "llava", **options: Any) -> Any:
    """A planted model; left unpatched between measurements."""
    return planted(kind, **options)


@cache
def exact_model() -> Any:
    return tiny.float64(model_of())


def prompt(model: Any, rows: Sequence[Sequence[int]], seed: int = 1) -> dict[str, Tensor]:
    batch = tiny.inputs(model, rows, seed)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch


def generate(model: Any, batch: Mapping[str, Any], steps: int = STEPS, **options: Any) -> Any:
    """Exactly `steps` new tokens, greedy unless `options` say otherwise."""
    return model.generate(
        **batch,
        **PLAIN | {"max_new_tokens": steps} | options,
        return_dict_in_generate=True,
        output_logits=True,
    )


def apart(model: Any, samples: Sequence[Sample], found: Tensor, names: Names) -> float:
    """How far logits `[batch, steps, V]` are from the reference's for the answers of `samples`."""
    return distance(found, answer_logits(model, samples, names))


def off(model: Any, batch: Mapping[str, Tensor], output: Any, names: Names) -> float:
    samples = tiny.samples(model, batch, generated(batch, output))
    return apart(model, samples, torch.stack(output.logits, 1), names)


def answered(
    names: Names,
    rows: Sequence[Sequence[int]] = tiny.BATCH_OF_3,
    kind: str = "llava",
    **options: Any,
) -> float:
    """The error of one call of generate with these options."""
    model = model_of(kind)
    batch = prompt(model, rows)
    with vlm_patch.wrap(model, *ours(names)):
        output = generate(model, batch, **options)
    return off(model, batch, output, names)


def call(name: str, note: str = "", **options: Any) -> None:
    """Adds a way of generating that is one call with these options of `answered`."""
    mode(name, note)(partial(answered, **options))


def forward(model: Any, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs)


# ---- choosing tokens


call("greedy", rows=tiny.ONE_IMAGE)


@mode("sampling")
def sampling(names: Names) -> float:
    torch.manual_seed(0)
    return answered(names, do_sample=True, top_k=0)


@mode("num_return_sequences")
def return_sequences(names: Names) -> float:
    model = model_of()
    batch = prompt(model, tiny.BATCH_OF_3[:2])
    torch.manual_seed(3)
    with vlm_patch.wrap(model, *ours(names)):
        output = generate(model, batch, do_sample=True, top_k=0, num_return_sequences=3)
    new, found = generated(batch, output), torch.stack(output.logits, 1)
    samples = [tiny.samples(model, batch, new[offset::3]) for offset in range(3)]
    return max(apart(model, samples[i], found[i::3], names) for i in range(3))


@mode("beams", "along the way of every returned beam")
def beams(names: Names) -> float:
    model = model_of()
    batch = prompt(model, tiny.BATCH_OF_3)
    with vlm_patch.wrap(model, *ours(names)):
        output = generate(model, batch, num_beams=3, num_return_sequences=3, output_scores=True)
    new = generated(batch, output)
    ways = output.beam_indices[:, :STEPS]
    found = torch.stack(
        [torch.stack([output.logits[i][beam] for i, beam in enumerate(way)]) for way in ways]
    )
    samples = [tiny.samples(model, batch, new[offset::3]) for offset in range(3)]
    return max(apart(model, samples[i], found[i::3], names) for i in range(3))


call(
    "guidance_scale",
    "the branch without the prompt holds no image and stays stock",
    guidance_scale=1.5,
)


def half_right(answer: Tensor, start: int) -> Callable[..., Any]:
    """What drafts, wherever an answer [n] behind `start` tokens has got to, its next two tokens and
    a wrong one.
    """

    def candidates(drafter: object, ids: Tensor, *rest: object) -> tuple[Tensor, None]:
        draft = answer[ids.shape[1] - start :][:3].clone()
        draft[2:] = draft[2:] % 50 + 30
        return torch.cat([ids, draft[None].to(ids.device)], 1), None

    return candidates


@mode("prompt lookup", "with its own drafts, and with drafts of which two in three are right")
def prompt_lookup(names: Names) -> float:
    rows = [[tiny.BOS, tiny.IMAGE, *[21, 22, 23, 24] * 3, 25, 21]]
    worst = answered(names, rows, prompt_lookup_num_tokens=4)
    model = model_of()
    batch = prompt(model, rows)
    with vlm_patch.wrap(model, *ours(names)):
        answer = generated(batch, generate(model, batch, 10))[0]
        drafts = half_right(answer, batch["input_ids"].shape[1])
        with mock.patch.object(PromptLookupCandidateGenerator, "get_candidates", drafts):
            output = generate(model, batch, 10, prompt_lookup_num_tokens=3)
    return max(worst, off(model, batch, output, names))


def drafting(model: Any) -> Any:
    """A model that drafts four tokens, however unsure it is of them."""
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@mode("assistant model", "drafts of the same model without methods, and of another one")
def assistant(names: Names) -> float:
    helpers = drafting(planted("llava")), drafting(planted("llava", seed=5))
    return max(answered(names, tiny.ONE_IMAGE, assistant_model=helper) for helper in helpers)


# ---- prompts


BEFORE = [tiny.BOS, 5, 6, 21, 22, 23, 24]

call("different lengths, left-padded")
call("several images per prompt", rows=tiny.MIXED_BATCH)
call("images of different token counts", "Qwen2-VL", rows=tiny.MIXED_BATCH, kind="qwen2-vl")
call(
    "image after text",
    "also with nothing behind it, where GIFT says that it rests",
    rows=[[*BEFORE, tiny.IMAGE], [*BEFORE, tiny.IMAGE, 25, 26]],
)


@mode("video tokens", "Qwen2-VL; PAINT chooses frame by frame")
def video(names: Names) -> float:
    model = model_of("qwen2-vl")
    pictured = prompt(model, tiny.ONE_IMAGE)
    is_video = pictured["input_ids"] == tiny.IMAGE
    batch = {
        "input_ids": pictured["input_ids"].masked_fill(is_video, tiny.VIDEO),
        "attention_mask": pictured["attention_mask"],
        "pixel_values_videos": pictured["pixel_values"],
        "video_grid_thw": pictured["image_grid_thw"],
    }
    if "mm_token_type_ids" in pictured:
        batch["mm_token_type_ids"] = 2 * is_video.int()
    with vlm_patch.wrap(model, *ours(names)):
        output = generate(model, batch)
    sample = capture(model, batch, generated(batch, output)[0], image=is_video[0])
    return apart(model, [sample], torch.stack(output.logits, 1), names)


call("text-only prompt", "runs as in the stock model, and that is said once", rows=[BEFORE])


@mode("second turn on the returned cache")
def second_turn(names: Names) -> float:
    model = model_of()
    batch = prompt(model, tiny.BATCH_OF_3)
    asked = torch.tensor([[70, 71, tiny.SINK_WORD, 72, 73]]).expand(3, -1)
    with vlm_patch.wrap(model, *ours(names)):
        first = generate(model, batch, 4)
        ids = torch.cat([first.sequences, asked], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids)], 1)[:, : ids.shape[1]]
        again = {"input_ids": ids, "attention_mask": mask}
        second = generate(model, again | {"past_key_values": first.past_key_values})
    answers, later = generated(batch, first), generated(again, second)
    fresh = torch.tensor([False] + [True] * 5)  # the answer's last token is fed with the question
    samples = [
        sample.asked(model, torch.cat([answer[-1:], question]), fresh).followed_by(model, new)
        for sample, answer, question, new in zip(
            tiny.samples(model, batch, answers[:, :-1]), answers, asked, later, strict=True
        )
    ]
    return apart(model, samples, torch.stack(second.logits, 1), names)


@mode("second turn with an image", "on the first turn's cache; vhr keeps the first turn's heads")
def second_image(names: Names) -> float:
    model = model_of()
    both = prompt(model, [[tiny.BOS, 5, tiny.IMAGE, 21, 22, 23, 60, 40, tiny.IMAGE, 41, 42, 43]])
    whole = capture(model, both)
    end = 1 + 1 + 16 + 3  # of the first turn
    query = (whole.image.cumsum(0) > 0) & ~whole.image
    after = torch.arange(whole.length) > int(whole.image.nonzero()[-1])
    turns = Turn(0, end, query[:end], query[:end]), Turn(end, whole.length, after, after)
    ids, pixels = both["input_ids"], both["pixel_values"]
    with vlm_patch.wrap(model, *ours(names)):
        first = generate(model, {"input_ids": ids[:, :end], "pixel_values": pixels[:1]}, 1)
        cache = first.past_key_values
        later = forward(
            model, input_ids=ids[:, end:], pixel_values=pixels[1:], past_key_values=cache
        )
        found = [later.logits[:, -1]]
        for token in (60, tiny.SINK_WORD):
            cache = later.past_key_values
            later = forward(model, input_ids=torch.tensor([[token]]), past_key_values=cache)
            found.append(later.logits[:, -1])
    answer = torch.tensor([60, tiny.SINK_WORD, 61])
    sample = replace(whole, turns=turns).followed_by(model, answer)
    return apart(model, [sample], torch.stack(found, 1), names)


call("second turn encoded anew", rows=[[*tiny.ONE_IMAGE[0], 60, 61, tiny.SINK_WORD, 70, 71, 72]])


# ---- caches


@mode("dynamic cache", "made by the caller")
def dynamic_cache(names: Names) -> float:
    return answered(names, past_key_values=DynamicCache(config=model_of().config))


@mode(
    "questions behind a cached image",
    "the prompt cut at the image, behind it, in the question; beams; a batch",
)
def cached_image(names: Names) -> float:
    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    end = int((batch["input_ids"][0] == tiny.IMAGE).nonzero()[-1]) + 1
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    worst = 0.0
    with vlm_patch.wrap(model, *ours(names)):
        outputs = []
        for cut in (end, end + 1, end + 3):
            read = {name: text[name][:, :cut] for name in text}
            known = forward(model, **read, pixel_values=batch["pixel_values"]).past_key_values
            for beams in (1, 3):
                mine = copy.deepcopy(known)
                mine.batch_repeat_interleave(beams)
                options = {"num_beams": beams, "num_return_sequences": beams}
                outputs.append(generate(model, text | {"past_key_values": mine}, **options))
        several = questions_at_once(model, batch, end)
    for output in outputs:
        new, ways = generated(batch, output), getattr(output, "beam_indices", None)
        found = torch.stack(output.logits, 1)
        if ways is not None:
            found = torch.stack([found[way, torch.arange(STEPS)] for way in ways[:, :STEPS]])
        for row in range(len(new)):
            samples = tiny.samples(model, batch, new[row : row + 1])
            worst = max(worst, apart(model, samples, found[row : row + 1], names))
    for row, question, output in several:
        alone = prompt(model, [[*tiny.ONE_IMAGE[0][:4], *question]])
        new, found = output.sequences[row, -STEPS:], torch.stack(output.logits, 1)
        sample = capture(model, alone, new)
        worst = max(worst, apart(model, [sample], found[row : row + 1], names))
    return worst


def questions_at_once(
    model: Any, batch: Mapping[str, Tensor], end: int
) -> list[tuple[int, list[int], Any]]:
    """Questions of different lengths, padded on their left, behind one image that is read once."""
    questions = [[21, 22, 23, 24, 25], [31, 32], [41, tiny.SINK_WORD, 43]]
    read = {name: batch[name][:, :end] for name in ("input_ids", "attention_mask")}
    cache = forward(model, **read, pixel_values=batch["pixel_values"]).past_key_values
    cache.batch_repeat_interleave(len(questions))
    padded = [[tiny.PAD] * (5 - len(question)) + question for question in questions]
    ids = torch.cat([read["input_ids"].expand(3, -1), torch.tensor(padded)], 1)
    given = {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long()}
    output = generate(model, given | {"past_key_values": cache})
    return [(row, question, output) for row, question in enumerate(questions)]


call("static cache", cache_implementation="static")


@mode("sliding window", "a window of 12 tokens; dynamic and static cache")
def sliding_window(names: Names) -> float:
    model = tiny.sliding_llava()
    batch = prompt(model, tiny.BATCH_OF_3)
    worst = 0.0
    for kind in ("dynamic", "static"):
        with vlm_patch.wrap(model, *ours(names)):
            output = generate(model, batch, cache_implementation=kind)
        worst = max(worst, off(model, batch, output, names))
    return worst


FP8_REACH = 128.0
"""Where the first prompt's largest key or value lands in the fp8 cache, in place of the format's
largest, 448: torch before 2.13 makes NaN of what a later token brings beyond that, stock model too.
"""


def fp8(states: Tensor, end: int) -> Tensor:
    """What transformers' fp8 cache gives back of keys or values [groups, S, d]: 8-bit floats, their
    scale fixed by the first prompt's."""
    kind = torch.float8_e4m3fn
    scale = states[:, :end].abs().amax().float() / FP8_REACH
    return ((states.float() / scale).to(kind).float() * scale).to(states.dtype)


@mode(
    "quantized cache (fp8)",
    "float64; the reference rounds keys and values as the cache does",
    known=hasattr(cache_utils, "Fp8QuantizedLayer"),
)
def quantized_cache(names: Names) -> float:
    model = exact_model()
    batch = prompt(model, tiny.ONE_IMAGE)
    backend = {"backend": "fp8"}
    reach = mock.patch.object(cache_utils.Fp8QuantizedLayer, "fp8_max", FP8_REACH)
    with reach, vlm_patch.wrap(model, *ours(names)):
        output = generate(model, batch, cache_implementation="quantized", cache_config=backend)
    (sample,) = tiny.samples(model, batch, generated(batch, output))
    return apart(model, [replace(sample, rounded=fp8)], torch.stack(output.logits, 1), names)


class NoStream(contextlib.nullcontext[None]):
    """A stream of a device that has none."""

    def wait_stream(self, other: object) -> None:
        pass


@mode("offloaded cache", "on the CPU, the CUDA streams replaced by none")
def offloaded_cache(names: Names) -> float:
    made: Any = DynamicCache(config=model_of().config, offloading=True)
    made.prefetch_stream = NoStream()
    # transformers asks CUDA for a stream whenever a cache is offloaded
    with mock.patch.object(torch.cuda, "default_stream", return_value=NoStream()):
        return answered(names, past_key_values=made)


call("use_cache=False", use_cache=False)


@mode("chunked prefill", "chunks of 8 and of 5 tokens", known=tiny.FEATURES)
def chunked(names: Names) -> float:
    return max(answered(names, tiny.MIXED_BATCH, prefill_chunk_size=size) for size in (8, 5))


# ---- ways in


@mode("raw forward", "a loop of one's own on a padded batch")
def raw_forward(names: Names) -> float:
    model = model_of()
    batch = prompt(model, tiny.BATCH_OF_3)
    mask = batch["attention_mask"]
    answer = torch.tensor([[60, tiny.SINK_WORD, 61], [62, 63, 64], [tiny.SINK_WORD, 65, 66]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with vlm_patch.wrap(model, *ours(names)):
        output = forward(model, **batch, position_ids=positions)
        found = [output.logits[:, -1]]
        for step in answer.T[:, :, None]:
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            output = forward(
                model,
                input_ids=step,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=output.past_key_values,
            )
            found.append(output.logits[:, -1])
    samples = tiny.samples(model, batch, answer)
    expected = [logits(model, one, reference(names))[one.turns[0].end - 1 :] for one in samples]
    return distance(torch.stack(found, 1), torch.stack(expected))


@mode("inputs_embeds", "with masks given by hand; PAINT needs the pixels")
def inputs_embeds(names: Names) -> float:
    model = model_of()
    sample = capture(model, prompt(model, tiny.ONE_IMAGE))
    embeds = sample.embeds[None].to(model.dtype)
    given = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2]).long()}
    masks = {"image": sample.image[None], "query": sample.turns[0].query[None]}
    with vlm_patch.wrap(model, *ours(names)) as patch, patch.prompt(**masks):
        output = generate(model, given)
    answer = sample.followed_by(model, output.sequences[0])
    return apart(model, [answer], torch.stack(output.logits, 1), names)


@mode('pipeline("image-text-to-text")')
def through_a_pipeline(names: Names) -> float:
    from PIL import Image
    from transformers import pipeline

    model, processor = planted("llava"), tiny.processor()
    content = [
        {"type": "image", "image": Image.effect_noise((32, 32), 80).convert("RGB")},
        {"type": "text", "text": "Is there a dog in the image?"},
    ]
    pixels: list[Tensor] = []
    tower = model.model.vision_tower
    tower.register_forward_pre_hook(lambda _, args, kw: pixels.extend(args), with_kwargs=True)
    ask: Any = pipeline("image-text-to-text", model=model, processor=processor)
    options = PLAIN | {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    with vlm_patch.wrap(model, *ours(names)), own_forwards(model) as seen:
        ask(text=[{"role": "user", "content": content}], generate_kwargs=options)
    found = torch.stack([said.logits[:, -1] for _, said in seen], 1)
    given = [step["input_ids"] for step, _ in seen]
    new = torch.cat([*(ids[0] for ids in given[1:]), torch.tensor([0])])
    inputs = {"input_ids": given[0], "pixel_values": pixels[0]}
    return apart(model, [capture(model, inputs, new)], found, names)


@mode("output_attentions", "eager; also the edited weights themselves")
def output_attentions(names: Names) -> float:
    model = model_of(attn="eager")
    batch = prompt(model, tiny.BATCH_OF_3)
    with vlm_patch.wrap(model, *ours(names)):
        output = generate(model, batch, 3, output_attentions=True)
    worst = off(model, batch, output, names)
    for row, sample in enumerate(tiny.samples(model, batch, generated(batch, output))):
        expected = trace(model, sample, reference(names)).run.weights
        for layer, weights in enumerate(expected):
            start = sample.turns[0].end
            found = output.attentions[0][layer][row, :, -start:, -start:]
            worst = max(worst, float((found - weights[:, :start, :start]).abs().max()))
            for step, shown in enumerate(output.attentions[1:]):
                end = start + step + 1
                found = shown[layer][row, :, 0, -end:]
                worst = max(worst, float((found - weights[:, end - 1, :end]).abs().max()))
    return worst


# ---- around the model


@mode("gradient checkpointing in training", "logits, and gradients as without checkpointing")
def gradient_checkpointing(names: Names) -> float:
    model = planted("llava").train()
    batch = prompt(model, tiny.ONE_IMAGE)
    runs = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with vlm_patch.wrap(model, *ours(names)):
            output = model(**batch, use_cache=False).logits
            output.square().mean().backward()
        decoder = model.model.language_model
        runs.append((output.detach(), [p.grad.clone() for p in decoder.layers.parameters()]))
        model.zero_grad()
    (sample,) = tiny.samples(model, batch)
    expected = logits(model, sample, reference(names))
    errors = [distance(found[0], expected) for found, _ in runs]
    errors += [
        float((one - other).abs().max())
        for _, gradients in runs[1:]
        for one, other in zip(runs[0][1], gradients, strict=True)
    ]
    return max(errors)


@mode("torch.compile", 'backend "eager", a static cache')
def compiled(names: Names) -> float:
    model = planted("llava")
    batch = prompt(model, tiny.BATCH_OF_3)
    plain = model.forward
    with vlm_patch.wrap(model, *ours(names)):
        torch.compiler.reset()  # what was compiled for another model passes by hooks of this one
        model.forward = torch.compile(plain, backend="eager")
        output = generate(model, batch, 4, cache_implementation="static")
    model.forward = plain
    return off(model, batch, output, names)


@mode("compiled, fullgraph", "the steps of generate traced whole, a static cache")
def compiled_whole(names: Names) -> float:
    model, config = planted("llava"), CompileConfig(fullgraph=True, backend="eager")
    config.mode, config._compile_all_devices = None, True  # type: ignore[assignment]
    batch = prompt(model, tiny.BATCH_OF_3)
    with vlm_patch.wrap(model, *ours(names)):
        torch.compiler.reset()
        try:
            output = generate(model, batch, cache_implementation="static", compile_config=config)
        except Unsupported as error:
            raise PatchError(REASON) from error
    return off(model, batch, output, names)


@mode("layers on two devices", "the second one simulated: its tensors may not meet the CPU's")
def two_devices(names: Names) -> float:
    worst, stock = 0.0, model_of()
    for far in (range(1, 3), range(2, 4)):
        model = planted("llava")
        batch = prompt(model, tiny.BATCH_OF_3)
        with spread(model, far), vlm_patch.wrap(model, *ours(names)):
            output = generate(model, batch, 4)
        worst = max(worst, off(stock, batch, output, names))
    return worst


@mode("accelerate cpu offload", "wrapped before and after")
def cpu_offload(names: Names) -> float:
    import accelerate

    worst, stock = 0.0, model_of()
    for first in (True, False):
        model = planted("llava")
        batch = prompt(model, tiny.BATCH_OF_3)
        if first:
            accelerate.cpu_offload(model)
        with vlm_patch.wrap(model, *ours(names)):
            if not first:
                accelerate.cpu_offload(model)
            output = generate(model, batch, 4)
        worst = max(worst, off(stock, batch, output, names))
    return worst


@cache
def in_two_processes() -> dict[str, float]:
    """The errors of every side, of some heads switched off, and of other semantics, by name; one
    start of the processes serves all."""
    table = torch.tensor([[True, False, False, True], [False, True, True, True]]).repeat(2, 1)
    table[3] = False
    heads = {"var": table, "vhr": table & (torch.arange(4) > 0)[:, None]}
    heads["gift"] = table & (torch.arange(4) == 2)[:, None]
    jobs: dict[str, Any] = {side: (names, None) for side, names in SIDES.items()}
    jobs["some heads"] = (SIDES["all"], heads)
    across = table & (torch.arange(4) > 0)[:, None]  # heads that are off count in means and gates
    jobs["some heads, all compared"] = (("devils", "adaiat"), {"devils": across, "adaiat": across})
    jobs["other semantics"] = (("gift-one-head", "var-release", "vhr-paper"), None)
    return errors(jobs)


@mode("tensor parallel", 'tp_plan="auto" under torchrun: 2 processes on the CPU (gloo)')
def tensor_parallel(names: Names) -> float:
    return in_two_processes()[next(side for side in SIDES if SIDES[side] == names)]


@mode("two models at once", "LLaVA and Qwen2-VL, one wrapped inside the other's block")
def two_models(names: Names) -> float:
    models = model_of(), model_of("qwen2-vl")
    batches = [prompt(model, tiny.BATCH_OF_3) for model in models]
    with vlm_patch.wrap(models[0], *ours(names)), vlm_patch.wrap(models[1], *ours(names)):
        pairs = zip(models, batches, strict=True)
        outputs = [generate(model, batch) for model, batch in pairs]
    return max(off(*three, names) for three in zip(models, batches, outputs, strict=True))


@mode("two threads on one model")
def two_threads(names: Names) -> float:
    model = model_of()
    batches = [prompt(model, tiny.ONE_IMAGE), prompt(model, tiny.BATCH_OF_3, seed=4)]
    start = threading.Barrier(2)
    outputs: dict[int, list[Any]] = {0: [], 1: []}

    def work(which: int) -> None:
        start.wait()
        for _ in range(2):
            outputs[which].append(generate(model, batches[which]))

    with vlm_patch.wrap(model, *ours(names)):
        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    pairs = [(batches[which], output) for which in range(2) for output in outputs[which]]
    assert len(pairs) == 4, "a thread failed"
    return max(off(model, batch, output, names) for batch, output in pairs)


@mode("interleaved generations", "two caches, their steps in turn")
def interleaved(names: Names) -> float:
    model = model_of()
    prompts = [prompt(model, tiny.ONE_IMAGE), prompt(model, tiny.TWO_IMAGES, seed=5)]
    answers = [torch.tensor([60, tiny.SINK_WORD, 61]), torch.tensor([62, 63, 64])]
    with vlm_patch.wrap(model, *ours(names)):
        outputs = [forward(model, **one) for one in prompts]
        found = [[output.logits[0, -1]] for output in outputs]
        for step in range(3):
            for which in (1, 0):
                outputs[which] = forward(
                    model,
                    input_ids=answers[which][step].view(1, 1),
                    past_key_values=outputs[which].past_key_values,
                )
                found[which].append(outputs[which].logits[0, -1])
    worst = 0.0
    for batch, answer, steps in zip(prompts, answers, found, strict=True):
        (sample,) = tiny.samples(model, batch, answer[None])
        expected = logits(model, sample, reference(names))[sample.turns[0].end - 1 :]
        worst = max(worst, distance(torch.stack(steps), expected))
    return worst

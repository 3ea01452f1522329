"""Ways of generating: every one gives what the reference gives on the tokens that came out."""

import copy
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import vlm_patch
from eval.support import tiny
from eval.support.agreement import DIMS, TAU, answer_logits, generated, ours, planted, reference
from eval.support.reference import Turn, capture, logits, trace
from tests.support.agreement import NO_PROCESSOR, error, generate
from vlm_patch import GIFT, VAR, VHR, PatchError

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)
ALL = ("var", "gift", "vhr")
LATE = ("var", "gift-inside", "vhr")
EXACT = 1e-10
NO_IMAGE = [tiny.BOS, 5, 6, 21, 22, 23, 24]


@cache
def model_of(kind: str = "llava") -> nn.Module:
    return tiny.float64(planted(kind))


def batch_of(model: nn.Module, rows: Sequence[Sequence[int]], seed: int = 1) -> dict[str, Tensor]:
    if rows == [NO_IMAGE]:
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = tiny.inputs(model, rows, seed)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch


@pytest.fixture(params=["llava", "qwen2-vl"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return model_of(request.param)


@pytest.fixture(params=[ALL, LATE], ids="+".join)
def names(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


# ---- sampling, return sequences, beams


def test_sampling(model: nn.Module, names: tuple[str, ...]) -> None:
    """The logits are right on whatever tokens are drawn, and the seed alone decides those."""
    batch = batch_of(model, tiny.BATCH_OF_3)
    with vlm_patch.wrap(model, *ours(names)):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(generate(model, batch, do_sample=True, top_k=0))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert not torch.equal(drawn[0].sequences, drawn[2].sequences)
    for output in drawn[1:]:
        assert error(model, batch, output, names) <= EXACT


def test_return_sequences(model: nn.Module, names: tuple[str, ...]) -> None:
    """Three sequences of each of two prompts; masks by hand are repeated like the prompts."""
    batch = batch_of(model, tiny.BATCH_OF_3[:2])
    query = (batch["input_ids"] >= 20) & (batch["input_ids"] < 38)
    torch.manual_seed(3)
    with vlm_patch.wrap(model, *ours(names)) as patch, patch.prompt(query=query):
        output = generate(model, batch, do_sample=True, top_k=0, num_return_sequences=3)
    new = generated(batch, output)
    assert len({tuple(row) for row in new.tolist()}) == 6
    found = torch.stack(output.logits, 1)
    for offset in range(3):
        samples = tiny.samples(model, batch, new[offset::3], query=query)
        expected = answer_logits(model, samples, names)
        torch.testing.assert_close(found[offset::3], expected, rtol=0, atol=EXACT)


def sequence_scores(model: nn.Module, batch: Any, new: Tensor, names: Sequence[str]) -> Tensor:
    """The reference's sum of log probabilities `[batch, steps]` of given answers."""
    samples = tiny.samples(model, batch, new)
    predicted = answer_logits(model, samples, names).log_softmax(-1)
    return predicted.gather(2, new[..., None])[..., 0].sum(1)


@pytest.mark.parametrize("kept", [1, 3])
def test_beams(model: nn.Module, names: tuple[str, ...], kept: int) -> None:
    """The score of every returned beam is what the reference gives its tokens."""
    batch = batch_of(model, tiny.BATCH_OF_3)
    with vlm_patch.wrap(model, *ours(names)):
        output = generate(
            model,
            batch,
            num_beams=3,
            num_return_sequences=kept,
            output_scores=True,
            length_penalty=0.0,
        )
    new = generated(batch, output)
    assert (output.beam_indices[:, :8] % 3 != 0).any()
    for offset in range(kept):
        expected = sequence_scores(model, batch, new[offset::kept], names)
        found = output.sequences_scores[offset::kept].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class SinkWordFirst:
    """A logits processor that makes beams differ early, with the sink word in one of them."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, tiny.SINK_WORD] = scores.max(-1).values - 0.01
        return scores


def test_sink_flags_of_new_tokens_follow_their_beams() -> None:
    """Beams with and without the sink word are reordered; each is scored by its own tokens."""
    model, names = model_of("llava"), ("var",)
    batch = batch_of(model, tiny.BATCH_OF_3)
    with vlm_patch.wrap(model, *ours(names)):
        output = generate(
            model,
            batch,
            num_beams=4,
            num_return_sequences=4,
            logits_processor=[SinkWordFirst()],
        )
    new = generated(batch, output)
    with_sink = (new == tiny.SINK_WORD).sum(1)
    assert len(set(with_sink.tolist())) > 2
    beams = output.beam_indices[:, :8]
    assert (beams[:, 1:] != beams[:, :-1]).any()
    found = torch.stack(output.logits, 1)
    for offset in range(4):
        samples = tiny.samples(model, batch, new[offset::4])
        expected = answer_logits(model, samples, names)
        for row in range(3):
            places = beams[row * 4 + offset]
            for step, beam in enumerate(places.tolist()):
                torch.testing.assert_close(
                    found[beam, step], expected[row, step], rtol=0, atol=EXACT
                )


def test_the_sink_word_is_a_sink_once_generated() -> None:
    """What the test above relies on: its flag changes the logits behind it."""
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    answer = torch.tensor([[60, tiny.SINK_WORD, 61, 62]])
    (sample,) = tiny.samples(model, batch, answer)
    paper, release = (trace(model, sample, reference([name])) for name in ("var", "var-release"))
    place = sample.turns[0].end + 1
    assert paper.sinks[2][place]
    assert not release.sinks[2][place]


# ---- turns


def second_turn(model: nn.Module, batch: dict[str, Tensor], output: Any, ids: Tensor) -> Any:
    """The prompt of the next turn: everything so far and `ids` `[batch, n]`."""
    sequence = torch.cat([output.sequences, ids], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(sequence)], 1)
    again = {"input_ids": sequence, "attention_mask": mask[:, : sequence.shape[1]]}
    return again | {"past_key_values": output.past_key_values}


TURNS = [ALL, LATE, ("var-release", "gift-one-head", "vhr-paper"), ("gift-inside", "var")]


@pytest.mark.parametrize("names", TURNS, ids="+".join)
def test_a_second_turn_on_the_returned_cache(model: nn.Module, names: tuple[str, ...]) -> None:
    """Settled item 8: VHR's heads and VAR's flags are kept, GIFT reads a new map."""
    batch = batch_of(model, tiny.BATCH_OF_3)
    asked = torch.tensor([[70, 71, tiny.SINK_WORD, 72, 73]]).expand(3, -1)
    with vlm_patch.wrap(model, *ours(names)):
        first = generate(model, batch, steps=4)
        again = second_turn(model, batch, first, asked)
        second = generate(model, again, steps=4)
    assert error(model, batch, first, names) <= EXACT
    answers, later = generated(batch, first), generated(again, second)
    fresh = torch.tensor([False] + [True] * 5)  # the answer's last token is fed with the question
    samples = [
        sample.asked(model, torch.cat([answer[-1:], question]), query=fresh).followed_by(model, new)
        for sample, answer, question, new in zip(
            tiny.samples(model, batch, answers[:, :-1]), answers, asked, later, strict=True
        )
    ]
    found = torch.stack(second.logits, 1)
    expected = answer_logits(model, samples, names)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def test_a_second_turn_without_a_question_in_one_row() -> None:
    """Which rows are edited is settled anew: GIFT rests in that row, and acts in the other."""
    model, names = model_of("llava"), ("gift",)
    batch = batch_of(model, tiny.BATCH_OF_3[:2])
    asked = torch.tensor([[70, 71, 72]]).expand(2, -1)
    with vlm_patch.wrap(model, *ours(names)) as patch:
        first = generate(model, batch, steps=3)
        again = second_turn(model, batch, first, asked)
        query = torch.zeros_like(again["input_ids"], dtype=torch.bool)
        query[1, -2:] = True
        with patch.prompt(query=query), pytest.warns(UserWarning, match="GIFT leaves 1 of 2"):
            second = generate(model, again, steps=4)
    answers, later = generated(batch, first), generated(again, second)
    samples = tiny.samples(model, batch, answers[:, :-1])
    for row, sample in enumerate(samples):
        fed = torch.cat([answers[row, -1:], asked[row]])
        longer = sample.asked(model, fed, query=query[row, -4:]).followed_by(model, later[row])
        expected = answer_logits(model, [longer], names)[0]
        found = torch.stack(second.logits, 1)[row]
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("names", TURNS, ids="+".join)
def test_a_second_turn_with_an_image_of_its_own(names: tuple[str, ...]) -> None:
    """One joint map over all images; the question is the text behind the newest."""
    model = model_of("llava")
    both = batch_of(model, [[tiny.BOS, 5, tiny.IMAGE, 21, 22, 23, 60, 40, tiny.IMAGE, 41, 42, 43]])
    ids, pixels = both["input_ids"], both["pixel_values"]
    end = 1 + 1 + 16 + 3
    whole = capture(model, both)
    query = whole.image.cumsum(0) > 0
    query &= ~whole.image
    first = Turn(0, end, query[:end], query[:end])
    after = torch.arange(whole.length) > int(whole.image.nonzero()[-1])
    sample = replace(whole, turns=(first, Turn(end, whole.length, after, after)))
    with vlm_patch.wrap(model, *ours(names)):
        before = forward(model, input_ids=ids[:, :end], pixel_values=pixels[:1])
        later = forward(
            model,
            input_ids=ids[:, end:],
            pixel_values=pixels[1:],
            past_key_values=before.past_key_values,
        )
    found = torch.cat([before.logits[0], later.logits[0]])
    expected = logits(model, sample, reference(names))
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


# ---- raw forwards


def forward(model: nn.Module, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs)


def steps_of(batch: Mapping[str, Tensor], cache: Any, length: int) -> dict[str, Tensor]:
    """What a step of a padded batch needs beside its tokens."""
    mask = torch.cat(
        [
            batch["attention_mask"],
            batch["attention_mask"].new_ones(len(batch["input_ids"]), length),
        ],
        1,
    )
    position = mask.sum(1, keepdim=True) - 1
    return {"attention_mask": mask, "past_key_values": cache, "position_ids": position}


def padded_prompt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return batch | {"position_ids": positions}


ANSWER = torch.tensor([[60, tiny.SINK_WORD, 61], [62, 63, 64], [tiny.SINK_WORD, 65, 66]])


@pytest.mark.parametrize("own_cache", [True, False])
def test_raw_forwards_with_a_cache(names: tuple[str, ...], own_cache: bool) -> None:
    """A loop of one's own, on a cache given or on the one that the model returns."""
    model = model_of("llava")
    batch = batch_of(model, tiny.BATCH_OF_3)
    given = {"past_key_values": DynamicCache(config=model.config)} if own_cache else {}
    with vlm_patch.wrap(model, *ours(names)):
        output = forward(model, **padded_prompt(batch), **given)
        found, cache = [output.logits[:, -1]], output.past_key_values
        for step in range(3):
            position = steps_of(batch, cache, step + 1)
            output = forward(model, input_ids=ANSWER[:, step : step + 1], **position)
            found.append(output.logits[:, -1])
    samples = tiny.samples(model, batch, ANSWER)
    for row, sample in enumerate(samples):
        expected = logits(model, sample, reference(names))[sample.turns[0].end - 1 :]
        steps = torch.stack(found, 1)[row]
        torch.testing.assert_close(steps, expected, rtol=0, atol=EXACT)


def test_raw_forward_without_a_cache(model: nn.Module, names: tuple[str, ...]) -> None:
    batch = batch_of(model, tiny.ONE_IMAGE)
    with vlm_patch.wrap(model, *ours(names)):
        output = forward(model, **batch, use_cache=False)
    assert output.past_key_values is None
    (sample,) = tiny.samples(model, batch)
    expected = logits(model, sample, reference(names))
    torch.testing.assert_close(output.logits[0], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("names", [LATE, ("gift-inside",)], ids="+".join)
def test_all_logits_and_hidden_states_of_a_prompt_that_runs_in_two_pieces(
    names: tuple[str, ...],
) -> None:
    """GIFT may run the last token as a step of its own; what comes back covers every row."""
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    (sample,) = tiny.samples(model, batch)
    with vlm_patch.wrap(model, *ours(names)):
        output = forward(model, **batch, output_hidden_states=True)
    seen = trace(model, sample, reference(names))
    assert output.past_key_values.get_seq_length() == sample.length
    torch.testing.assert_close(output.logits[0], seen.run.logits, rtol=0, atol=EXACT)
    for ours_, theirs in zip(output.hidden_states, seen.run.block_inputs, strict=False):
        torch.testing.assert_close(ours_[0], theirs, rtol=0, atol=EXACT)


# ---- prompts without an image


def test_a_text_only_prompt_is_stock_and_says_so_once(model: nn.Module) -> None:
    batch = batch_of(model, [NO_IMAGE])
    stock = generate(model, batch)
    with vlm_patch.wrap(model, *ours(["var", "vhr"])), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            output = generate(model, batch)
            assert torch.equal(output.sequences, stock.sequences)
            assert torch.equal(torch.stack(output.logits), torch.stack(stock.logits))
    messages = [str(warning.message) for warning in said]
    assert messages == ["1 of 1 prompts hold no image: they run as in the stock model."]


def test_a_row_without_an_image_is_left_stock(model: nn.Module, names: tuple[str, ...]) -> None:
    batch = batch_of(model, [*tiny.BATCH_OF_3[:2], NO_IMAGE])
    with (
        pytest.warns(UserWarning, match="1 of 3 prompts hold no image"),
        vlm_patch.wrap(model, *ours(names)),
    ):
        output = generate(model, batch)
    assert error(model, batch, output, names) <= EXACT
    stock = generate(model, batch)
    rows = torch.stack(output.logits, 1), torch.stack(stock.logits, 1)
    if "vhr" in names:  # its second prompt makes the first products larger, which rounds otherwise
        assert (rows[0][2] - rows[1][2]).abs().max() <= EXACT
    else:
        assert torch.equal(rows[0][2], rows[1][2])
    assert not torch.equal(rows[0][0], rows[1][0])


# ---- nothing leaks


def test_state_never_leaks(model: nn.Module, names: tuple[str, ...]) -> None:
    """a, b, a: the second a is the first; also with a batch and a text-only prompt between."""
    a = batch_of(model, tiny.ONE_IMAGE)
    others = [
        batch_of(model, tiny.TWO_IMAGES, seed=5),
        batch_of(model, tiny.BATCH_OF_3, seed=6),
        batch_of(model, [NO_IMAGE]),
    ]
    with vlm_patch.wrap(model, *ours(names)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = generate(model, a)
        for other in others:
            generate(model, other)
            again = generate(model, a)
            assert torch.equal(torch.stack(again.logits), torch.stack(first.logits))
    assert error(model, a, first, names) <= EXACT


def test_interleaved_generations_do_not_mix(names: tuple[str, ...]) -> None:
    """Two prompts, their steps in turn, each on its own cache."""
    model = model_of("llava")
    prompts = [batch_of(model, tiny.ONE_IMAGE), batch_of(model, tiny.TWO_IMAGES, seed=5)]
    answers = [torch.tensor([60, tiny.SINK_WORD, 61]), torch.tensor([62, 63, 64])]
    found: list[list[Tensor]] = []
    with vlm_patch.wrap(model, *ours(names)):
        outputs = [forward(model, **prompt) for prompt in prompts]
        found = [[output.logits[0, -1]] for output in outputs]
        caches = [output.past_key_values for output in outputs]
        for step in range(3):
            for which in (1, 0):
                token = answers[which][step].view(1, 1)
                output = forward(model, input_ids=token, past_key_values=caches[which])
                found[which].append(output.logits[0, -1])
    for which in range(2):
        (sample,) = tiny.samples(model, prompts[which], answers[which][None])
        expected = logits(model, sample, reference(names))[sample.turns[0].end - 1 :]
        torch.testing.assert_close(torch.stack(found[which]), expected, rtol=0, atol=EXACT)


def step(model: nn.Module, cache: Any, token: int) -> Tensor:
    """Logits `[V]` after one more token on a cache with one sample."""
    return forward(model, input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]


def expected_after(model: nn.Module, batch: Any, answer: list[int], names: Sequence[str]) -> Tensor:
    (sample,) = tiny.samples(model, batch, torch.tensor([answer]))
    return logits(model, sample, reference(names))[-1]


def test_a_copied_cache_is_a_generation_of_its_own(names: tuple[str, ...]) -> None:
    """Fork after two tokens, go on with different ones in turn."""
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    forks = [[60, 61, tiny.SINK_WORD, 62, 63], [60, 61, 64, 65, tiny.SINK_WORD, 66]]
    with vlm_patch.wrap(model, *ours(names)):
        cache = forward(model, **batch).past_key_values
        for token in (60, 61):
            step(model, cache, token)
        caches = [cache, copy.deepcopy(cache)]
        found: list[Tensor] = [torch.empty(0)] * 2
        for place in range(2, 6):
            for which, fork in enumerate(forks):
                if place < len(fork):
                    found[which] = step(model, caches[which], fork[place])
    for which, fork in enumerate(forks):
        expected = expected_after(model, batch, fork, names)
        torch.testing.assert_close(found[which], expected, rtol=0, atol=EXACT)


def test_tokens_cropped_from_the_cache_are_forgotten(names: tuple[str, ...]) -> None:
    """The sink flags of rejected tokens go with them."""
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    with vlm_patch.wrap(model, *ours(names)):
        cache = forward(model, **batch).past_key_values
        for token in (60, tiny.SINK_WORD, tiny.SINK_WORD, 61):
            step(model, cache, token)
        cache.crop(-3)
        for token in (62, 63, 64):
            found = step(model, cache, token)
    expected = expected_after(model, batch, [60, 62, 63, 64], names)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def test_two_threads_at_once(names: tuple[str, ...]) -> None:
    model = model_of("llava")
    batches = [batch_of(model, tiny.ONE_IMAGE), batch_of(model, tiny.BATCH_OF_3, seed=4)]
    with vlm_patch.wrap(model, *ours(names)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [torch.stack(generate_logits(model, batch)) for batch in batches]
        start = threading.Barrier(2)
        found: list[list[Tensor]] = [[], []]

        def work(which: int) -> None:
            start.wait()
            for _ in range(3):
                found[which].append(torch.stack(generate_logits(model, batches[which])))

        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for which in range(2):
        assert len(found[which]) == 3
        assert all(torch.equal(result, alone[which]) for result in found[which])


def generate_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """`generate` without the hook on the head, which threads would share."""
    return model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits


class Stop(Exception):
    pass


class StopAfter:
    """A logits processor that raises at its `count`-th call."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise Stop
        return scores


def test_an_exception_in_the_middle_leaves_nothing_behind(names: tuple[str, ...]) -> None:
    model = model_of("llava")
    batch = batch_of(model, tiny.BATCH_OF_3)
    with vlm_patch.wrap(model, *ours(names)):
        for count in (1, 3):
            with pytest.raises(Stop):
                generate(
                    model, batch_of(model, tiny.TWO_IMAGES), logits_processor=[StopAfter(count)]
                )
        assert error_under_patch(model, batch, names) <= EXACT


def error_under_patch(model: nn.Module, batch: dict[str, Tensor], names: Sequence[str]) -> float:
    """As `error`, of a generation now, with a stock twin for the reference."""
    output = generate(model, batch)
    return error(planted_twin(), batch, output, names)


@cache
def planted_twin() -> nn.Module:
    return tiny.float64(planted("llava"))


@pytest.mark.parametrize("layer", [0, 2])
def test_an_exception_inside_a_layer_leaves_nothing_behind(
    names: tuple[str, ...], layer: int
) -> None:
    """In the image-ablated forward, GIFT's first pass, or the prefill: whatever runs first."""
    model = model_of("llava")
    batch = batch_of(model, tiny.BATCH_OF_3)
    block = model.model.language_model.layers[layer]
    for calls in (1, 2, 3):
        left = [calls]

        def stop(module: nn.Module, args: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise Stop

        with vlm_patch.wrap(model, *ours(names)):
            handle = block.mlp.register_forward_pre_hook(stop)
            with pytest.raises(Stop):
                generate(model, batch)
            handle.remove()
            assert error_under_patch(model, batch, names) <= EXACT
    assert torch.equal(generate(model, batch).sequences, generate(planted_twin(), batch).sequences)


# ---- what cannot be right is refused


def test_a_cache_that_the_patch_did_not_fill() -> None:
    model = model_of("llava")
    stock = generate(model, batch_of(model, tiny.ONE_IMAGE))
    with (
        vlm_patch.wrap(model, *ours(ALL)),
        pytest.raises(PatchError, match="the cache holds 32 tokens that this patch did not see"),
    ):
        forward(model, input_ids=ANSWER[:1, :1], past_key_values=stock.past_key_values)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (VAR(tau=TAU, dims=DIMS), "var is on.*was off.*the first 25 tokens"),
        (GIFT(3.0, saliency_layer=1, layers=(2, 3)), "gift is on, but was off"),
        (VHR(layers=(1, 2)), "vhr is on in layer 1, but chose no heads there"),
    ],
    ids=["var", "gift", "vhr"],
)
def test_a_method_switched_on_after_the_prompt(method: Any, message: str) -> None:
    model = model_of("llava")
    names = {"var": VHR(layers=(3,)), "gift": VHR(layers=(3,)), "vhr": VAR(tau=TAU, dims=DIMS)}
    with vlm_patch.wrap(model, names[method.name], method) as patch:
        with patch.disabled(method.name):
            output = forward(model, **batch_of(model, tiny.ONE_IMAGE))
        with pytest.raises(PatchError, match=message):
            forward(model, input_ids=ANSWER[:1, :1], past_key_values=output.past_key_values)


def test_right_padding() -> None:
    model = model_of("llava")
    batch = batch_of(model, tiny.BATCH_OF_3[:1])
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.zeros(1, 2, dtype=torch.long)], 1)
    batch["attention_mask"] = (batch["input_ids"] != tiny.PAD).long()
    with (
        vlm_patch.wrap(model, *ours(ALL)),
        pytest.raises(PatchError, match="found right padding, expected left padding"),
    ):
        forward(model, **batch)


def cases_of_masks() -> Iterator[tuple[Tensor, str]]:
    yield torch.ones(1, 25), r"query mask: found torch.float32 of shape \(1, 25\), expected bool"
    yield torch.ones(25, dtype=torch.bool), r"query mask: found torch.bool of shape \(25,\)"
    yield torch.ones(1, 24, dtype=torch.bool), "but the prompt is 25 tokens long"
    yield torch.ones(2, 25, dtype=torch.bool), "in a batch of 1"


@pytest.mark.parametrize(("mask", "message"), list(cases_of_masks()))
def test_a_mask_that_does_not_fit(mask: Tensor, message: str) -> None:
    model = model_of("llava")
    with (
        vlm_patch.wrap(model, *ours(["gift"])) as patch,
        patch.prompt(query=mask),
        pytest.raises(PatchError, match=message),
    ):
        forward(model, **batch_of(model, tiny.ONE_IMAGE))


def test_embeddings_instead_of_tokens() -> None:
    """Image tokens cannot be told from embeddings; with a mask by hand they can."""
    model = model_of("llava")
    batch = batch_of(model, tiny.ONE_IMAGE)
    sample = capture(model, batch)
    embeds = sample.embeds[None]
    with vlm_patch.wrap(model, *ours(ALL)) as patch:
        with pytest.raises(PatchError, match=r"called with inputs_embeds.*patch\.prompt\(image="):
            forward(model, inputs_embeds=embeds)
        with patch.prompt(image=sample.image[None], query=sample.turns[0].query[None]):
            output = forward(model, inputs_embeds=embeds)
    expected = logits(model, sample, reference(ALL))
    torch.testing.assert_close(output.logits[0], expected, rtol=0, atol=EXACT)


def test_gradients_behind_an_inference_mode() -> None:
    """What was made once for a device must not be a tensor that autograd refuses."""
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with vlm_patch.wrap(model, VAR(tau=TAU, dims=DIMS, move_fraction=0.37)):
        with torch.inference_mode():
            expected = model(**batch).logits
            model.generate(**batch, max_new_tokens=2)
        found = model(**batch, use_cache=False).logits
        found.sum().backward()
    torch.testing.assert_close(found, expected)
    assert all(p.grad.isfinite().all() for p in model.model.language_model.layers.parameters())

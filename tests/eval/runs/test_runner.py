"""Run folders: what they hold, how a run goes on, and what is refused."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.errors import EvalError
from eval.reports import table
from eval.runs import folder, generate, runner, workers
from eval.runs.config import Config
from eval.runs.folder import RunFolder, row_key
from eval.runs.samples import Sample
from tests.eval.conftest import Settings

GIFT = {"methods": ["gift"], "gift": {"alpha": 3.0, "saliency_layer": 1, "layers": [2, 3]}}
Models = tuple[Any, Any]


@pytest.fixture(scope="session")
def loaded(checkpoint: Path) -> Models:
    config = Config(model=str(checkpoint), dtype="float32", device="cpu")
    return generate.load_model(config)


@pytest.fixture
def finished(settings: Settings, loaded: Models, tmp_path: Path) -> Path:
    """The folder of a complete run."""
    runner.run(settings(), tmp_path / "done", load=lambda _: loaded)
    return tmp_path / "done"


def stopping_after(batches: int) -> Callable[..., Any]:
    """generate.ask that is interrupted by the user."""
    whole, asked = generate.ask, itertools.count()

    def ask(*arguments: Any) -> Any:
        if next(asked) == batches:
            raise KeyboardInterrupt
        return whole(*arguments)

    return ask


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_all_that_is_needed(finished: Path, settings: Settings) -> None:
    record = yaml.safe_load((finished / "config.yaml").read_text())
    assert record["settings"] == settings().settings()
    assert record["data"]["samples"] == 5 + 3 * 3 * 2
    (environment,) = record["environments"]
    assert environment["device"] == "cpu"
    assert {"python", "torch", "transformers", "vlm-patch", "commit"} <= environment.keys()
    rows = lines(finished)
    assert len(rows) == record["data"]["samples"]
    caption = next(row for row in rows if row["task"] == "chair")
    assert [*caption] == [
        *("task", "split", "id", "image", "prompt", "answer", "tokens", "ended"),
        *("image_id", "truth"),
    ]
    question = next(row for row in rows if row["task"] == "pope")
    assert (question["split"], question["prompt"][:10]) == ("test", "Is there a")
    assert question["label"] in ("yes", "no")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["answered"] == metrics["samples"] == 23
    assert metrics["chair"]["test"]["counts"]["captions"] == 5
    assert [*metrics["pope"]["test"]] == ["adversarial", "popular", "random"]
    assert metrics["pope"]["test"]["random"]["questions"] == 6


def test_scoring_again_needs_the_folder_alone_and_gives_the_same_bytes(
    finished: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(finished, moved)
    before = (moved / "metrics.json").read_bytes()
    (moved / "metrics.json").unlink()
    runner.score(moved)
    assert (moved / "metrics.json").read_bytes() == before
    shuffled = (moved / "answers.jsonl").read_text().splitlines(keepends=True)[::-1]
    (moved / "answers.jsonl").write_text("".join(shuffled))
    runner.score(moved)
    assert (moved / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(("parser", "right"), [("official", 3), ("strict", 0)])
def test_the_parser_of_pope_is_a_setting(
    parser: str, right: int, settings: Settings, loaded: Models, tmp_path: Path
) -> None:
    """ "Maybe" to six questions is a yes by the official rules, and wrong by the strict ones."""
    out = tmp_path / parser
    pope = {"max_new_tokens": 2, "images": 3, "per_image": 1, "parser": parser}
    runner.run(settings(pope=pope, tasks=["pope"]), out, load=lambda _: loaded)
    rows = [row | {"answer": "Maybe"} for row in lines(out)]
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = runner.score(out)["pope"]["test"]["random"]
    assert (scored["parser"], scored["unreadable"]) == (parser, 1.0)
    assert scored["accuracy"] == right / 6
    assert scored["tp"] + scored["tn"] == right
    before = (out / "metrics.json").read_bytes()
    runner.score(out)
    assert (out / "metrics.json").read_bytes() == before
    assert ("are read by the strict parser" in table.markdown([out])) is (parser == "strict")


def test_an_interrupted_run_goes_on_to_the_same_result(
    finished: Path,
    settings: Settings,
    loaded: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "again"
    with monkeypatch.context() as patched:
        patched.setattr(generate, "ask", stopping_after(2))
        with pytest.raises(KeyboardInterrupt):
            runner.run(settings(), out, load=lambda _: loaded)
    assert 0 < len(lines(out)) < 23
    half = lines(out)
    runner.run(settings(batch_size=3), out, load=lambda _: loaded)
    assert all(row in lines(out) for row in half)
    assert (out / "answers.jsonl").read_bytes() == (finished / "answers.jsonl").read_bytes()
    assert (out / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


def test_the_batch_size_changes_no_answer(
    finished: Path, settings: Settings, loaded: Models, tmp_path: Path
) -> None:
    """Batches of four and single samples say the same in float32, with and without a method."""
    runner.run(settings(batch_size=1), tmp_path / "single", load=lambda _: loaded)
    assert RunFolder(tmp_path / "single").rows() == RunFolder(finished).rows()
    for size in (1, 5):
        config = settings(**GIFT, batch_size=size)
        runner.run(config, tmp_path / f"gift{size}", load=lambda _: loaded)
    one, five = (RunFolder(tmp_path / f"gift{size}").rows() for size in (1, 5))
    assert one == five != RunFolder(finished).rows()


def test_memory_that_runs_out_changes_no_answer(
    finished: Path,
    settings: Settings,
    loaded: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = generate.ask

    def ask(model: Any, processor: Any, batch: list[Any], limit: int) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return whole(model, processor, batch, limit)

    monkeypatch.setattr(generate, "ask", ask)
    runner.run(settings(), tmp_path / "narrow", load=lambda _: loaded)
    assert (tmp_path / "narrow/metrics.json").read_bytes() == (
        finished / "metrics.json"
    ).read_bytes()


def test_a_broken_image_is_listed_as_skipped_and_shown_in_the_table(
    settings: Settings, loaded: Models, coco: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(coco, tmp_path / "coco")
    rows = RunFolder(finished).rows()
    broken = next(row["image"] for row in rows if row["task"] == "chair")
    hurt = [row for row in rows if row["image"] == broken]
    path = tmp_path / "coco" / "images" / broken
    path.write_bytes(path.read_bytes()[:99])
    config, out = settings(data=str(tmp_path / "coco")), tmp_path / "out"
    metrics = runner.run(config, out, load=lambda _: loaded)
    assert (metrics["answered"], metrics["skipped"]) == (23 - len(hurt), len(hurt))
    left_out = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(map(row_key, left_out)) == [row_key(row) for row in hurt]
    assert {*left_out[0]} == {"task", "split", "id", "image", "reason"}
    assert f"{broken} is not a readable image" in left_out[0]["reason"]
    assert RunFolder(out).rows() == [row for row in rows if row["image"] != broken]
    assert f"{len(hurt)} of 23 samples skipped, see skipped.jsonl" in table.markdown([out])

    def load(_: Config) -> Models:
        raise AssertionError("the model was loaded")

    assert runner.run(config, out, load=load) == metrics, "a run that skipped some is complete"
    path.write_bytes((coco / "images" / broken).read_bytes())
    (out / "skipped.jsonl").unlink()
    runner.run(config, out, load=lambda _: loaded)
    assert (out / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


def test_a_broken_image_is_an_error_where_the_settings_say_so(
    settings: Settings, loaded: Models, coco: Path, tmp_path: Path
) -> None:
    shutil.copytree(coco, tmp_path / "coco")
    for path in (tmp_path / "coco" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:99])
    config = settings(data=str(tmp_path / "coco"), broken_images="error")
    with pytest.raises(EvalError, match=r"sample chair test \d+: .* is not a readable image"):
        runner.run(config, tmp_path / "out", load=lambda _: loaded)


def test_a_full_disk_stops_the_run_and_it_goes_on_afterwards(
    finished: Path,
    settings: Settings,
    loaded: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, sync = itertools.count(), os.fsync

    def full(file: int) -> None:
        if next(calls) == 3:  # after config.yaml, twice, and one batch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(EvalError, match=r"answers\.jsonl cannot be written: No space left"):
            runner.run(settings(), out, load=lambda _: loaded)
    assert 0 < len(lines(out)) < 23
    runner.run(settings(), out, load=lambda _: loaded)
    assert (out / "answers.jsonl").read_bytes() == (finished / "answers.jsonl").read_bytes()
    assert (out / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


def test_a_second_command_in_the_folder_is_refused(
    finished: Path, settings: Settings, loaded: Models
) -> None:
    before = (finished / "answers.jsonl").read_bytes()
    with (
        RunFolder(finished).locked(),
        pytest.raises(EvalError, match=r"another command is at work in .* choose another --out"),
    ):
        runner.run(settings(), finished, load=lambda _: loaded)
    assert (finished / "answers.jsonl").read_bytes() == before
    assert runner.run(settings(), finished, load=lambda _: loaded)["answered"] == 23


def test_where_files_cannot_be_locked_it_is_said(
    settings: Settings,
    loaded: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder.FileLock, "acquire", refuse)
    assert runner.run(settings(), tmp_path / "out", load=lambda _: loaded)["answered"] == 23
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().err


def test_what_killed_processes_left_is_merged(
    finished: Path, settings: Settings, loaded: Models, tmp_path: Path
) -> None:
    """Files of three processes, two with torn lines, overlapping, go on in one process."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    whole = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (out / "answers.jsonl").write_bytes(b"".join(whole[:9]) + whole[9][:20])
    (out / "answers.rank-0.jsonl").write_bytes(b"".join(whole[5:12]))
    (out / "answers.rank-7.jsonl").write_bytes(b"".join(whole[11:14]) + whole[14][:20])
    assert runner.score(out)["answered"] == 14, "scoring reads the parts and changes none"
    assert len([*out.glob("answers.rank-*")]) == 2
    asked: list[Any] = []

    def engine(batches: Any, *rest: Any) -> Any:
        asked.extend(batches)
        return workers.answer_here(batches, *rest)

    runner.run(settings(), out, load=lambda _: loaded, engine=engine)
    assert 9 <= sum(len(batch.samples) for batch in asked) < 23, "whole batches, and not all"
    for name in ("answers.jsonl", "metrics.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert not [*out.glob("*.rank-*")]


def test_answers_that_did_not_arrive_are_missed(
    settings: Settings, loaded: Models, tmp_path: Path
) -> None:
    """As where the machines of a launch each have a folder of that name."""
    out = tmp_path / "out"

    def engine(batches: Any, *rest: Any) -> Any:
        yield from workers.answer_here(batches[1:], *rest)

    with pytest.raises(EvalError, match=r"lacks \d+ of 23 answers .* a file system that"):
        runner.run(settings(), out, load=lambda _: loaded, engine=engine)
    assert not (out / "metrics.json").exists()


def test_a_finished_run_loads_no_model(finished: Path, settings: Settings) -> None:
    def load(_: Config) -> Models:
        raise AssertionError("the model was loaded")

    before = (finished / "answers.jsonl").read_bytes()
    assert runner.run(settings(), finished, load=load)["answered"] == 23
    assert (finished / "answers.jsonl").read_bytes() == before


def test_other_versions_are_said_and_kept_if_they_make_more(
    finished: Path,
    settings: Settings,
    loaded: Models,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (first,) = RunFolder(finished).record()["environments"]
    newer = first | {"torch": "9.0"}
    monkeypatch.setattr(runner, "environment", lambda _: newer)
    monkeypatch.setattr(workers, "environment", lambda _: newer)
    runner.run(settings(), finished, load=lambda _: loaded)
    assert f"has answers of torch {first['torch']}: delete it" in capsys.readouterr().err
    assert RunFolder(finished).record()["environments"] == [first]
    file = finished / "answers.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    runner.run(settings(), finished, load=lambda _: loaded)
    assert RunFolder(finished).record()["environments"] == [first, newer]


@pytest.mark.parametrize("torn", [b'{"task": "chair", "spl', b"\x00\x00\x00\n", b'{"a": 1}\n'])
def test_a_last_line_broken_by_a_crash_is_done_again(
    torn: bytes,
    finished: Path,
    settings: Settings,
    loaded: Models,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, whole = finished / "answers.jsonl", RunFolder(finished).rows()
    kept = file.read_bytes().splitlines(keepends=True)[:-1]
    file.write_bytes(b"".join(kept) + torn)
    assert runner.score(finished)["answered"] == 22
    assert file.read_bytes().endswith(torn), "scoring changes no answers"
    assert "the last line is incomplete" in capsys.readouterr().err
    runner.run(settings(), finished, load=lambda _: loaded)
    assert RunFolder(finished).rows() == whole
    assert file.read_bytes().startswith(b"".join(kept))


def test_a_broken_or_doubled_line_elsewhere_is_named(finished: Path) -> None:
    file = finished / "answers.jsonl"
    good = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*good[:2], "{broken\n", *good[2:]]))
    with pytest.raises(EvalError, match=r"answers\.jsonl, line 3 is no answer"):
        runner.score(finished)
    file.write_text("".join([*good, good[0]]))
    first = json.loads(good[0])
    with pytest.raises(
        EvalError, match=rf"line 24 answers {first['task']} test {first['id']} a se"
    ):
        runner.score(finished)


def test_another_run_in_the_folder_is_refused_and_the_settings_named(
    finished: Path, settings: Settings, loaded: Models
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    changed = settings(**GIFT, seed=1, batch_size=1)
    with pytest.raises(EvalError) as caught:
        runner.run(changed, finished, load=lambda _: loaded)
    message = str(caught.value)
    assert "methods is [] there and ['gift'] now" in message
    assert "gift.alpha is None there and 3.0 now" in message
    assert "seed is 0 there and 1 now" in message
    assert "batch_size" not in message
    assert "Choose another --out" in message
    assert before == {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}


def test_changed_data_is_refused(
    finished: Path, settings: Settings, coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = runner.dataset.describe

    def other(samples: Sequence[Sample]) -> dict[str, Any]:
        return describe(samples[1:])

    monkeypatch.setattr(runner.dataset, "describe", other)
    with pytest.raises(EvalError, match="images, prompts or annotations changed"):
        runner.run(settings(), finished)


def test_a_folder_with_other_files_is_left_alone(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(EvalError, match=r"holds thesis\.tex but no config\.yaml"):
        runner.run(settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_scoring_what_is_no_run_is_explained(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(EvalError, match=r"is not a run folder .* python -m eval run CONFIG --out"):
        runner.score(tmp_path)
    (tmp_path / "config.yaml").write_text("model: pocket")
    with pytest.raises(EvalError, match="is not the record of a run: no data in it"):
        runner.score(tmp_path)
    RunFolder(tmp_path).write_record(runner.describe(settings(), []))
    with pytest.raises(EvalError, match="holds no answers yet: run it again"):
        runner.score(tmp_path)


def test_methods_act_and_are_described(
    finished: Path, settings: Settings, loaded: Models, tmp_path: Path
) -> None:
    runner.run(settings(**GIFT), tmp_path / "gift", load=lambda _: loaded)
    stock, patched = RunFolder(finished).rows(), RunFolder(tmp_path / "gift").rows()
    assert [row["answer"] for row in stock] != [row["answer"] for row in patched]
    ((model_line, gift_line),) = RunFolder(tmp_path / "gift").record()["patches"]
    assert model_line.startswith("LlavaForConditionalGeneration")
    assert gift_line.strip().startswith("GIFT(alpha=3.0")
    model, _ = loaded
    assert model.config.text_config._attn_implementation == "sdpa", "the patch came off again"
    runner.run(settings(), tmp_path / "stock", load=lambda _: loaded)
    assert RunFolder(tmp_path / "stock").rows() == stock


def test_switched_off_heads_give_the_stock_answers(
    finished: Path, settings: Settings, loaded: Models, tmp_path: Path
) -> None:
    runner.run(settings(**GIFT, heads={"gift": {}}), tmp_path / "off", load=lambda _: loaded)
    assert RunFolder(tmp_path / "off").rows() == RunFolder(finished).rows()


def test_warnings_of_methods_stay_with_the_run(
    settings: Settings, loaded: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.run(settings(methods=["vhr"]), tmp_path / "vhr", load=lambda _: loaded)
    (note,) = RunFolder(tmp_path / "vhr").record()["notes"]
    assert note.startswith("no published settings for a llama of 4 layers")
    assert f"note: {note}" in capsys.readouterr().err


def test_a_model_that_cannot_be_wrapped_is_explained(
    settings: Settings, loaded: Models, tmp_path: Path
) -> None:
    far = {"methods": ["gift"], "gift": {"alpha": 3.0, "saliency_layer": 1, "layers": [40]}}
    with pytest.raises(EvalError, match=r"cannot be wrapped: GIFT layers: .*40"):
        runner.run(settings(**far), tmp_path / "far", load=lambda _: loaded)
    runner.run(settings(**GIFT), tmp_path / "far", load=lambda _: loaded)
    assert RunFolder(tmp_path / "far").record()["settings"]["gift"]["layers"] == [2, 3]


def test_a_synonym_list_stays_with_the_run(
    settings: Settings, loaded: Models, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("cup, mug\nbowl\n")
    chosen = settings(
        tasks=["chair"], chair={"images": 2, "max_new_tokens": 3, "synonyms": str(words)}
    )
    before = runner.run(chosen, tmp_path / "out", load=lambda _: loaded)
    words.unlink()
    assert runner.score(tmp_path / "out") == before
    assert before["chair"]["test"]["vocabulary"].startswith("words.txt")

"""Several real processes on one run folder, started by accelerate or by Ray, and some killed."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from eval.__main__ import main
from eval.errors import EvalError
from eval.runs import config, ray_engine, runner, splitting
from eval.runs.folder import RunFolder, row_key
from eval.runs.generate import BrokenImageError
from tests.eval.conftest import Settings

SMALL = {
    "model": "pocket",
    "data": "pocket",
    "splits": ["test"],
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 2,
    "chair": {"images": 24, "max_new_tokens": 60},
    "pope": {"images": 6, "max_new_tokens": 2, "per_image": 1},
}
SAMPLES = 24 + 3 * 6 * 2
RAY = ("--engine", "ray", "--workers", "2")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    runner.run(config.from_settings(SMALL), out)
    return out


def start(tmp_path: Path, out: Path, *options: str, **changes: object) -> subprocess.Popen[str]:
    """`python -m eval run`; without options `accelerate launch --num_processes 2 -m eval run`.

    Output goes to launch.txt.
    """
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes))
    command = ["-m", "eval", "run", str(file), "--out", str(out), *options]
    if not options:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # on a machine without accelerators it is the first switch that makes it start more than one
        launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", str(port)]
        command = ["-m", "accelerate.commands.launch", *launch, *command]
    with (tmp_path / "launch.txt").open("a") as said:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=said,
            stderr=said,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd=Path(__file__).parents[3],
            start_new_session=True,
        )


def lines(out: Path) -> list[str]:
    """Every whole answer that lies in the folder."""
    files = sorted(out.glob("answers*.jsonl"))
    return [line for file in files for line in file.read_text().splitlines() if line[-1:] == "}"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.01)


def below(process: subprocess.Popen[str], named: str) -> list[psutil.Process]:
    """The processes started below this one whose command line holds `named`."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if named in " ".join(child.cmdline())]


def check_same(out: Path, single: Path, before: list[str]) -> None:
    """Nothing lost, nothing twice, byte for byte what one process makes."""
    keys = [row_key(json.loads(line)) for line in lines(out)]
    assert len(keys) == len({*keys}) == SAMPLES
    assert {*before} <= {*lines(out)}, "what was answered is kept"
    for name in ("answers.jsonl", "metrics.json", "config.yaml"):
        assert (out / name).read_bytes() == (single / name).read_bytes()
    assert not [*out.glob("*.rank-*")]


def test_one_of_two_processes_is_killed_and_the_run_resumed(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(tmp_path, out)
    wait_for(lambda: len([*out.glob("answers.rank-*.jsonl")]) == 2, first)
    below(first, "eval run")[-1].kill()
    assert first.wait(60) != 0
    before = lines(out)
    assert 0 < len(before) < SAMPLES, "it was in the middle"
    assert not (out / "metrics.json").exists()

    assert start(tmp_path, out).wait(120) == 0, (tmp_path / "launch.txt").read_text()
    check_same(out, single, before)
    told = (tmp_path / "launch.txt").read_text()
    assert told.count("| split | measure") == 1, "one process prints the table"


def test_a_ray_actor_and_then_the_driver_are_killed_and_the_run_resumed(
    single: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    first = start(tmp_path, out, *RAY)
    wait_for(lambda: len(lines(out)) > 0, first)
    below(first, "ray::Actor")[0].kill()
    told = tmp_path / "launch.txt"
    wait_for(lambda: "a Ray actor died: " in told.read_text(), first)
    first.kill()
    first.wait(60)
    kept = lines(out)
    assert len(kept) < SAMPLES, "it was in the middle"

    assert start(tmp_path, out, *RAY).wait(120) == 0, told.read_text()
    assert told.read_text().count("2 Ray actors") == 2
    check_same(out, single, kept)


def test_two_processes_hold_one_model_together(single: Path, tmp_path: Path) -> None:
    """Tensor parallelism: each takes part in every batch, one writes, the answers are the same."""
    out = tmp_path / "out"
    both = start(tmp_path, out, device=None, tp_plan="auto")
    assert both.wait(120) == 0, (tmp_path / "launch.txt").read_text()
    assert RunFolder(out).rows() == RunFolder(single).rows()
    assert (out / "metrics.json").read_bytes() == (single / "metrics.json").read_bytes()


def test_methods_in_a_model_that_two_processes_hold_together(tmp_path: Path) -> None:
    """What compares heads with each other sees the heads of all processes."""
    methods = {"methods": ["gift", "vhr"], "tasks": ["chair"]}
    runner.run(config.from_settings(SMALL | methods), tmp_path / "single")
    both = start(tmp_path, tmp_path / "out", device=None, tp_plan="auto", **methods)
    assert both.wait(120) == 0, (tmp_path / "launch.txt").read_text()
    assert RunFolder(tmp_path / "out").rows() == RunFolder(tmp_path / "single").rows()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_batch_is_the_share_of_one_process(
    count: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(index: int) -> SimpleNamespace:
        return SimpleNamespace(num_processes=count, process_index=index)

    dealt: list[Any] = []
    for index in range(count):
        monkeypatch.setattr(splitting, "processes", lambda index=index: launched(index))
        dealt.append([*splitting.share([*"abcde"], settings())])  # type: ignore[list-item]
        whole = splitting.share([*"abcde"], settings(device=None, tp_plan="auto"))  # type: ignore[list-item]
        assert whole == [*"abcde"]
    assert sorted(chain(*dealt)) == [*"abcde"]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray_engine._connect(ray)
    yield ray
    ray.shutdown()


def actors(ray: Any, count: int, deadly: str, marks: Path) -> list[Any]:
    """Actors that answer in capitals, and kill themselves at `deadly`: "once" the first time only,
    "ready" when they load the model."""

    @ray.remote(max_restarts=ray_engine.RESTARTS)
    class Echo:
        def ready(self) -> None:
            self.act("ready")

        def answer(self, batch: Any) -> tuple[str, int]:
            self.act(batch.text)
            return batch.text.upper(), os.getpid()

        def act(self, text: str) -> None:
            if text == "wrong":
                raise EvalError("wrong batch")
            if text == deadly and not (text == "once" and marks.exists()):
                marks.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    return [Echo.remote() for _ in range(count)]


def batches(*texts: str) -> list[Any]:
    samples = [SimpleNamespace(name="sample chair test 7")]
    return [SimpleNamespace(text=text, samples=samples) for text in texts]


def test_the_batch_of_a_dead_actor_is_handed_out_again(ray: Any, tmp_path: Path) -> None:
    there = actors(ray, 2, "once", tmp_path / "died")
    found = [*ray_engine.hand_out(ray, there, batches("a", "once", "b", "c"))]
    assert (tmp_path / "died").exists()
    assert sorted(text for text, _ in found) == ["A", "B", "C", "ONCE"]


def test_a_batch_that_ends_every_actor_is_named(ray: Any, tmp_path: Path) -> None:
    there = actors(ray, 1, "b", tmp_path / "died")
    found = ray_engine.hand_out(ray, there, batches("a", "b", "c"))
    assert next(found)[0] == "A"
    with pytest.raises(EvalError, match="batch of sample chair test 7 ended its Ray actor 3 times"):
        next(found)


def test_actors_that_die_while_they_load_are_given_up(ray: Any, tmp_path: Path) -> None:
    there = actors(ray, 1, "ready", tmp_path / "died")
    with pytest.raises(EvalError, match=r"every Ray actor died 4 times, the .* resumes"):
        next(ray_engine.hand_out(ray, there, batches("a")))


def test_an_error_of_a_batch_is_that_of_the_run(ray: Any, tmp_path: Path) -> None:
    there = actors(ray, 2, "", tmp_path / "died")
    with pytest.raises(EvalError, match=r"^wrong batch$"):
        [*ray_engine.hand_out(ray, there, batches("wrong", "b"))]


def test_as_many_actors_as_there_are_accelerators(settings: Settings) -> None:
    def cluster(**resources: float) -> Any:
        return SimpleNamespace(cluster_resources=lambda: resources)

    anywhere = settings(device=None)
    assert ray_engine._size(cluster(CPU=8.0), anywhere, None) == (1, 0)
    assert ray_engine._size(cluster(CPU=8.0), anywhere, 3) == (3, 0)
    assert ray_engine._size(cluster(CPU=8.0, GPU=4.0), anywhere, None) == (4, 1)
    assert ray_engine._size(cluster(CPU=8.0, GPU=4.0), anywhere, 2) == (2, 1)
    assert ray_engine._size(cluster(GPU=4.0), settings(device="cpu"), 5) == (5, 0)
    for gpus, wanted in ((4.0, 5), (4.0, 0), (0.0, 0)):
        with pytest.raises(EvalError, match=rf"--workers {wanted}: expected at least 1"):
            ray_engine._size(cluster(GPU=gpus), anywhere, wanted)


def test_an_engine_that_cannot_be_used_says_what_to_do(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(config: Any) -> str:
        with pytest.raises(EvalError) as caught:
            next(ray_engine.answer([], config, lambda _: (None, None)))
        return str(caught.value)

    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    assert main(["run", str(file), "--out", str(tmp_path / "out"), "--workers", "2"]) == 1
    assert "accelerate launch --num_processes 2 -m eval run" in capsys.readouterr().err
    assert "tp_plan divides one model" in said(settings(device=None, tp_plan="auto"))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "ray", None)
        assert "needs the extra `ray`" in said(settings())
    monkeypatch.setattr(splitting, "processes", lambda: SimpleNamespace(num_processes=2))
    assert "without accelerate launch" in said(settings())


def test_a_broken_image_travels_between_processes() -> None:
    sent: Any = BrokenImageError(SimpleNamespace(name="sample 7"), "torn")  # type: ignore[arg-type]
    error = pickle.loads(pickle.dumps(sent))
    assert (str(error), error.reason, error.sample) == ("sample 7: torn", "torn", sent.sample)

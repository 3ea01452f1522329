"""Several real processes on one run folder, started by accelerate, and one of them killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eval.runs import config, runner
from eval.runs.folder import RunFolder, row_key

SMALL = {
    "model": "pocket",
    "data": "pocket",
    "splits": ["test"],
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 2,
    "chair": {"images": 12, "max_new_tokens": 40},
    "pope": {"images": 6, "max_new_tokens": 2, "per_image": 1},
}
SAMPLES = 12 + 3 * 6 * 2


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    runner.run(config.from_settings(SMALL), out)
    return out


def launch(tmp_path: Path, out: Path, **changes: object) -> subprocess.Popen[str]:
    """`accelerate launch --num_processes 2 -m eval run`, output in launch.txt."""
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # on a machine without accelerators it is this switch that makes it start more than one
    start = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    module = ["-m", "eval", "run", str(file), "--out", str(out)]
    with (tmp_path / "launch.txt").open("a") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *start, *module],
            stdout=said,
            stderr=said,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd=Path(__file__).parents[3],
        )


def lines(folder: Path) -> list[tuple[Path, str]]:
    """Every whole answer that lies in the folder, with its file."""
    files = [*folder.glob("answers.jsonl"), *folder.glob("work/*.answers.jsonl")]
    return [(file, line) for file in files for line in file.read_text().splitlines()]


def test_one_of_two_processes_is_killed_and_the_run_resumed(single: Path, tmp_path: Path) -> None:
    """Nothing is lost, nothing is there twice, and the scores are those of a single process."""
    out, whole = tmp_path / "out", RunFolder(single)
    first = launch(tmp_path, out)
    ends = time.monotonic() + 120
    while len({file for file, _ in lines(out)}) < 2 and first.poll() is None:
        assert time.monotonic() < ends
        time.sleep(0.02)
    signs = [json.loads(sign.read_text()) for sign in out.glob("work/*.alive")]
    assert len(signs) == 2, (tmp_path / "launch.txt").read_text()
    os.kill(signs[0]["pid"], signal.SIGKILL)
    assert first.wait(60) != 0
    before = lines(out)
    assert len({file for file, _ in before}) == 2, "both had answered something"
    assert len(before) < SAMPLES, "and it was in the middle"
    assert not (out / "metrics.json").exists()

    assert launch(tmp_path, out).wait(120) == 0, (tmp_path / "launch.txt").read_text()
    after = lines(out)
    assert {file for file, _ in after} == {out / "answers.jsonl"}
    keys = [row_key(json.loads(line)) for _, line in after]
    assert len(keys) == len({*keys}) == SAMPLES
    whole_before = {line for _, line in before if line.endswith("}")}
    assert whole_before <= {line for _, line in after}, "what was answered is kept"
    assert RunFolder(out).rows() == whole.rows()
    assert (out / "metrics.json").read_bytes() == (single / "metrics.json").read_bytes()
    assert not (out / "work").exists()
    told = (tmp_path / "launch.txt").read_text()
    assert told.count("| split | measure") == 1, "one process prints the table"


def test_two_processes_hold_one_model_together(single: Path, tmp_path: Path) -> None:
    """Tensor parallelism: each takes part in every batch, one writes, the answers are the same."""
    out = tmp_path / "out"
    both = launch(tmp_path, out, device=None, tp_plan="auto")
    assert both.wait(120) == 0, (tmp_path / "launch.txt").read_text()
    assert RunFolder(out).rows() == RunFolder(single).rows()
    assert (out / "metrics.json").read_bytes() == (single / "metrics.json").read_bytes()


def test_methods_in_a_model_that_two_processes_hold_together(tmp_path: Path) -> None:
    """What compares heads with each other sees the heads of all processes."""
    methods = {"methods": ["gift", "vhr"], "tasks": ["chair"]}
    runner.run(config.from_settings(SMALL | methods), tmp_path / "single")
    both = launch(tmp_path, tmp_path / "out", device=None, tp_plan="auto", **methods)
    assert both.wait(120) == 0, (tmp_path / "launch.txt").read_text()
    assert RunFolder(tmp_path / "out").rows() == RunFolder(tmp_path / "single").rows()

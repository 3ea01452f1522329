"""The commands with the model on a device whose tensors may not meet the CPU's, found by itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.__main__ import main
from eval.runs import runner
from eval.runs.folder import RunFolder
from eval.studies import demo
from eval.support.simulated_device import FAR, second_device
from tests.eval.conftest import Settings
from tests.eval.speed.test_speed import tiny_shapes  # noqa: F401 - a fixture
from tests.eval.studies.test_sweep import SMALL

METHODS = ("var", "gift", "vhr")


def answers(folder: Path) -> list[Any]:
    return sorted((row["id"], row["task"], row["answer"]) for row in RunFolder(folder).rows())


@pytest.mark.parametrize("methods", [(), METHODS], ids=["stock", "patched"])
def test_a_run(
    methods: tuple[str, ...],
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner.run(settings(methods=methods), tmp_path / "cpu")
    capsys.readouterr()
    with second_device(best=True):
        runner.run(settings(methods=methods, device=None), tmp_path / "far")
    assert answers(tmp_path / "far") == answers(tmp_path / "cpu")
    assert "float32 on cpu:1\n" in capsys.readouterr().err
    record = RunFolder(tmp_path / "far").record()
    assert record["environments"][0]["device"] == str(FAR)
    assert [patch[0].partition(":")[0] for patch in record["patches"]] == (
        ["LlavaForConditionalGeneration (float32 on cpu"] if methods else []
    )


def test_the_demo(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in demo.RUNS:
        small = {
            "model": str(checkpoint),
            "dtype": "float32",
            "methods": {"baseline": [], "all": [*METHODS]}.get(name, [name]),
            "chair": {"images": 4, "max_new_tokens": 4},
            "pope": {"images": 2, "max_new_tokens": 2, "per_image": 1},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.setattr(demo, "CONFIGS", tmp_path)
    assert main(["demo", "--out", str(tmp_path / "near"), "--device", "cpu"]) == 0
    with second_device(best=True):
        assert main(["demo", "--out", str(tmp_path / "far")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "float32 on" in line]
    assert [line.rpartition(" ")[2] for line in said] == ["cpu", "cpu:1"]
    for name in demo.RUNS:
        assert answers(tmp_path / "far" / name) == answers(tmp_path / "near" / name)
    assert (tmp_path / "far" / "scenes.png").exists()


def test_a_sweep(tmp_path: Path) -> None:
    small = SMALL | {"device": None, "chair": {"images": 8, "max_new_tokens": 40}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    command = ["sweep", str(tmp_path / "small.yaml"), "--grid", "gift.alpha=2,6"]
    assert main([*command, "--out", str(tmp_path / "near"), "--set", "device=cpu"]) == 0
    with second_device(best=True):
        assert main([*command, "--out", str(tmp_path / "far")]) == 0
    for part in ("tune/stock", "tune/gift.alpha=6", "report/stock"):
        assert answers(tmp_path / "far" / part) == answers(tmp_path / "near" / part)


@pytest.mark.usefixtures("tiny_shapes")
def test_the_speed_table(tmp_path: Path) -> None:
    with second_device(best=True):
        assert main(["speed", "--repeats", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["machine"]["device"] == str(FAR)
    assert {"ours", "release", "eager", "idle"} <= {row["kind"] for row in record["rows"]}

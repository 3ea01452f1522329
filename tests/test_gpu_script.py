"""The script for a card runs on the CPU too, and says clearly where no card is."""

import os
import subprocess
import sys

COMMAND = [
    sys.executable,
    "-m",
    "pytest",
    "tests/gpu",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:logging",
]
PART = (
    "greedy and (ways_of or vhr) or beams and contrast or defaults and gift or found"
    " or compiled_loop and default or demo"
)


def run(*more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name != "VLM_PATCH_DEVICE"}
    return subprocess.run(
        [*COMMAND, *more], env={**own, **variables}, capture_output=True, text=True
    )


def test_a_part_on_the_cpu() -> None:
    done = run("-x", "-v", "-k", PART, VLM_PATCH_DEVICE="cpu")
    assert done.returncode == 0, done.stdout
    assert "device: cpu (no card)" in done.stdout
    assert "largest differences on cpu" in done.stdout


def test_no_card_is_said() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert "make test-gpu: no CUDA device was found (torch " in done.stdout + done.stderr

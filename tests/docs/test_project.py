"""The project's own files: what `make` lists, and one place for the version."""

import re
import subprocess
from pathlib import Path

import vlm_patch

ROOT = Path(__file__).parents[2]


def test_make_alone_lists_every_goal() -> None:
    """`card` is a step of test-gpu."""
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    goals = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert goals is not None
    assert {line.split()[1] for line in listed.splitlines()} == set(goals[1].split()) - {"card"}


def test_the_goals_that_programs_of_pages_name_exist() -> None:
    goals = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        named = re.findall(r"^make ([a-z-]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= goals, page.name


def test_the_version_stands_in_one_place() -> None:
    for name in ("pyproject.toml", "CITATION.cff", "README.md"):
        assert vlm_patch.__version__ not in (ROOT / name).read_text(), name

"""The options of a command are the arguments of its function."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from eval.__main__ import main
from eval.cli.function import Command
from eval.cli.score import SCORES


def scored(
    answers: Path,
    truth_file: Path | None = None,
    rule: Literal["loose", "strict"] = "strict",
    draws: int = 5,
    judge: str | None = None,
    subset: bool = False,
) -> dict[str, Any]:
    """Answers about nothing.

    More about it: this line is no argument.

    answers: rows with id and text
    truth_file (FILE|DIR): what is right
    rule: how an answer is read
    draws: of the bootstrap
    judge (URL): who is asked
    subset: leave out the others
    """
    return {"given": [answers.name, truth_file, rule, draws, judge, subset], "share": 0.5}


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="score")
    Command(scored).add_options(made)
    return made


def test_options_and_their_help(parser: argparse.ArgumentParser) -> None:
    text = " ".join(parser.format_help().split())
    assert "usage: score [-h] --answers ANSWERS [--truth-file FILE|DIR] [--rule loose|stri" in text
    assert "--rule loose|strict how an answer is read (default: strict)" in text
    assert "--draws DRAWS of the bootstrap (default: 5)" in text
    assert "--judge URL who is asked" in text
    assert "--subset leave out the others" in text
    assert Command(scored).help == "Answers about nothing"


def test_what_is_not_given_is_the_functions_own_default(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, expected in (
        ([], [None, "strict", 5, None, False]),
        (["--rule", "loose", "--draws", "7", "--subset"], [None, "loose", 7, None, True]),
    ):
        given = parser.parse_args(["--answers", "a.json", *words])
        given.command(given)
        shown = capsys.readouterr().out.splitlines()
        assert shown[:-1] == [f"note: {item}" for item in ["a.json", *expected]]
        assert shown[-1].split() == ["share", "0.5000"]


@dataclass(frozen=True)
class Depth:
    """How deep.

    depth (N): in metres
    """

    depth: int = 2


SHALLOW = Depth()


def dive(
    names: list[str], /, where: Depth = SHALLOW, all_: bool = False, tag: list[str] | None = None
) -> dict[str, Any]:
    """Dives.

    names (NAME): of who dives
    all_: all of them
    tag (TAG): may be repeated
    """
    return {"given": [*names, where.depth, all_, tag]}


def test_arguments_by_position_lists_and_groups_of_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser(prog="dive")
    Command(dive).add_options(parser)
    usage = "usage: dive [-h] [--depth N] [--all] [--tag TAG] [--json] NAME [NAME ...]"
    assert usage in " ".join(parser.format_help().split())
    for words, expected in (
        (["a"], ["a", 2, False, None]),
        (["a", "b", "--depth", "7", "--all", "--tag", "x", "--tag", "y"], ["a", "b", 7, True]),
    ):
        given = parser.parse_args(words)
        given.command(given)
        shown = capsys.readouterr().out.splitlines()
        assert shown[: len(expected)] == [f"note: {item}" for item in expected]
    assert shown[-1] == "note: ['x', 'y']"


@pytest.mark.parametrize("name", SCORES)
def test_every_scorer_says_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["score", name, "-h"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out

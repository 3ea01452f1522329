"""The programs and commands of the README and of every page in docs/ run as they stand, on the
pocket model instead of a downloaded one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlm_patch
from eval import pocket
from eval.__main__ import parser
from eval.support import tiny

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB_MODEL = "llava-hf/llava-1.5-7b-hf"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind every `python -m eval` of a page's shell blocks."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[1:3] == ["-m", "eval"] or ("eval" in words[:8] and "-m" in words[:8]):
                yield words[words.index("eval") + 1 :]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the pages' programs may use without saying where it comes from."""
    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (96, 96), "gray").save(folder / "street.jpg")
    processor, model = tiny.processor(), tiny.llava(layers=24)  # pages switch heads of layer 20
    text = {"type": "text", "text": "Describe this image."}
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.open(folder / "street.jpg")}, text],
        }
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    image_mask = inputs["input_ids"] == model.config.image_token_id
    return {
        "folder": folder,
        "vlm_patch": vlm_patch,
        **{name: getattr(vlm_patch, name) for name in vlm_patch.__all__},
        "model": model,
        "processor": processor,
        "inputs": inputs,
        "embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "mask": inputs["attention_mask"],
        "image_mask": image_mask,
        "query_mask": ~image_mask & (image_mask.cumsum(1) > 0),
        "torch": torch,
    }


@pytest.mark.filterwarnings("ignore:no published settings", "ignore:VAR does nothing")
@pytest.mark.filterwarnings("ignore:No processor", "ignore:GIFT leaves", "ignore:no softmax")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs_run(page: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(names["folder"])
    there = dict(names)
    for program in blocks(page, "python"):
        exec(compile(program.replace(HUB_MODEL, str(pocket.MODEL)), str(page), "exec"), there)
    patch = there.get("patch")
    if isinstance(patch, vlm_patch.Patch):
        patch.remove()


@pytest.mark.filterwarnings("ignore:no published settings", "ignore:VAR does nothing")
def test_the_first_program_prints_a_description(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(names["folder"])
    exec(blocks(PAGES[0], "python")[0].replace(HUB_MODEL, str(pocket.MODEL)), {})
    printed = capsys.readouterr().out
    assert "Describe this image. ASSISTANT:" in printed
    assert len(printed.partition("ASSISTANT:")[2].split()) > 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page: Path) -> None:
    for words in commands(page):
        if words[:1] == ["score"] and "/" in words[1]:
            words.insert(1, "run")
        parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert PAGES[0].stat().st_size < 8_000

"""The README's first program runs as it stands, on the pocket model instead of a downloaded one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from eval import pocket

README = Path(__file__).parent.parent / "README.md"
HUB_MODEL = "llava-hf/llava-1.5-7b-hf"


def programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:no published settings", "ignore:VAR does nothing")
def test_the_first_program_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (96, 96), "gray").save(tmp_path / "street.jpg")
    program = programs()[0].replace(HUB_MODEL, str(pocket.MODEL))
    program = program.replace("street.jpg", str(tmp_path / "street.jpg"))
    exec(compile(program, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "Describe this image. ASSISTANT:" in printed
    assert len(printed.partition("ASSISTANT:")[2].split()) > 3


def test_its_other_programs_are_python() -> None:
    for program in programs():
        compile(program, str(README), "exec")

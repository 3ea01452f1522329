"""Tables in the pages of docs/ that a command generates, each between two marks of its name."""

import re
from pathlib import Path

from eval.errors import EvalError

DOCS = Path(__file__).parents[2] / "docs"


def table(page: str, name: str) -> str:
    """What stands between the marks of `name` in docs/PAGE.md. Raises EvalError without marks."""
    found = _block(name).search((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    if found is None:
        raise EvalError(f"docs/{page}.md lacks the lines <!-- {name}:begin --> and :end")
    return found[0]


def replaced(text: str, name: str, new: str) -> str:
    """A page with `new` between the marks of `name`."""
    return _block(name).sub(lambda _: new.rstrip("\n") + "\n", text)


def write(page: str, name: str, new: str) -> None:
    """Puts a table into docs/PAGE.md. Raises EvalError where the page has no place for it."""
    table(page, name)
    file = DOCS / f"{page}.md"
    file.write_text(replaced(file.read_text(encoding="utf-8"), name, new), encoding="utf-8")


def _block(name: str) -> re.Pattern[str]:
    marks = f"(?<=<!-- {name}:begin -->\n).*?(?=<!-- {name}:end -->)"
    return re.compile(marks, re.DOTALL)

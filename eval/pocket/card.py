"""The model card of a pocket model, made from its scores so that the two cannot disagree."""

from pathlib import Path
from typing import Any

from jinja2 import Template

CARD = Path(__file__).parent / "card.md.jinja"
"""The card with places for the numbers."""


def card(scores: dict[str, Any]) -> str:
    """The README.md of a model folder."""
    text = CARD.read_text(encoding="utf-8")
    made: Any = Template(text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return str(made.render(scores))

"""The points of a sweep: every combination of the values of some settings, or of heads."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from eval.errors import EvalError
from eval.runs.config import METHODS
from eval.schema import check_names

HEADS = ("layers", "heads")
# beside the sections of the methods: whatever else would change the prompts or the model
SWITCHES = ("methods", "layers", "heads")

Tables: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One combination of settings.

    name: serves as a folder's, too
    overrides: the settings as key=value texts; None: no methods at all
    """

    name: str
    overrides: tuple[str, ...] | None


def points(
    grids: Sequence[str], spots: Sequence[Point] = (), own: Sequence[str] = ()
) -> list[Point]:
    """All combinations of `key=value,value` texts, and of the head choices in `spots`.

    own: names of methods beside the library's.
    """
    names = list(dict.fromkeys((*METHODS, *own)))
    axes = [_axis(text, names) for text in grids] + ([list(spots)] if spots else [])
    if not axes:
        raise EvalError(
            "nothing to sweep: give --grid key=value,value or --grid-heads layers|heads"
        )
    combinations = [
        Point(
            ",".join(one.name for one in chosen),
            tuple(itertools.chain(*(one.overrides or () for one in chosen))),
        )
        for chosen in itertools.product(*axes)
    ]
    if len({point.name for point in combinations}) < len(combinations):
        raise EvalError(f"--grid {' '.join(grids)} names a setting or a value twice")
    return combinations


def _axis(text: str, methods: Sequence[str]) -> list[Point]:
    key, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise EvalError(f"--grid {text}: expected key=value,value, as in var.move_fraction=0.2,0.4")
    if key.partition(".")[0] not in (*methods, *SWITCHES):
        raise EvalError(
            f"--grid {text}: a sweep varies the methods and their heads on one loaded model, "
            f"expected a setting of {', '.join(methods)}, or one of {', '.join(SWITCHES)}"
        )
    try:
        chosen = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise EvalError(f"--grid {text}: the values are not YAML: {error}") from error
    return [_point(key, value) for value in chosen]


def _point(key: str, value: Any, name: str | None = None) -> Point:
    written = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")
    override = f"{key}={written.strip()}"
    return Point(name or re.sub(r"[^\w.=+-]+", "_", override).strip("_"), (override,))


def spots(tables: Tables, kind: str) -> list[Point]:
    """One point a layer (or a head) that some method acts in: the methods are on there alone.

    `tables` are the head tables of a patch, bool `[layers, heads]` by name of the method.
    """
    check_names("--grid-heads", (kind,), HEADS)
    return [
        _point("heads", {name: {layer: heads} if heads else {} for name, heads in on.items()}, name)
        for name, layer, on in _on(tables, kind)
    ]


def _on(tables: Tables, kind: str) -> Iterator[tuple[str, int, dict[str, list[int]]]]:
    """Name of a point, its layer, and by method the heads that act in it."""
    acting = {name: [row.nonzero().flatten().tolist() for row in t] for name, t in tables.items()}
    for layer in range(max((len(rows) for rows in acting.values()), default=0)):
        in_layer = {name: rows[layer] for name, rows in acting.items()}
        heads = sorted({head for acting_heads in in_layer.values() for head in acting_heads})
        if kind == "layers" and heads:
            yield f"layer={layer}", layer, in_layer
        for head in heads if kind == "heads" else ():
            one = {
                name: [head] if head in acting_heads else []
                for name, acting_heads in in_layer.items()
            }
            yield f"head={layer}.{head}", layer, one

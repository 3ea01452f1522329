"""The settings of a run: defaults, then a YAML file, then `--set key=value` on the command line.

One flat YAML names the model, the data, the tasks and the methods; a task or a method that needs
more has a section of its own:

    model: pocket
    data: pocket
    methods: [gift]
    gift: {alpha: 4.0}
    chair: {max_new_tokens: 96}

Every key is checked: an unknown one, a value of the wrong type, or a section of a method that the
run does not use is an EvalError that says what was expected.
"""

import dataclasses
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import yaml

from eval.benchmarks import registry
from eval.benchmarks.base import Benchmark
from eval.benchmarks.rows import read_text
from eval.errors import EvalError
from eval.runs.images import MAX_PIXELS
from eval.schema import check, check_names, check_positive, check_section, describe, unknown
from vlm_patch.methods.registry import METHODS as LIBRARY
from vlm_patch.methods.registry import find

METHODS: Mapping[str, Any] = LIBRARY


@dataclass(frozen=True)
class Config:
    """One model with its methods on one data set.

    model: pocket, a folder made by save_pretrained, or an id on the hub
    revision, trust_remote_code, dtype, device_map, tp_plan, attn_implementation: of from_pretrained
    device: of the whole model, where none of device_map, tp_plan and quantization places it
    quantization: quantization_config of from_pretrained, as in {load_in_4bit: true}
    chat_template: Jinja that renders prompts, for a model whose processor has none
    data: pocket, or a folder of COCO images with their annotations
    splits: of the data; none: the usual ones
    part: of all images only the half to tune on, or the half to report (see `sweep`)
    tasks: names of benchmarks, or import paths
    limit: images of each split and task at most
    batch_size: requests at once
    seed: of whatever is drawn
    broken_images: error stops at an image that cannot be read rather than list it as skipped
    max_pixels: a larger image is not read
    methods: names, or import paths
    layers, heads: of `wrap`
    sections: settings of each benchmark, by name
    options: section of each method, by name
    """

    model: str = "pocket"
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    tp_plan: str | Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    attn_implementation: str | None = None
    chat_template: str | None = None
    data: str = "pocket"
    splits: tuple[str, ...] = ()
    part: Literal["tune", "report"] | None = None
    tasks: tuple[str, ...] = registry.DEFAULT
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    broken_images: Literal["skip", "error"] = "skip"
    max_pixels: int = MAX_PIXELS
    methods: tuple[str, ...] = ()
    layers: Any = None
    heads: Any = None
    sections: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive("", self, "limit", "batch_size", "max_pixels")
        own = [task for task in self.tasks if ":" in task]
        check_names("tasks", self.tasks, [*registry.TASKS, *own])
        check_names("methods", self.methods, [*METHODS, *filter(_is_path, self.methods)])
        if not self.tasks:
            raise EvalError(f"tasks is empty: name at least one of {', '.join(registry.TASKS)}")
        self._check_sections()
        placing = [key for key in ("device", "device_map", "tp_plan") if getattr(self, key)]
        if len(placing) > 1:
            raise EvalError(f"{' and '.join(placing)} are both set: keep one")
        if not isinstance(self.quantization, (Mapping, NoneType)):
            raise EvalError(
                f"quantization: expected a section such as {{load_in_4bit: true}}, "
                f"found {describe(self.quantization)}"
            )
        for name in {*self.options} - {_kind(method).name for method in self.methods}:
            raise EvalError(
                f"section {name}: the run does not use {name} (methods: {[*self.methods]}); "
                f"add it to methods or drop the section"
            )
        self.build_methods()

    def _check_sections(self) -> None:
        """Fill in the sections that are not given, and check what all of them have in common."""
        known = registry.known(self.tasks)
        filled = {name: benchmark.settings() for name, benchmark in known.items()}
        object.__setattr__(self, "sections", filled | dict(self.sections))
        for name, section in self.sections.items():
            check_positive(name, section, "max_new_tokens", "images")
        for name in (benchmark.name for benchmark in self.benchmarks):
            if getattr(self.sections[name], "data", "") is None:
                raise EvalError(
                    f"{name}.data: name the folder of {name}, for example --set {name}.data=DIR; "
                    f"python -m eval data {name} --to DIR fetches it or says how to get it"
                )

    @property
    def benchmarks(self) -> list[Benchmark]:
        """The benchmarks of the tasks, in the order given."""
        return [registry.named(task) for task in self.tasks]

    def scoring_files(self) -> list[Path]:
        """What the run keeps a copy of, so that its folder can be scored alone."""
        benchmarks = self.benchmarks
        return [file for b in benchmarks for file in b.scoring_files(self.sections[b.name])]

    def build_methods(self) -> list[Any]:
        """The methods in the order given, each with its options."""
        return [_build(kind, self.options.get(kind.name, {})) for kind in map(_kind, self.methods)]

    def settings(self) -> dict[str, Any]:
        """The resolved settings as plain YAML values; `from_settings` reads them back."""
        values = dataclasses.asdict(self)
        sections, options = values.pop("sections"), values.pop("options")
        plain: dict[str, Any] = _plain({**values, **sections, **options})
        return plain


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path` (None: defaults) with `key=value` overrides."""
    settings = {} if path is None else _read(path)
    for override in overrides:
        _override(settings, override)
    return from_settings(settings)


def from_settings(settings: Mapping[str, Any]) -> Config:
    """A Config from plain values; EvalError for an unknown key or a value of the wrong type."""
    hints = typing.get_type_hints(Config)
    del hints["options"], hints["sections"]
    values: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    options: dict[str, Mapping[str, Any]] = {}
    tasks = check("tasks", settings.get("tasks", registry.DEFAULT), hints["tasks"])
    known, foreign = registry.known(tasks), _foreign(settings.get("methods"))
    _check_names([*foreign, *(known.keys() - registry.TASKS.keys())], {*hints, *registry.TASKS})
    methods = {**METHODS, **foreign}
    for key, value in settings.items():
        if key in methods:
            options[key] = check_section(key, value, methods[key])
        elif key in known:
            schema = known[key].settings
            sections[key] = schema(**check_section(key, value, schema))
        elif key in hints:
            values[key] = check(key, value, hints[key])
        else:
            raise EvalError(unknown("setting", key, [*hints, *known, *methods]))
    return Config(**values, sections=sections, options=options)


def recorded(record: Mapping[str, Any], benchmark: Benchmark) -> Any:
    """The settings of a benchmark as a run recorded them, perhaps before some of them existed."""
    section = record["settings"].get(benchmark.name) or {}
    names = {f.name for f in dataclasses.fields(benchmark.settings)}
    given = {key: value for key, value in section.items() if key in names}
    checked = check_section(benchmark.name, {**benchmark.before, **given}, benchmark.settings)
    return benchmark.settings(**checked)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise EvalError(f"{path} is not YAML: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise EvalError(f"{path}: expected `key: value` lines, found {describe(settings)}")
    return settings


def _override(settings: dict[str, Any], text: str) -> None:
    """Put one `key=value` or `section.key=value`, the value in YAML, into `settings`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise EvalError(f"--set {text}: expected key=value, for example --set gift.alpha=4")
    *sections, last = key.split(".")
    for section in sections:
        inner = settings[section] = {} if settings.get(section) is None else settings[section]
        if not isinstance(inner, dict):
            raise EvalError(f"--set {text}: {section} is {describe(inner)}, not a section")
        settings = inner
    try:
        settings[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise EvalError(f"--set {text}: the value is not YAML: {error}") from error


def _kind(method: str) -> Any:
    """The class of a method by its name or import path."""
    try:
        return find(method)
    except ValueError as error:
        raise EvalError(f"methods: {error}") from error


def _check_names(own: Sequence[str], taken: Collection[str]) -> None:
    """EvalError for methods and benchmarks of one's own whose section would be something else."""
    for name in own:
        if name in taken or own.count(name) > 1:
            raise EvalError(
                f"the name {name} is taken: a setting, a task or another section of the "
                f"configuration is called so; give your method or benchmark another"
            )


def _is_path(method: Any) -> bool:
    return isinstance(method, str) and ":" in method


def _foreign(methods: Any) -> dict[str, Any]:
    """The classes of the methods that are given by import path, by their own names."""
    given = methods if isinstance(methods, (list, tuple)) else ()
    return {kind.name: kind for kind in map(_kind, filter(_is_path, given))}


def _build(kind: Any, options: Mapping[str, Any]) -> Any:
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise EvalError(f"section {kind.name}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value

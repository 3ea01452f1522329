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

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from eval.errors import EvalError
from eval.runs.images import MAX_PIXELS
from eval.benchmarks.mmvp import LABELS
from eval.benchmarks.parsers import AMBER_PARSERS, HALLUSIONBENCH_PARSERS, MME_PARSERS, PARSERS
from eval.benchmarks.pope import STRATEGIES
from eval.benchmarks.rows import read_text
from eval.runs.schema import check, check_names, check_positive, check_section, describe, unknown
from vlm_patch.methods.registry import METHODS as LIBRARY

METHODS: Mapping[str, Any] = LIBRARY
PARTS = ("tune", "report")
BROKEN_IMAGES = ("skip", "error")
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ChairTask:
    """CHAIR (arXiv 1809.02156): captions whose objects are looked up in the annotations.

    `images`: how many images of each split to caption, a file that lists image ids, or null for
    all. `rules` and `synonyms` choose the scorer's rule set and object vocabulary (null: the
    vocabulary that ships).
    """

    prompt: str = "Please describe this image in detail."
    max_new_tokens: int = 512
    images: int | str | None = None
    rules: str = "pattern"
    synonyms: str | None = None

    def __post_init__(self) -> None:
        check_positive("chair", self, "max_new_tokens", "images")


@dataclass(frozen=True)
class PopeTask:
    """POPE (arXiv 2305.10355): balanced questions "Is there a X in the image?", three strategies.

    `questions`: path of the official question files with {strategy} in it. Null builds them from
    the annotations with the run's seed, for `images` images of each split, `per_image` objects that
    are there and as many that are not. `prompt` holds {question}. `parser` reads the answers:
    official (all that it cannot read is a yes), strict (that is neither, and wrong) or another of
    `eval.benchmarks.parsers`.
    """

    prompt: str = "{question}"
    max_new_tokens: int = 10
    images: int = 500
    per_image: int = 3
    strategies: tuple[str, ...] = (*STRATEGIES,)
    questions: str | None = None
    parser: str = "official"

    def __post_init__(self) -> None:
        check_positive("pope", self, "max_new_tokens", "images", "per_image")
        check_names("pope.strategies", self.strategies, STRATEGIES)
        check_names("pope.parser", (self.parser,), PARSERS)
        if "{question}" not in self.prompt:
            raise EvalError(f"pope.prompt is {self.prompt!r}: it must hold {{question}}")
        if self.questions is not None and "{strategy}" not in self.questions:
            raise EvalError(
                f"pope.questions is {self.questions!r}: it must hold {{strategy}}, "
                f"as in coco_pope_{{strategy}}.json"
            )


@dataclass(frozen=True)
class FolderTask:
    """A benchmark that lies in a folder of its own (`python -m eval data NAME`, and its images).

    `prompt` holds {question}, which stands for the benchmark's own wording.
    """

    data: str | None = None
    prompt: str = "{question}"
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        check_positive(type(self).__name__.removesuffix("Task").lower(), self, "max_new_tokens")
        if "{question}" not in self.prompt:
            raise EvalError(f"prompt {self.prompt!r}: it must hold {{question}}")


@dataclass(frozen=True)
class AmberTask(FolderTask):
    """AMBER (arXiv 2311.07397): `parts` generative and discriminative; `nouns` nltk (official) or
    approximate, see `eval.benchmarks.amber_nouns`; `parser` official ("Yes" or "No" to the letter) or another
    of `eval.benchmarks.parsers`."""

    max_new_tokens: int = 512
    parts: tuple[str, ...] = ("generative", "discriminative")
    nouns: str = "nltk"
    parser: str = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("amber.parts", self.parts, ("generative", "discriminative"))
        check_names("amber.nouns", (self.nouns,), ("nltk", "approximate"))
        check_names("amber.parser", (self.parser,), AMBER_PARSERS)


@dataclass(frozen=True)
class MmeTask(FolderTask):
    """MME (arXiv 2306.13394): SUBTASK.txt with the questions, and the images in SUBTASK/; `parser`
    official (the first four characters) or another of `eval.benchmarks.parsers`."""

    parser: str = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("mme.parser", (self.parser,), MME_PARSERS)


@dataclass(frozen=True)
class MmvpTask(FolderTask):
    """MMVP (arXiv 2401.06209): Questions.csv, and the images in "MMVP Images/"; `labels` published,
    or corrected in four places."""

    labels: str = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("mmvp.labels", (self.labels,), LABELS)


@dataclass(frozen=True)
class HallusionBenchTask(FolderTask):
    """HallusionBench (arXiv 2310.14566): HallusionBench.json, and the figures by category.

    `parser`: a name of `eval.benchmarks.parsers`. The published reading is a judge's, which a run has not:
    `eval score hallusionbench --judge`.
    """

    max_new_tokens: int = 128
    parser: str = "strict"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("hallusionbench.parser", (self.parser,), HALLUSIONBENCH_PARSERS)


OWN_FOLDER: Mapping[str, Any] = {
    "amber": AmberTask,
    "mme": MmeTask,
    "mmvp": MmvpTask,
    "hallusionbench": HallusionBenchTask,
}
TASKS: Mapping[str, Any] = {"chair": ChairTask, "pope": PopeTask, **OWN_FOLDER}


@dataclass(frozen=True)
class Config:
    """One model with its methods on one data set; `options` holds the section of each method.

    From `revision` to `attn_implementation` the settings go to from_pretrained; `quantization` is
    its quantization_config, as in {load_in_4bit: true}. Where none of `device_map`, `tp_plan` and
    `quantization` places the model, it goes to `device` as a whole. `chat_template` is Jinja that
    renders prompts, for a model whose processor has none. `part`: of all images only the
    half to tune on, or the half to report (see `sweep`). `limit` keeps only so many images of each
    split and task. `broken_images: error` stops at an image that cannot be read
    rather than list it as skipped; one of more than `max_pixels` is not read. `layers` and `heads`
    go to `wrap`.
    """

    model: str = "pocket"
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    tp_plan: str | Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    attn_implementation: str | None = None
    chat_template: str | None = None
    data: str = "pocket"
    splits: tuple[str, ...] = ()
    part: str | None = None
    tasks: tuple[str, ...] = ("chair", "pope")
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    broken_images: str = "skip"
    max_pixels: int = MAX_PIXELS
    methods: tuple[str, ...] = ()
    layers: Any = None
    heads: Any = None
    chair: ChairTask = field(default_factory=ChairTask)
    pope: PopeTask = field(default_factory=PopeTask)
    amber: AmberTask = field(default_factory=AmberTask)
    mme: MmeTask = field(default_factory=MmeTask)
    mmvp: MmvpTask = field(default_factory=MmvpTask)
    hallusionbench: HallusionBenchTask = field(default_factory=HallusionBenchTask)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive("", self, "limit", "batch_size", "max_pixels")
        check_names("tasks", self.tasks, TASKS)
        check_names("methods", self.methods, METHODS)
        check_names("dtype", (self.dtype,), DTYPES)
        if not self.tasks:
            raise EvalError(f"tasks is empty: name at least one of {', '.join(TASKS)}")
        for name in (task for task in self.tasks if task in OWN_FOLDER):
            if getattr(self, name).data is None:
                raise EvalError(
                    f"{name}.data: name the folder of {name}, for example --set {name}.data=DIR; "
                    f"python -m eval data {name} --to DIR fetches it or says how to get it"
                )
        check_names("part", (self.part,) if self.part else (), PARTS)
        check_names("broken_images", (self.broken_images,), BROKEN_IMAGES)
        placing = [key for key in ("device", "device_map", "tp_plan") if getattr(self, key)]
        if len(placing) > 1:
            raise EvalError(f"{' and '.join(placing)} are both set: keep one")
        if not isinstance(self.quantization, (Mapping, NoneType)):
            raise EvalError(
                f"quantization: expected a section such as {{load_in_4bit: true}}, "
                f"found {describe(self.quantization)}"
            )
        for name in {*self.options} - {*self.methods}:
            raise EvalError(
                f"section {name}: the run does not use {name} (methods: {[*self.methods]}); "
                f"add it to methods or drop the section"
            )
        self.build_methods()

    def build_methods(self) -> list[Any]:
        """The methods in the order given, each with its options."""
        return [_build(name, self.options.get(name, {})) for name in self.methods]

    def settings(self) -> dict[str, Any]:
        """The resolved settings as plain YAML values; `from_settings` reads them back."""
        values = dataclasses.asdict(self)
        sections: Mapping[str, Any] = values.pop("options")
        plain: dict[str, Any] = _plain({**values, **sections})
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
    del hints["options"]
    values: dict[str, Any] = {}
    options: dict[str, Mapping[str, Any]] = {}
    for key, value in settings.items():
        if key in METHODS:
            options[key] = check_section(key, value, METHODS[key])
        elif key in TASKS:
            values[key] = TASKS[key](**check_section(key, value, TASKS[key]))
        elif key in hints:
            values[key] = check(key, value, hints[key])
        else:
            raise EvalError(unknown("setting", key, [*hints, *METHODS]))
    return Config(**values, options=options)


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


def _build(name: str, options: Mapping[str, Any]) -> Any:
    try:
        return METHODS[name](**options)
    except (TypeError, ValueError) as error:
        raise EvalError(f"section {name}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value

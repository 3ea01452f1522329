"""The shipped configs: every key, and values that fit the model and are the library's own."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from eval.runs.config import METHODS, load
from vlm_patch import PAI, PAINT
from vlm_patch.method import ModelInfo
from vlm_patch.models.info import _profile

CONFIGS = Path(__file__).parents[3] / "configs"
RESULTS = CONFIGS.parent / "docs" / "results.md"
SHIPPED = sorted(CONFIGS.glob("*/*.yaml"))
PLAIN = {"baseline", "var", "gift", "vhr"}


@dataclass(frozen=True)
class Known:
    """A model by its public config: decoder depth, query heads, key heads, width.

    files: what is there beside PLAIN. published: the methods whose authors give settings for it.
    paint: whether the patches of its vision tower can be told.
    """

    hub: str
    depth: int
    heads: int
    key_heads: int
    width: int
    kind: Callable[[Any], Any]
    files: set[str]
    published: set[str]
    paint: bool = True


def llava(text: Any) -> Any:
    return hf.LlavaConfig(text_config=hf.LlamaConfig(**text))


def llava_next(text: Any) -> Any:
    return hf.LlavaNextConfig(text_config=hf.LlamaConfig(**text))


def instructblip(text: Any) -> Any:
    return hf.InstructBlipConfig(text_config=hf.LlamaConfig(**text).to_dict())


def internvl(text: Any) -> Any:
    return hf.InternVLConfig(text_config=hf.Qwen2Config(**text))


def qwen2_vl(text: Any) -> Any:
    return hf.Qwen2VLConfig(text_config=text)


def qwen2_5_vl(text: Any) -> Any:
    return hf.Qwen2_5_VLConfig(text_config=text)


def qwen3_vl(text: Any) -> Any:
    return hf.Qwen3VLConfig(text_config=text)


RESIDUAL = {"vista", "memvr"}
ATTENTION = {"iat", "sparc", "pai", "vaf", "devils", "mass_target"}
LOGITS = {"vcd", "icd", "m3id", "dola", "deco"}
"""The methods that edit logits, which have files for one model and for the pocket model."""
BOTH = {"gift-release", "vhr-paper", "var-release", "paint-paper", "paint-release"}
MODELS = {
    "llava-1.5-7b": Known(
        "llava-hf/llava-1.5-7b-hf",
        *(32, 32, 32, 4096, llava),
        {"all", "pai-release", *ATTENTION, *BOTH, *RESIDUAL, *LOGITS, "nullu", "steering"},
        {"var", "gift", "vhr", "paint", "pai", "vaf", "devils", "iat", "sparc", *RESIDUAL, "nullu"}
        | {"vcd", "deco"},
    ),
    "llava-1.5-13b": Known(
        "llava-hf/llava-1.5-13b-hf",
        *(40, 40, 40, 5120, llava),
        {"gift-release", "var-release"},
        {"var", "gift"},
    ),
    "llava-next-7b": Known(
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        *(32, 32, 32, 4096, llava_next),
        {"vhr-paper"},
        {"vhr"},
    ),
    "instructblip-7b": Known(
        "Salesforce/instructblip-vicuna-7b",
        *(32, 32, 32, 4096, instructblip),
        {"vhr-paper"},
        {"vhr"},
        paint=False,
    ),
    "qwen2-vl-7b": Known(
        "Qwen/Qwen2-VL-7B-Instruct",
        *(28, 28, 4, 3584, qwen2_vl),
        {"gift-release"},
        {"var", "gift"},
    ),
    "qwen2.5-vl-7b": Known(
        "Qwen/Qwen2.5-VL-7B-Instruct", *(28, 28, 4, 3584, qwen2_5_vl), set(), set(), False
    ),
    "qwen3-vl-8b": Known("Qwen/Qwen3-VL-8B-Instruct", *(36, 32, 8, 4096, qwen3_vl), set(), set()),
    "internvl3-8b": Known("OpenGVLab/InternVL3-8B-hf", *(28, 28, 4, 3584, internvl), set(), set()),
}
LARGE = [path for path in SHIPPED if path.parent.name in MODELS]
ONE_METHOD = [path for path in LARGE if path.stem in METHODS]
BROUGHT = ("nullu", "steering")
"""Methods whose tensors are a file of the user's, so that nothing is known of them here."""
OWN_VALUES = [path for path in ONE_METHOD if path.stem not in BROUGHT]


def name(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def facts(known: Known, method: str) -> ModelInfo:
    """What the library knows of a model of this size: its config as transformers makes it."""
    text = {
        "num_hidden_layers": known.depth,
        "num_attention_heads": known.heads,
        "num_key_value_heads": known.key_heads,
        "hidden_size": known.width,
    }
    config = known.kind(text)
    profile = _profile(config.get_text_config(), config.model_type).get(method, {})
    return ModelInfo(known.depth, known.width, known.heads, profile)


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_every_config_loads_and_holds_the_sections_of_its_methods(path: Path) -> None:
    made = load(path)
    stem = path.stem.split("-")[0]
    wanted = {"baseline": [], "all": ["var", "gift", "vhr"]}.get(stem, [stem])
    wanted = [] if path.parent.name == "trivial" else wanted
    assert [*made.methods] == wanted
    assert [type(method) for method in made.build_methods()] == [METHODS[name] for name in wanted]
    assert {*made.options} == {*wanted}


def test_every_model_has_its_files() -> None:
    wanted = {folder: PLAIN | known.files for folder, known in MODELS.items()}
    wanted["pocket"] = PLAIN | ATTENTION | RESIDUAL | LOGITS | {"all", "adhh"}
    for folder in wanted:
        if folder == "pocket" or MODELS[folder].paint:
            wanted[folder].add("paint")
    wanted["trivial"] = {"tokens-24", "tokens-32", "brief", "temperature"}
    assert {f.name: {path.stem for path in f.iterdir()} for f in CONFIGS.iterdir()} == wanted


@pytest.mark.parametrize("folder", [*MODELS, "pocket"])
def test_the_configs_of_a_model_differ_in_methods_only(folder: str) -> None:
    made = [load(path).settings() for path in sorted((CONFIGS / folder).iterdir())]
    for settings in made:
        for key in ("methods", *METHODS):
            settings.pop(key, None)
    assert all(settings == made[0] for settings in made)


@pytest.mark.parametrize("folder", MODELS)
def test_the_protocol_is_in_the_config(folder: str) -> None:
    made = load(CONFIGS / folder / "baseline.yaml")
    assert made.model == MODELS[folder].hub
    assert (made.tasks, made.splits) == (("chair", "pope"), ("val2014",))
    assert made.sections["chair"].prompt == "Please describe this image in detail."
    assert (made.sections["chair"].max_new_tokens, made.sections["chair"].images) == (512, 500)
    assert (made.sections["pope"].prompt, made.sections["pope"].max_new_tokens) == (
        "{question}",
        10,
    )
    assert (
        made.sections["pope"].images,
        made.sections["pope"].per_image,
        len(made.sections["pope"].strategies),
    ) == (500, 3, 3)


def test_a_trivial_baseline_differs_in_one_thing() -> None:
    base = load(CONFIGS / "pocket" / "baseline.yaml").settings()
    changed = {
        "tokens-24": ("chair", {**base["chair"], "max_new_tokens": 24}),
        "tokens-32": ("chair", {**base["chair"], "max_new_tokens": 32}),
        "brief": ("chair", {**base["chair"], "prompt": "Please describe this image briefly."}),
        "temperature": ("temperature", 0.7),
    }
    for stem, (key, value) in changed.items():
        found = load(CONFIGS / "trivial" / f"{stem}.yaml").settings()
        # the scenes are drawn by all sections, so POPE's counts though it is not asked
        assert found == {**base, "tasks": ["chair"], key: value}


@pytest.mark.parametrize("path", [p for p in LARGE if p.stem not in BROUGHT], ids=name)
def test_layers_and_channels_are_there_in_the_model(path: Path) -> None:
    known, made = MODELS[path.parent.name], load(path)
    for method in made.build_methods():
        fitted, scaled = method.resolve(facts(known, method.name))
        assert scaled == [], "a config leaves nothing to be scaled"
        assert 0 < len(fitted.default_layers(known.depth)) <= known.depth
        assert max(fitted.default_layers(known.depth)) < known.depth
    assert (made.layers, made.heads) == (None, None)


@pytest.mark.parametrize("path", OWN_VALUES, ids=name)
def test_the_library_takes_the_values_of_the_config_by_itself(path: Path) -> None:
    """The plain configs are what wrap(model, "gift") comes to; what is published, without scaling.

    VAR's published tau is 20 at every width, where the library takes 20 for a width of 4096; where
    nothing is published, it is measured.
    """
    known = MODELS[path.parent.name]
    seen = facts(known, path.stem)
    (configured,) = load(path).build_methods()
    fitted, scaled = METHODS[path.stem]().resolve(seen)
    written = vars(configured.resolve(seen)[0])
    if path.stem == "var":
        assert written["dims"] == seen.profile.get("dims")
        assert written.pop("tau") == (20.0 if seen.profile else None)
    assert written == {key: value for key, value in vars(fitted).items() if key in written}
    if path.stem in known.published:
        own = {"paint", "pai", "vista", "vcd", "deco"}  # whose defaults are for LLaVA-1.5-7B
        assert (bool(seen.profile) or path.stem in own, scaled) == (True, [])


@pytest.mark.parametrize("path", ONE_METHOD, ids=name)
def test_a_config_says_whether_its_values_are_published(path: Path) -> None:
    text = " ".join(path.read_text().replace("\n#", "").split())
    published = path.stem in MODELS[path.parent.name].published
    assert ("as published for this model" in text) == published
    assert bool(re.search("no published setting for this model", text)) != published


PUBLISHED = [
    (
        "llava-1.5-7b/var",
        {"move_fraction": 0.6, "rho_nonsink": 0.5, "min_image_mass": 0.2, "tau": 20.0}
        | {"dims": (1415, 2533), "semantics": "paper", "exclude_last_layer": True},
    ),
    ("llava-1.5-13b/var", {"dims": (2100, 4743), "tau": 20.0, "move_fraction": 0.6}),
    ("qwen2-vl-7b/var", {"dims": (458, 2570), "tau": 20.0, "rho_nonsink": 0.5}),
    (
        "llava-1.5-7b/var-release",
        {"move_fraction": 0.4, "rho_nonsink": 0.5, "tau": 20.0, "dims": (1415, 2533)}
        | {"semantics": "release", "first_layer": 2, "exclude_last_layer": False}
        | {"require_visual_sink": True},
    ),
    (
        "llava-1.5-7b/gift",
        {"alpha": 5.0, "beta": 1.0, "saliency_layer": 11, "layers": (*range(12, 23),)},
    ),
    (
        "llava-1.5-13b/gift",
        {"alpha": 5.0, "beta": 1.0, "saliency_layer": 10, "layers": (*range(14, 21),)},
    ),
    (
        "qwen2-vl-7b/gift-release",
        {"alpha": 4.0, "saliency_layer": 14, "layers": (*range(5, 19),), "words": "spacy"},
    ),
    (
        "llava-1.5-7b/vhr",
        {"alpha": 2.0, "layers": (1, *range(18, 32)), "filter": True, "semantics": "release"},
    ),
    ("llava-next-7b/vhr-paper", {"layers": (1, *range(18, 32)), "semantics": "paper"}),
    ("llava-1.5-7b/paint", {"alpha": 0.7, "beta": 0.4, "rho": 0.15, "layers": (*range(2, 32),)}),
    ("llava-1.5-7b/paint-paper", vars(PAINT.paper()) | {"layers": (*range(2, 32),)}),
    ("llava-1.5-7b/paint-release", vars(PAINT.release()) | {"layers": (*range(2, 32),)}),
    ("llava-1.5-7b/pai", {"alpha": 0.5, "layers": (*range(2, 32),), "semantics": "paper"}),
    ("llava-1.5-7b/pai-release", vars(PAI.release()) | {"layers": (*range(2, 32),)}),
    ("llava-1.5-7b/vaf", {"visual": 1.15, "system": 0.95, "layers": (*range(9, 15),)}),
    ("llava-1.5-7b/devils", {"alpha": 0.5, "layers": (*range(5, 19),)}),
    ("llava-1.5-7b/vista", {"strength": 0.17, "layers": (*range(32),)}),
    ("llava-1.5-7b/memvr", {"share": 0.12, "threshold": 0.75, "layers": (*range(7, 17),)}),
    ("llava-1.5-7b/nullu", {"rank": 4, "layers": (*range(16, 32),)}),
    ("instructblip-7b/vhr", {"alpha": 2.0, "layers": (*range(14, 32),), "filter": True}),
]


@pytest.mark.parametrize(("path", "values"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_values(path: str, values: dict[str, Any]) -> None:
    (method,) = load(CONFIGS / f"{path}.yaml").build_methods()
    assert {key: getattr(method, key) for key in values} == values


def test_three_methods_together_are_the_three_alone() -> None:
    folder = CONFIGS / "llava-1.5-7b"
    alone = {name: load(folder / f"{name}.yaml").options[name] for name in ("var", "gift", "vhr")}
    assert load(folder / "all.yaml").options == alone


def rows() -> list[list[str]]:
    """The rows of the tables of published numbers, as cells."""
    section = RESULTS.read_text().partition("## Published numbers")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    return [row for row in cells if len(row) > 1 and row[1].startswith("`")]


def test_the_results_name_configs_that_load_beside_every_published_number() -> None:
    assert len(rows()) == 24
    for row in rows():
        path, *options = shlex.split(row[1].strip("`"))
        made = load(CONFIGS / path, [word for word in options if word != "--set"])
        assert made.model == MODELS[path.split("/")[0]].hub
        assert row[2] in ("CHAIR", "POPE")
        assert row[-1] == "not run here"


def test_stock_numbers_stand_beside_the_stock_model() -> None:
    for row in rows():
        assert ("baseline.yaml" in row[1]) == (row[4] == "")

"""Settings: precedence, types, and what is said of a wrong one."""

from pathlib import Path

import pytest
import yaml

from eval.benchmarks.chair.benchmark import ChairSettings
from eval.benchmarks.pope.benchmark import PopeSettings
from eval.errors import EvalError
from eval.runs.config import Config, from_settings, load
from vlm_patch import GIFT, VAR, VHR


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("methods: [gift]\ngift: {alpha: 4.0, beta: 0.5}\nbatch_size: 3\n")
    return path


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(file: Path) -> None:
    made = load(file, ["gift.alpha=2", "chair.max_new_tokens=64", "splits=[test]"])
    assert [type(method) for method in made.build_methods()] == [GIFT]
    assert made.options == {"gift": {"alpha": 2.0, "beta": 0.5}}
    assert (made.batch_size, made.seed, made.splits) == (3, 0, ("test",))
    assert made.sections["chair"] == ChairSettings(max_new_tokens=64)
    assert made.sections["pope"] == PopeSettings()


def test_without_a_file_the_defaults_are_the_stock_pocket_model() -> None:
    made = load(None)
    assert made == Config()
    assert (made.model, made.data, made.methods) == ("pocket", "pocket", ())


@pytest.mark.parametrize("name", ["batch_size", "methods", "chair"])
def test_a_method_may_not_be_called_as_a_setting_or_a_task(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = (
        "from dataclasses import dataclass\nfrom vlm_patch import Method\n\n"
        f"@dataclass(frozen=True)\nclass Mine(Method):\n    name = {name!r}\n"
    )
    (tmp_path / f"own_{name}.py").write_text(write)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EvalError, match=f"the name {name} is taken: a setting, a task or another"):
        from_settings({"methods": [f"own_{name}:Mine"]})


@pytest.mark.parametrize("name", ["batch_size", "mine"])
def test_a_benchmark_may_not_be_called_as_a_setting_or_a_method_of_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = (
        "from dataclasses import dataclass\nfrom vlm_patch import Method\n"
        "from eval.benchmarks.base import Benchmark, FolderSettings\n\n"
        "@dataclass(frozen=True)\nclass Mine(Method):\n    name = 'mine'\n\n"
        f"class Task(Benchmark):\n    name = {name!r}\n    settings = FolderSettings\n"
        "    samples = tallies = lambda *_: ()\n"
    )
    (tmp_path / f"task_{name}.py").write_text(write)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"methods": [f"task_{name}:Mine"], "tasks": [f"task_{name}:Task"]}
    with pytest.raises(EvalError, match=f"the name {name} is taken"):
        from_settings(own)


def test_methods_keep_their_order() -> None:
    made = from_settings({"methods": ["vhr", "var"], "var": {"dims": [1, 2]}, "vhr": None})
    assert made.build_methods() == [VHR(), VAR(dims=(1, 2))]


def test_one_saliency_layer_or_several() -> None:
    made = [load(None, ["methods=[gift]", f"gift.saliency_layer={v}"]) for v in ("3", "[3, 5]")]
    methods = [config.build_methods()[0] for config in made]
    assert [method.saliency_layer for method in methods] == [3, (3, 5)]
    assert from_settings(yaml.safe_load(yaml.safe_dump(made[1].settings()))) == made[1]


def test_settings_can_be_read_back(file: Path) -> None:
    made = load(file, ["heads.gift={1: [0, 3]}", "pope.strategies=[popular]"])
    written = yaml.safe_dump(made.settings())
    assert from_settings(yaml.safe_load(written)) == made


def test_numbers_written_as_yaml_text_are_numbers() -> None:
    made = load(None, ["methods=[gift, vhr]", "gift.alpha=1e-3", "vhr.alpha=3"])
    assert [method.alpha for method in made.build_methods()] == [0.001, 3.0]
    assert type(made.options["vhr"]["alpha"]) is float


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bach_size=2"], "unknown setting: bach_size; did you mean batch_size?"),
        (["chair.prompts=x"], "unknown key in section chair: prompts; did you mean prompt?"),
        (
            ["methods=[gift]", "gift.alhpa=4"],
            "unknown key in section gift: alhpa; did you mean alp",
        ),
        (["methods=[gfit]"], "unknown name in methods: gfit; did you mean gift?"),
        (["methods=[gift, gift]"], "methods names gift twice"),
        (["tasks=[chiar]"], "unknown name in tasks: chiar; did you mean chair?"),
        (["tasks=[]"], "tasks is empty: name at least one of chair, pope"),
        (["dtype=float8"], "unknown name in dtype: float8; did you mean float"),
        (["batch_size=two"], r"batch_size: expected an integer, found 'two' \(text\)"),
        (["batch_size=true"], r"batch_size: expected an integer, found True"),
        (["batch_size=0"], "batch_size: expected an integer of at least 1, found 0"),
        (["limit=-1"], "limit: expected an integer of at least 1, found -1"),
        (["chair.images=0"], "chair.images: expected an integer of at least 1, found 0"),
        (["methods=gift"], r"methods: expected a list of names, found 'gift' \(text\)"),
        (["methods=[gift]", "gift.alpha=much"], r"gift.alpha: expected a number or nothing \(null"),
        (["methods=[var]", "var.move_fraction=2"], "section var: VAR move_fraction"),
        (["methods=[var]", "gift.alpha=4"], r"section gift: the run does not use gift .*\['var'\]"),
        (["chair=3"], r"chair: expected a section \(key: value lines\), found 3"),
        (["gift.alpha"], "--set gift.alpha: expected key=value, for example"),
        (["=3"], "--set =3: expected key=value"),
        (["seed=[1"], r"--set seed=\[1: the value is not YAML"),
        (["pope.prompt=Hello?"], "pope.prompt is 'Hello\\?': it must hold {question}"),
        (["pope.questions=a.json"], "pope.questions is 'a.json': it must hold {strategy}"),
        (["pope.strategies=[populr]"], "unknown name in pope.strategies: populr; did you mean pop"),
        (["device=cpu", "device_map=auto"], "device and device_map are both set"),
        (["tp_plan=auto", "device_map=auto"], "device_map and tp_plan are both set: keep one"),
        (["quantization=4bit"], r"quantization: expected a section such as {load_in_4bit: true}"),
        (["broken_images=hide"], "unknown name in broken_images: hide; .*Known: skip, error"),
    ],
)
def test_wrong_settings_are_explained(overrides: list[str], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        load(None, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n- b", "expected `key: value` lines"),
        ("gift:\n  alpha: 4", "the run does not use gift"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(EvalError, match=message):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"nothing\.yaml: no such file"):
        load(tmp_path / "nothing.yaml")


def test_a_setting_is_no_section(file: Path) -> None:
    with pytest.raises(EvalError, match=r"--set batch_size.x=1: batch_size is 3 .* not a section"):
        load(file, ["batch_size.x=1"])

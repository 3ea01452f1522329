"""Sweeps of the pocket model: every point scored, one chosen, and that one reported held out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.__main__ import main
from eval.errors import EvalError
from eval.reports import table
from eval.runs import config, generate, runner, samples, workers
from eval.runs.batches import Batch
from eval.runs.config import Config
from eval.runs.folder import RunFolder
from eval.studies import grid, sweep
from eval.studies.grid import Point
from eval.studies.sweep import Sweep

SMALL = {
    "model": "pocket",
    "data": "pocket",
    "splits": ["test"],
    "tasks": ["chair"],
    "methods": ["gift"],
    "gift": {"alpha": 4.0, "saliency_layer": 1, "layers": [2, 3]},
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 16,
    "chair": {"images": 14, "max_new_tokens": 40},
    "pope": {"images": 5, "per_image": 1, "max_new_tokens": 2},
}
Models = tuple[Any, Any]
Make = Callable[..., Sweep]


@pytest.fixture(scope="module")
def pocket() -> Models:
    return generate.load_model(Config(dtype="float32", device="cpu"))


@pytest.fixture
def wanted(tmp_path: Path) -> Make:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return lambda **values: Sweep(file, **values)


def images(folder: Path) -> set[str]:
    return {row["image"] for row in RunFolder(folder).rows()}


def test_the_best_point_of_the_grid_is_reported_on_other_images(
    wanted: Make, pocket: Models, tmp_path: Path
) -> None:
    loads: list[Config] = []

    def load(of: Config) -> Models:
        loads.append(of)
        return pocket

    out, measured = tmp_path / "out", wanted(grids=("gift.alpha=0,6", "gift.beta=1"), measure="f1")
    found = sweep.sweep(measured, out, load)
    assert len(loads) == 1, "one loaded model"
    names = ["stock", "gift.alpha=0,gift.beta=1", "gift.alpha=6,gift.beta=1"]
    assert [*found["tune"]] == names
    scores = {}
    for name in names:
        folder = out / "tune" / name
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics == found["tune"][name]
        scores[name] = metrics["chair"]["test"]["f1"]
        assert images(folder) == images(out / "tune" / "stock")
    assert scores[names[1]] != scores[names[2]], "the grid changes something"
    assert found["chosen"] == max(names[1:], key=lambda name: scores[name])
    assert {path.name for path in (out / "report").iterdir()} == {"stock", found["chosen"]}
    held_out = images(out / "report" / found["chosen"])
    assert held_out == images(out / "report" / "stock")
    assert held_out & images(out / "tune" / "stock") == set()
    assert len(held_out | images(out / "tune" / "stock")) == 14
    table = (out / "table.md").read_text()
    assert f"| **{found['chosen']}** | test " in table
    assert "Chosen by f1, more is better" in table
    assert "POPE" not in table
    shown = sweep.markdown(found, out)
    assert "On held-out images:" in shown
    assert f"{found['chosen']} minus stock on the same images" in shown

    again = sweep.sweep(measured, out, lambda _: pytest.fail("the model was loaded again"))
    assert again == found
    for other in (replace(measured, measure="recall"), replace(measured, grids=("gift.alpha=0",))):
        with pytest.raises(EvalError, match=r"reported the held-out images already, .* changed\)"):
            sweep.sweep(other, out, load)


def test_an_interrupted_sweep_goes_on_and_may_grow_until_it_reports(
    wanted: Make, pocket: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "out", runner.run

    def stops(config: Config, folder: Path, **more: Any) -> Any:
        if folder.name == "gift.alpha=6":
            raise KeyboardInterrupt
        return made(config, folder, **more)

    small = ("chair.images=8", "chair.max_new_tokens=24")
    with monkeypatch.context() as patched:
        patched.setattr(runner, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(wanted(overrides=small, grids=("gift.alpha=0,6",)), out, lambda _: pocket)
    assert not (out / "report").exists()
    kept = (out / "tune" / "gift.alpha=0" / "answers.jsonl").stat().st_mtime_ns
    grown = wanted(overrides=small, grids=("gift.alpha=0,6,8",), measure="chair_s")
    found = sweep.sweep(grown, out, lambda _: pocket)
    assert [*found["tune"]] == ["stock", "gift.alpha=0", "gift.alpha=6", "gift.alpha=8"]
    assert (out / "tune" / "gift.alpha=0" / "answers.jsonl").stat().st_mtime_ns == kept


def test_layers_are_tried_one_by_one(wanted: Make, pocket: Models, tmp_path: Path) -> None:
    small = ("chair.images=8", "chair.max_new_tokens=24")
    out = tmp_path / "out"
    found = sweep.sweep(wanted(overrides=small, grid_heads="layers"), out, lambda _: pocket)
    assert [*found["tune"]] == ["stock", "layer=2", "layer=3"], "GIFT acts in layers 2 and 3"
    record = RunFolder(out / "tune" / "layer=3").record()
    assert record["settings"]["heads"] == {"gift": {3: [*range(8)]}}
    assert pocket[0].config.text_config._attn_implementation == "sdpa", "the patch is off again"


def test_an_engine_with_processes_of_its_own_answers_every_run(
    wanted: Make, pocket: Models, tmp_path: Path
) -> None:
    """It gets the function that loads a model, which can travel, not one that keeps the model."""
    given: list[tuple[str, object]] = []

    def load(_: Config) -> Models:
        return pocket

    def engine(batches: Sequence[Batch], config: Config, load: workers.Load) -> workers.Answers:
        given.append((str(config.part), load))
        return workers.answer_here(batches, config, load)

    small = ("chair.images=8", "chair.max_new_tokens=24")
    sweep.sweep(wanted(overrides=small, grids=("gift.alpha=6",)), tmp_path, load, engine)
    assert given == [("tune", load)] * 2 + [("report", load)] * 2


def test_a_split_of_its_own_to_tune_on(wanted: Make, pocket: Models, tmp_path: Path) -> None:
    small = ("chair.images=3", "chair.max_new_tokens=24", "splits=[test, calibration]")
    chosen = wanted(overrides=small, grids=("gift.alpha=0,6",), tune_split="calibration")
    sweep.sweep(chosen, tmp_path / "out", lambda _: pocket)
    tuned = RunFolder(tmp_path / "out" / "tune" / "gift.alpha=6")
    assert {row["split"] for row in tuned.rows()} == {"calibration"}
    reported = RunFolder(tmp_path / "out" / "report" / "stock")
    assert {row["split"] for row in reported.rows()} == {"test"}
    assert (len(tuned.rows()), len(reported.rows())) == (3, 3)


def test_nothing_is_tuned_on_what_is_reported(
    wanted: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Config) -> Models:
        raise AssertionError("the model was loaded")

    one = wanted(overrides=("chair.images=1",), grids=("gift.alpha=0,6",))
    with pytest.raises(EvalError, match=r"[01] images to tune on and [01] to report"):
        sweep.sweep(one, tmp_path / "out", load)
    with pytest.raises(EvalError, match="--tune-split test leaves no split to report"):
        sweep.sweep(replace(one, tune_split="test"), tmp_path / "out", load)
    sample = samples.Sample("chair", "test", "1", Path("1.png"), "Describe.", {})
    monkeypatch.setattr(samples, "samples", lambda *_: [sample])
    both = wanted(overrides=("splits=[test, break]",), grids=("gift.alpha=0",), tune_split="break")
    with pytest.raises(EvalError, match=r"1 images, for example 1\.png, are in break and in a"):
        sweep.sweep(both, tmp_path / "out", load)


def test_halves_are_fixed_by_the_name_of_an_image(tmp_path: Path) -> None:
    """About half each, whatever the seed and the folder."""
    parts = [samples.part(tmp_path / f"{number:012d}.jpg") for number in range(1000)]
    assert parts == [samples.part(Path(f"{number:012d}.jpg")) for number in range(1000)]
    assert 450 < parts.count("tune") < 550
    made = {
        part: samples.samples(config.from_settings(SMALL | {"part": part}), tmp_path)
        for part in ("tune", "report")
    }
    whole = samples.samples(config.from_settings(SMALL), tmp_path)
    assert sorted(s.id for s in [*made["tune"], *made["report"]]) == sorted(s.id for s in whole)


def metrics(chair_s: float, **more: float) -> dict[str, Any]:
    healthy = {"no_object_share": 0.0, "looping_share": 0.0, "chair_i": chair_s / 2}
    return {"chair": {"test": {"chair_s": chair_s, **healthy, **more, "intervals": {}}}}


def test_a_point_that_degenerates_is_not_chosen() -> None:
    a, b, c = (Point(name, ()) for name in "abc")
    tried = {a: metrics(0.4), b: metrics(0.01, no_object_share=0.84), c: metrics(0.3)}
    base = Config()
    assert sweep._best(tried, base, "chair_s") == c
    same = {a: metrics(0.4), c: metrics(0.4)}
    assert sweep._best(same, base, "chair_s") == a, "the first of equals"
    with pytest.raises(EvalError, match="rings at every point"):
        sweep._best({b: tried[b]}, base, "chair_s")


@pytest.mark.parametrize("name", ["baseline", "gift", "all"])
def test_the_alarm_does_not_ring_for_the_pocket_model(
    name: str, pocket: Models, tmp_path: Path
) -> None:
    """The shipped configurations; of GIFT's 200 captions in the demo one loops."""
    shipped = Path(__file__).parents[3] / "configs" / "pocket" / f"{name}.yaml"
    small = ["splits=[test]", "tasks=[chair]", "chair.images=16", "pope.images=1", "device=cpu"]
    found = runner.run(config.load(shipped, small), tmp_path / "run", load=lambda _: pocket)
    assert found["chair"]["test"]["alarms"] == []
    assert found["chair"]["test"]["chair_s"] < 0.7
    assert "| degeneration alarm" in table.markdown([tmp_path / "run"])


def test_measures_are_means_over_splits_and_strategies() -> None:
    found: dict[str, Any] = {
        "chair": {"test": {"f1": 0.5, "intervals": {}}, "break": {"f1": 0.7, "intervals": {}}},
        "pope": {
            "test": {
                "random": {"accuracy": 0.9, "intervals": {}},
                "popular": {"accuracy": 0.8, "intervals": {}},
            }
        },
    }
    known = sweep.measures(Config())
    assert {"f1", "recall", "chair_s", "chair_i", "chair_i_distinct"} < {*known}
    assert {"pope_accuracy", "pope_f1"} < {*known}
    assert "mean_tokens" not in known, "no length is better than another"
    assert sweep.score(found, *known["f1"]) == pytest.approx(0.6)
    assert sweep.score(found, *known["pope_accuracy"]) == pytest.approx(0.85)
    with pytest.raises(EvalError, match="--measure f1: the run has no f1 of chair"):
        sweep.score({"pope": found["pope"]}, *known["f1"])


def test_the_grid_is_every_combination() -> None:
    found = grid.points(["var.move_fraction=0.2,0.4", "gift.layers=[1, 2],[3]"])
    assert [point.name for point in found] == [
        "var.move_fraction=0.2,gift.layers=_1_2",
        "var.move_fraction=0.2,gift.layers=_3",
        "var.move_fraction=0.4,gift.layers=_1_2",
        "var.move_fraction=0.4,gift.layers=_3",
    ]
    assert found[1].overrides == ("var.move_fraction=0.2", "gift.layers=[3]")
    made = config.load(None, ["methods=[var, gift]", *found[2].overrides])
    assert made.options == {"var": {"move_fraction": 0.4}, "gift": {"layers": (1, 2)}}


def test_spots_are_the_layers_or_heads_where_a_method_acts() -> None:
    var, vhr = torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)
    var[1], vhr[1, 1], vhr[2, 0] = True, True, True
    layers = grid.spots({"var": var, "vhr": vhr}, "layers")
    assert [(point.name, point.overrides) for point in layers] == [
        ("layer=1", ("heads={var: {1: [0, 1]}, vhr: {1: [1]}}",)),
        ("layer=2", ("heads={var: {}, vhr: {2: [0]}}",)),
    ]
    heads = grid.spots({"var": var, "vhr": vhr}, "heads")
    assert [point.name for point in heads] == ["head=1.0", "head=1.1", "head=2.0"]
    assert heads[1].overrides == ("heads={var: {1: [1]}, vhr: {1: [1]}}",)
    mixed = grid.points(["vhr.alpha=1,2"], layers)
    assert [point.name for point in mixed][:2] == ["vhr.alpha=1,layer=1", "vhr.alpha=1,layer=2"]


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], "nothing to sweep: give --grid key=value,value or --grid-heads"),
        (["gift.alpha"], "--grid gift.alpha: expected key=value,value"),
        (["gift.alpha="], "--grid gift.alpha=: expected key=value,value"),
        (["chair.prompt=a,b"], "--grid chair.prompt=a,b: a sweep varies the methods and their he"),
        (["gift.alpha=[1"], r"--grid gift.alpha=\[1: the values are not YAML"),
        (["gift.alpha=1,1"], "--grid gift.alpha=1,1 names a setting or a value twice"),
    ],
)
def test_a_wrong_grid_is_explained(grids: list[str], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        grid.points(grids)


def test_the_command(wanted: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = str(wanted().path), str(tmp_path / "out")
    small = ["--limit", "8", "--set", "chair.max_new_tokens=24", "--set", "tasks=[chair, pope]"]
    command = ["sweep", file, "--out", out, *small]
    assert main([*command, "--grid", "gift.alpha=2,6", "--measure", "pope_accuracy"]) == 0
    shown = capsys.readouterr().out
    assert "POPE adversarial, accuracy %" in shown
    assert "On held-out images:" in shown
    assert main([*command, "--grid", "gift.alpha=2,6", "--measure", "luck"]) == 1
    assert "unknown name in --measure: luck" in capsys.readouterr().err
    assert main([*command, "--grid-heads", "brains"]) == 1
    assert "unknown name in --grid-heads: brains" in capsys.readouterr().err
    without = ["--set", "methods=[]", "--set", "gift=null", "--grid-heads", "heads"]
    assert main([*command, *without]) == 1
    assert capsys.readouterr().err.strip().startswith("error: ")

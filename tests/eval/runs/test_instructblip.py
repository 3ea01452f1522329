"""InstructBLIP, whose processor knows no chat, through the configs that ship for it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eval.errors import EvalError
from eval.runs import config, generate, runner, samples
from eval.runs.config import Config
from eval.runs.folder import RunFolder
from tests.support import instructblip
from vlm_patch.models import chat

CONFIGS = Path(__file__).parents[3] / "configs" / "instructblip-7b"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return instructblip.save(tmp_path_factory.mktemp("instructblip"))


@pytest.fixture
def shipped(checkpoint: Path, coco: Path) -> Callable[..., Config]:
    """A shipped config, on the tiny model and few images."""

    def make(name: str, *overrides: str) -> Config:
        small = [f"model={checkpoint}", f"data={coco}", "splits=[test]", "dtype=float32"]
        small += ["device=cpu", "chair.images=5", "chair.max_new_tokens=6"]
        small += ["pope.images=3", "pope.per_image=1", "pope.max_new_tokens=2"]
        return config.load(CONFIGS / f"{name}.yaml", [*small, *overrides])

    return make


LAYERS = {
    "gift": ("gift.saliency_layer=0", "gift.layers=[1,2]"),
    "var": ("var.dims=[3]", "var.tau=1.0", "var.min_image_mass=0.0"),
    "vhr": ("vhr.layers=[1,2]",),
}


@pytest.mark.parametrize("name", ["baseline", "gift", "var", "vhr"])
def test_a_shipped_config_runs(name: str, shipped: Callable[..., Config], tmp_path: Path) -> None:
    """In batches, padded between image and question, as one by one."""
    one, many = (
        runner.run(shipped(name, *LAYERS.get(name, ()), f"batch_size={size}"), tmp_path / str(size))
        for size in (1, 5)
    )
    assert one == many
    assert RunFolder(tmp_path / "1").rows() == RunFolder(tmp_path / "5").rows()
    assert one["answered"] == one["samples"] == 23


def test_the_methods_change_what_it_says(shipped: Callable[..., Config], tmp_path: Path) -> None:
    said = {}
    for name in ("baseline", *LAYERS):
        runner.run(shipped(name, *LAYERS.get(name, ())), tmp_path / name)
        said[name] = [row["answer"] for row in RunFolder(tmp_path / name).rows()]
    assert all(said[name] != said["baseline"] for name in LAYERS)


def test_the_prompt_is_the_image_and_the_bare_question(
    shipped: Callable[..., Config], tmp_path: Path
) -> None:
    wanted = shipped("baseline")
    asked = samples.samples(wanted, tmp_path)
    model, processor = generate.load_model(wanted)
    words = ("Is there a dog?", "Is there a dog in the image?")
    pair = [replace(asked[0], prompt=prompt) for prompt in words]
    ids = generate.encode(processor, pair)["input_ids"]
    shown = processor.tokenizer.batch_decode(ids)
    image = "<image>" * 16
    assert shown[0].replace(" ", "") == f"{image}{'<pad>' * 3}<s>Isthereadog?"
    assert shown[1].replace(" ", "") == f"{image}<s>Isthereadogintheimage?"
    assert chat.end_tokens(model) == {model.language_model.config.eos_token_id} == {2}


def test_without_the_key_the_cure_is_named(shipped: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no chat template.*--set \"chat_template=\{\{ messages"):
        runner.run(shipped("baseline", "chat_template=null"), tmp_path / "run")

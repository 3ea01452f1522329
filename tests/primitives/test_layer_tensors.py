"""Tensors that users bring by layer: how a file is read, and what is said of one that is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vlm_patch.primitives.layer_tensors import LayerTensors, check_source, read

KEY, DEPTH, WIDTH = "Steering vectors", 4, 3


def test_a_file_and_a_mapping_are_the_same(tmp_path: Path) -> None:
    tensors = {0: torch.tensor([1.0, 2, 3]), 2: torch.tensor([4.0, 5, 6])}
    path = tmp_path / "vectors.safetensors"
    save_file({"layers.2": tensors[2].half(), "0": tensors[0]}, path)
    for source in (path, str(path), tensors):
        found = read(KEY, source, "D", WIDTH, DEPTH)
        assert list(found) == [0, 2]
        assert all(torch.equal(found[layer], tensors[layer]) for layer in tensors)
    assert repr(read(KEY, path, "D", WIDTH, DEPTH)) == f"<layers [0, 2] of {path}>"


def test_a_copy_is_made_once_for_every_type() -> None:
    found = LayerTensors({1: torch.ones(3)}, "here")
    half = torch.zeros(2, dtype=torch.float16)
    assert found.near(1, half).dtype == torch.float16
    assert found.near(1, half) is found.near(1, half)
    assert found.near(1, torch.zeros(1)).dtype == torch.float32


def test_layers_without_a_tensor_are_refused() -> None:
    found = LayerTensors({1: torch.ones(3), 2: torch.ones(3)}, "<layers [1, 2] of here>")
    assert (found.choose("Layers", None), found.choose("Layers", [2])) == ((1, 2), (2,))
    with pytest.raises(ValueError, match="Layers: found 3, expected one of <layers"):
        found.choose("Layers", [2, 3])


WRONG: dict[str, tuple[Any, str]] = {
    "width": (
        {1: torch.ones(5)},
        "layer 1 of a mapping has shape (5,), expected [D] with D = 3, the width of this model",
    ),
    "dimensions": (
        {1: torch.ones(1, 3)},
        "layer 1 of a mapping has shape (1, 3), expected [D] with D = 3, the width of this model",
    ),
    "layer": (
        {4: torch.ones(3)},
        'a mapping names \'4\', expected the index of a layer of this model, "0" to "3"',
    ),
    "name": (
        {"mean": torch.ones(3)},
        'a mapping names \'mean\', expected the index of a layer of this model, "0" to "3"',
    ),
    "kind": ({1: torch.ones(3).int()}, "layer 1 of a mapping holds no tensor of floats: "),
    "list": ({1: [1.0, 2.0, 3.0]}, "layer 1 of a mapping holds no tensor of floats: [1.0"),
    "nan": ({1: torch.tensor([1.0, torch.nan, 0])}, "layer 1 of a mapping holds nan or infinity"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    source, message = WRONG[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared
        read(KEY, source, "D", WIDTH, DEPTH)
    assert str(caught.value).startswith(f"{KEY}: {message}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for content in (None, b"no tensors"):
        if content:
            path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"cannot be read as a safetensors file .*write one by"
        ):
            read(KEY, path, "D", WIDTH, DEPTH)


@pytest.mark.parametrize("source", [None, "", {}, 3])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a vector \[D\] by layer: a safetensors file"):
        check_source(KEY, source, "a vector [D]")

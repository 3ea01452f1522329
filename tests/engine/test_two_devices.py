"""Layers on two devices, as a device map puts them: what one device gives."""

import pytest
import torch

from eval.support import tiny
from eval.support.agreement import ours, planted
from eval.support.simulated_device import FAR, FarTensor, TwoDevices, spread
from tests.support.agreement import NO_PROCESSOR, generate
from vlm_patch import VAR, wrap

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


def test_the_stand_in_refuses_what_two_devices_would() -> None:
    with TwoDevices():
        far = torch.zeros(3, device=FAR)
        far[1:] = 2
        assert isinstance(far, FarTensor)
        assert (far + far).device == FAR
        assert (far + 1).to("cpu").tolist() == [1, 3, 3]
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            far + torch.ones(3)


@pytest.mark.parametrize(
    "names",
    [("var", "gift", "vhr"), ("vhr", "gift-inside", "var"), ("gift-two-maps", "var")],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_single_heads(names: tuple[str, ...], options: dict[str, int]) -> None:
    found = []
    for far in (range(0), range(1, 3)):
        model = planted("llava")
        batch = tiny.inputs(model, tiny.MIXED_BATCH)
        with spread(model, far), wrap(model, *ours(names)) as patch:
            for name in patch.heads:
                patch.heads[name][:, ::2] = False
            found.append(generate(model, batch, **options))
    one, two = found
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(one.logits, two.logits, rtol=0, atol=1e-6)


def test_sinks_are_looked_for_across_devices() -> None:
    """Nothing in this model takes attention as a sink does, which is said with figures."""
    said = []
    for far in (range(0), range(1, 3)):
        model = planted("llava")
        batch = tiny.inputs(model, tiny.ONE_IMAGE)
        with (
            spread(model, far),
            wrap(model, VAR()),
            pytest.warns(UserWarning, match="VAR does nothing") as caught,
        ):
            model(**batch)
        said.append([str(warning.message) for warning in caught])
    assert said[0] == said[1]
    assert any("of the attention, but not as sinks do" in message for message in said[0])


@pytest.mark.skipif(not tiny.FEATURES, reason="takes image features that this version does not")
def test_sinks_are_found_across_devices() -> None:
    from tests.support.planted import planted as with_sinks  # of families that older versions lack

    found = []
    for far in (range(0), range(1, 3)):
        model, inputs = with_sinks("llava")
        with spread(model, far), wrap(model, VAR()) as patch:
            model.generate(**inputs, max_new_tokens=1)
        found.append(patch.describe().partition("\n")[2])  # the first line names devices
    assert found[0] == found[1]
    assert "tau=2.5, dims=(3, 10)" in found[0]

"""Buffers that grow behind what is kept."""

import torch

from vlm_patch.primitives.buffers import append, has_room


def test_room_in_a_buffer() -> None:
    buffer = append(None, torch.ones(2, 4, 200), 0)
    assert has_room(buffer, 400)
    assert not has_room(buffer, 401)
    assert append(buffer, torch.ones(2, 4, 1), 200) is buffer
    with torch.inference_mode():
        inside = append(None, torch.ones(2, 4, 2), 0)
        assert has_room(inside, 3)
    assert not has_room(inside, 3)  # could not be written here
    larger = append(inside, torch.zeros(2, 4, 1), 2)
    assert larger is not inside
    assert larger[0, 0, :4].tolist() == [1, 1, 0, 0]
    assert has_room(larger, 3)

"""Buffers that grow behind what is kept."""

import torch

from vlm_patch.method import Memory, append, room


def test_room_in_a_buffer() -> None:
    memory: Memory = {}
    assert room(memory, ("groups", 0), 1) is None
    buffer = append(memory, ("groups", 0), torch.ones(2, 4, 200), 0)
    assert room(memory, ("groups", 0), 400) is buffer
    assert room(memory, ("groups", 0), 401) is None
    with torch.inference_mode():
        inside = append(memory, ("other", 0), torch.ones(2, 4, 2), 0)
        assert room(memory, ("other", 0), 3) is inside
    assert room(memory, ("other", 0), 3) is None  # could not be written here
    larger = append(memory, ("other", 0), torch.zeros(2, 4, 1), 2)
    assert larger[0, 0, :4].tolist() == [1, 1, 0, 0]
    assert room(memory, ("other", 0), 3) is larger

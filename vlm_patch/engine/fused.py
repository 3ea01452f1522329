"""One generated token's row on a GPU: two kernels in place of some twenty.

While a GPU generates, launching kernels takes longer than running them. Scores, softmax and group
masses are one kernel, edit and product with the values a second; between them a method works out
its shares from a few numbers a head. `Call.weights`, `reweigh` and `Call.output` define the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_patch.engine.attention import Call
from vlm_patch.method import Shares, reweigh
from vlm_patch.primitives import dispatch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 64


def serves(call: Call) -> bool:
    """Whether the kernels can do this call: one row, and a plain mask or none."""
    mask = call.mask
    return (
        call.query.shape[2] == 1
        and call.query.dtype in DTYPES
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1))
        and call.query.stride(3) == call.key.stride(3) == call.value.stride(3) == 1
        and dispatch.possible(call.query.device.type)
    )


def attend(call: Call, groups: Tensor, shares: Shares) -> Tensor:
    """The head outputs `[B, 1, H, Dv]` of a row whose weights `shares` edits (see `reweigh`)."""
    query, value = call.query, call.value
    kind = ("row", str(query.device), query.dtype, query.shape[3], value.shape[3], groups.shape[1])
    return dispatch.tried(
        (*kind, call.mask is None),
        lambda: launch(call, groups, shares),
        lambda: twin(call, groups, shares),
    )


def twin(call: Call, groups: Tensor, shares: Shares) -> Tensor:
    """What `attend` must give, in plain torch."""
    row = torch.zeros(1, dtype=torch.long, device=call.query.device)
    return call.output(reweigh(call.weights(row), groups, shares))


def launch(call: Call, groups: Tensor, shares: Shares) -> Tensor:
    """`attend` by the kernels, unchecked."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    batch, heads, _, size = query.shape
    keys, width, count = key.shape[2], value.shape[3], groups.shape[1]
    shared = heads // key.shape[1]
    scores = query.new_empty(batch, heads, keys, dtype=torch.float32)
    stats = query.new_empty(batch, heads, 2, dtype=torch.float32)
    masses = query.new_empty(batch, count, heads, 1, dtype=torch.float32)
    output = query.new_empty(batch, 1, heads, width)
    softcap = call.options.get("softcap")
    shown = query if mask is None else mask.expand(batch, -1, -1, -1).view(torch.uint8)
    known = {"GROUPS": count, "BLOCK": BLOCK}
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        dispatch.kernels().row_masses[(batch * heads,)](
            *(query, key, shown, groups, scores, stats, masses),
            *(keys, heads, shared, call.scaling, softcap or 0.0),
            *(*query.stride()[:2], *key.stride()[:3], shown.stride(0), shown.stride(3)),
            *groups.stride(),
            **{"SIZE": size, "WIDTH": dispatch.power_of_2(size), **known},
            MASKED=mask is not None,
            CAPPED=softcap is not None,
        )
        dispatch.kernels().row_output[(batch * heads,)](
            *(scores, stats, value, groups, shares(masses, groups).contiguous(), output),
            *(keys, heads, shared, *value.stride()[:3], *groups.stride()),
            **{"SIZE": width, "WIDTH": dispatch.power_of_2(width), **known},
        )
    return output

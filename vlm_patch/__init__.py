"""Training-free attention methods against hallucination for Hugging Face VLMs.

`wrap` puts methods on a model; `Method` and the names below it are what a method of your own needs.
"""

from vlm_patch.errors import PatchError, UnsupportedModelError
from vlm_patch.method import (
    ExtraForward,
    ForwardContext,
    Method,
    ModelInfo,
    State,
    TowerRead,
    Watcher,
)
from vlm_patch.methods.gift import GIFT
from vlm_patch.methods.paint import PAINT
from vlm_patch.methods.var import VAR
from vlm_patch.methods.vhr import VHR
from vlm_patch.patch import Patch, unwrap, wrap
from vlm_patch.primitives.buffers import append
from vlm_patch.primitives.reweighting import KeyReweighting, reweight

__all__ = [
    "GIFT",
    "PAINT",
    "VAR",
    "VHR",
    "ExtraForward",
    "ForwardContext",
    "KeyReweighting",
    "Method",
    "ModelInfo",
    "Patch",
    "PatchError",
    "State",
    "TowerRead",
    "UnsupportedModelError",
    "Watcher",
    "append",
    "reweight",
    "unwrap",
    "wrap",
]
__version__ = "0.1.0"

"""Training-free attention methods against hallucination for Hugging Face VLMs.

`wrap` puts methods on a model; `Method` and the names below it are what a method of your own needs.
"""

from vlm_patch.errors import PatchError, UnsupportedModelError
from vlm_patch.method import (
    Branch,
    ExtraForward,
    ExtraPrompt,
    ForwardContext,
    Method,
    ModelInfo,
    Phase,
    Position,
    State,
    TowerRead,
    Watcher,
)
from vlm_patch.methods import *  # noqa: F403
from vlm_patch.methods.registry import METHODS as _METHODS
from vlm_patch.patch import Patch, unwrap, wrap
from vlm_patch.primitives.buffers import append
from vlm_patch.primitives.reweighting import KeyReweighting, reweight

__all__ = [
    "Branch",
    "ExtraForward",
    "ExtraPrompt",
    "ForwardContext",
    "KeyReweighting",
    "Method",
    "ModelInfo",
    "Patch",
    "PatchError",
    "Phase",
    "Position",
    "State",
    "TowerRead",
    "UnsupportedModelError",
    "Watcher",
    "append",
    "reweight",
    "unwrap",
    "wrap",
    *(kind.__name__ for kind in _METHODS.values()),
]
__version__ = "0.1.0"

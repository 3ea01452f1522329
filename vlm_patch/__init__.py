"""Training-free attention methods against hallucination for Hugging Face VLMs."""

from vlm_patch.errors import PatchError, UnsupportedModelError
from vlm_patch.methods.gift import GIFT
from vlm_patch.methods.paint import PAINT
from vlm_patch.methods.var import VAR
from vlm_patch.methods.vhr import VHR
from vlm_patch.patch import Patch, unwrap, wrap

__all__ = [
    "GIFT",
    "PAINT",
    "VAR",
    "VHR",
    "Patch",
    "PatchError",
    "UnsupportedModelError",
    "unwrap",
    "wrap",
]
__version__ = "0.1.0"

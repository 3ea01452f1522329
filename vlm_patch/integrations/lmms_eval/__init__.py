"""The model `vlm_patch` of lmms-eval 0.7, so that its tasks run on a patched model:

    lmms_eval --model vlm_patch --model_args pretrained=llava-hf/llava-1.5-7b-hf,methods=gift \
        --tasks pope

lmms-eval finds it through the entry point; nothing else in this package imports it.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: the name of the model, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vlm_patch", chat_class_path="vlm_patch.integrations.lmms_eval.model.VlmPatch"
    )

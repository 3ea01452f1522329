"""How small a model of each type is made, after `sizes.yaml`, and the ids of its tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PAD, BOS, EOS, VISION_START, VIDEO, IMAGE = 0, 1, 2, 97, 98, 99
TOKENS: Mapping[str, int] = {
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "video_token_id": VIDEO,
    "image_token_id": IMAGE,
}
_FILE: Any = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SIZES: Mapping[str, int] = _FILE["sizes"]
MADE: Mapping[str, Mapping[str, Any]] = _FILE["made"]
ADJUSTED: Mapping[str, Mapping[str, Any]] = _FILE["adjusted"]
NOT_BUILT: Mapping[str, str] = _FILE["not_built"]

"""Published defaults of the methods, by the decoder they were published for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Profile:
    """Published defaults of the methods for one decoder; `vlm` narrows it to one kind of model."""

    decoder: str
    depth: int
    width: int
    key_value_heads: int
    defaults: Mapping[str, Mapping[str, Any]]
    vlm: str | None = None


# Sources: VAR's D_sink table (arXiv 2503.03321), GIFT's release settings (arXiv 2510.22067), VHR's
# section 4.1 (arXiv 2412.13949), the releases of VAF (2503.13107), Devils in the Middle Layers
# (2411.16724), IAT / AdaIAT (2603.04908) and MemVR (2410.03577), and massive activations of Mistral
# and LLaMA-3 (2402.17762).
# InstructBLIP stands on an older Vicuna, made of LLaMA-1: v1.5's channels are not claimed for it.
PROFILES = (
    Profile("llama", 32, 4096, 32, {"vhr": {"layers": tuple(range(14, 32))}}, "instructblip"),
    Profile(
        "llama",
        32,
        4096,
        32,
        {
            "var": {"dims": (1415, 2533)},
            "gift": {"alpha": 5.0, "saliency_layer": 11, "layers": tuple(range(12, 23))},
            "vhr": {"layers": (1, *range(18, 32))},
            "vaf": {"layers": tuple(range(9, 15))},
            "devils": {"layers": tuple(range(5, 19))},
            "sparc": {"layers": (20,)},
            "iat": {"layers": tuple(range(5, 18))},
            "adaiat": {"layers": tuple(range(5, 18))},
            "memvr": {"layers": tuple(range(7, 17))},
        },
    ),
    Profile(
        "llama",
        40,
        5120,
        40,
        {
            "var": {"dims": (2100, 4743)},
            "gift": {"alpha": 5.0, "saliency_layer": 10, "layers": tuple(range(14, 21))},
        },
    ),
    Profile("llama", 32, 4096, 8, {"var": {"dims": (788, 1384, 4062)}}),
    Profile("mistral", 32, 4096, 8, {"var": {"dims": (2070,)}}),
    Profile(
        "qwen2_vl_text",
        28,
        3584,
        4,
        {
            "var": {"dims": (458, 2570)},
            "gift": {"alpha": 4.0, "saliency_layer": 14, "layers": tuple(range(5, 19))},
        },
    ),
)

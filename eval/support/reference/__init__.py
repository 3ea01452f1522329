"""The slow literal reference: S x S, float64, one sample at a time, straight from the papers.

One teacher-forced pass over prompt and generated tokens, no cache, no batch, no padding. It shares
no code with `vlm_patch` and defines what correct means: a row of a padded batch, a decode step, a
beam are all compared with the same row of a single sample here.
"""

from eval.support.reference.compose import Method, Trace, logits, sinks, trace
from eval.support.reference.gift import Gift
from eval.support.reference.hooked import Hooked
from eval.support.reference.paint import Paint
from eval.support.reference.sample import Sample, Turn, capture
from eval.support.reference.streams import Deco, Dola, Icd, M3id, Vcd
from eval.support.reference.var import Var
from eval.support.reference.vhr import Vhr

__all__ = [
    "Deco",
    "Dola",
    "Gift",
    "Hooked",
    "Icd",
    "M3id",
    "Method",
    "Paint",
    "Sample",
    "Trace",
    "Turn",
    "Var",
    "Vcd",
    "Vhr",
    "capture",
    "logits",
    "sinks",
    "trace",
]

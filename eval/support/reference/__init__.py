"""The slow literal reference: S x S, float64, one sample at a time, straight from the papers.

One teacher-forced pass over prompt and generated tokens, no cache, no batch, no padding. It shares
no code with `vlm_patch` and defines what correct means: a row of a padded batch, a decode step, a
beam are all compared with the same row of a single sample here.
"""

from eval.support.reference.adhh import Adhh as Adhh
from eval.support.reference.compose import Method as Method
from eval.support.reference.compose import Trace as Trace
from eval.support.reference.compose import logits as logits
from eval.support.reference.compose import sinks as sinks
from eval.support.reference.compose import trace as trace
from eval.support.reference.devils import MiddleLayers as MiddleLayers
from eval.support.reference.gift import Gift as Gift
from eval.support.reference.iat import AdaIat as AdaIat
from eval.support.reference.iat import Iat as Iat
from eval.support.reference.mass_target import Mass as Mass
from eval.support.reference.memvr import MemVr as MemVr
from eval.support.reference.nullu import Nullu as Nullu
from eval.support.reference.pai import Pai as Pai
from eval.support.reference.paint import Paint as Paint
from eval.support.reference.sample import Sample as Sample
from eval.support.reference.sample import Turn as Turn
from eval.support.reference.sample import capture as capture
from eval.support.reference.sparc import Sparc as Sparc
from eval.support.reference.steering import Steering as Steering
from eval.support.reference.streams import Deco as Deco
from eval.support.reference.streams import Dola as Dola
from eval.support.reference.streams import Icd as Icd
from eval.support.reference.streams import M3id as M3id
from eval.support.reference.streams import Vcd as Vcd
from eval.support.reference.vaf import Vaf as Vaf
from eval.support.reference.var import Var as Var
from eval.support.reference.vhr import Vhr as Vhr
from eval.support.reference.vista import Vista as Vista

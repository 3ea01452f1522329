"""One file per paper: the mathematics as pure functions of tensors, then the method.

A line here is all that a new file needs to be known by its name.
"""

from vlm_patch.methods.adaiat import AdaIAT as AdaIAT
from vlm_patch.methods.adhh import ADHH as ADHH
from vlm_patch.methods.deco import DeCo as DeCo
from vlm_patch.methods.devils import Devils as Devils
from vlm_patch.methods.dola import DoLa as DoLa
from vlm_patch.methods.gift import GIFT as GIFT
from vlm_patch.methods.iat import IAT as IAT
from vlm_patch.methods.icd import ICD as ICD
from vlm_patch.methods.m3id import M3ID as M3ID
from vlm_patch.methods.mass_target import MassTarget as MassTarget
from vlm_patch.methods.memvr import MemVR as MemVR
from vlm_patch.methods.nullu import Nullu as Nullu
from vlm_patch.methods.pai import PAI as PAI
from vlm_patch.methods.paint import PAINT as PAINT
from vlm_patch.methods.sparc import SPARC as SPARC
from vlm_patch.methods.steering import Steering as Steering
from vlm_patch.methods.vaf import VAF as VAF
from vlm_patch.methods.var import VAR as VAR
from vlm_patch.methods.vcd import VCD as VCD
from vlm_patch.methods.vhr import VHR as VHR
from vlm_patch.methods.vista import VISTA as VISTA

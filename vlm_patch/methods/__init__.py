"""One file per paper: the mathematics as pure functions of tensors, then the method.

A line here is all that a new file needs to be known by its name.
"""

from vlm_patch.methods.deco import DeCo as DeCo
from vlm_patch.methods.dola import DoLa as DoLa
from vlm_patch.methods.gift import GIFT as GIFT
from vlm_patch.methods.icd import ICD as ICD
from vlm_patch.methods.m3id import M3ID as M3ID
from vlm_patch.methods.paint import PAINT as PAINT
from vlm_patch.methods.var import VAR as VAR
from vlm_patch.methods.vcd import VCD as VCD
from vlm_patch.methods.vhr import VHR as VHR

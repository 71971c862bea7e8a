"""Every method bitfloor knows, by name."""

from __future__ import annotations

from typing import Any

from bitfloor.methods.bitfloor import Bitfloor
from bitfloor.methods.gptq import Gptq
from bitfloor.methods.omniquant import Omniquant
from bitfloor.methods.ptq161 import Ptq161
from bitfloor.methods.rtn import Rtn
from bitfloor.methods.signround import Signround

METHODS: dict[str, type[Any]] = {method.name: method for method in (Rtn, Gptq, Signround, Bitfloor, Omniquant, Ptq161)}

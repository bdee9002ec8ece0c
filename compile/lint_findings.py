# SPDX-License-Identifier: Apache-2.0
"""What graph lint reports, and what its rules read constants with."""

from dataclasses import dataclass
from typing import Literal

from compile.hlo import Computation, Instruction
from compile.protobuf import integers, read_fields

Severity = Literal["error", "warning"]
Target = Literal["trn1", "inf2", "trn2", "trn3"]
Found = str  # what is wrong, and what to do instead


@dataclass(frozen=True)
class Finding:
    """severity: "error" will not compile or give wrong results; "warning" is slow or fragile.

    what: the instruction's fault and the way out. reason: why the rule exists. instruction: its name in the HLO, "" for
    the graph as a whole. source: "file:line" of the model, "" if unknown.
    """

    rule: str
    severity: Severity
    what: str
    reason: str
    instruction: str = ""
    source: str = ""

    def __str__(self) -> str:
        at = f" at {self.source}" if self.source else ""
        name = f" %{self.instruction}" if self.instruction else ""
        return f"{self.severity} {self.rule}{at}:{name} {self.what} [{self.reason}]"


def scalar_constant(computation: Computation, instruction: Instruction) -> int | None:
    """Value of an integer constant, seen through broadcasts, reshapes and converts; None if it is none, or an array of
    several values."""
    while instruction.opcode in ("broadcast", "reshape", "convert", "copy"):
        instruction = computation.operands(instruction)[0]
    if instruction.opcode != "constant" or instruction.literal is None:
        return None
    values = {value for f in read_fields(instruction.literal) if f.number in (4, 5) for value in integers(f)}
    return values.pop() if len(values) == 1 else None

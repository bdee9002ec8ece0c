# SPDX-License-Identifier: Apache-2.0
"""Which line of a model each HLO instruction comes from, read from the module's stack frames."""

from collections.abc import Callable
from typing import NamedTuple

from compile.hlo import Instruction, Module
from compile.protobuf import integers, read_fields

_STACK_FRAME_INDEX = 17  # of HloModuleProto
_STACK_FRAME_ID = 15  # of OpMetadata


class _Frame(NamedTuple):
    source: str
    file: str
    parent: int


def model_sources(hlo: bytes, module: Module, is_foreign: Callable[[str], bool]) -> dict[int, str]:
    """Instruction id → "file:line" of the innermost frame whose file is not foreign; ids without one are left out.

    module: hlo, read.
    """
    frames = _read_frames(hlo)
    found = {}
    for _, instruction in module.instructions():
        frame_id = _frame_id(instruction)
        while frame_id and is_foreign(frames[frame_id].file):
            frame_id = frames[frame_id].parent
        if frame_id:
            found[instruction.id] = frames[frame_id].source
    return found


def _frame_id(instruction: Instruction) -> int:
    for metadata in instruction.submessages(7):
        for f in read_fields(metadata):
            if f.number == _STACK_FRAME_ID:
                return integers(f)[0]
    return 0


def _read_frames(hlo: bytes) -> dict[int, _Frame]:
    """StackFrameIndexProto: file_names (1), file_locations (3: file_name_id 1, line 3), stack_frames (4:
    file_location_id 1, parent_frame_id 2); ids count from 1, 0 is none."""
    files: list[str] = []
    locations: list[tuple[int, int]] = []
    stack: list[tuple[int, int]] = []
    for top in read_fields(hlo):
        if top.number != _STACK_FRAME_INDEX or not isinstance(top.value, bytes):
            continue
        for f in read_fields(top.value):
            if not isinstance(f.value, bytes):
                continue
            if f.number == 1:
                files.append(f.value.decode())
            elif f.number in (3, 4):
                values = {part.number: integers(part)[0] for part in read_fields(f.value)}
                if f.number == 3:
                    locations.append((values.get(1, 0), values.get(3, 0)))
                else:
                    stack.append((values.get(1, 0), values.get(2, 0)))
    found = {}
    for frame_id, (location, parent) in enumerate(stack, start=1):
        file_id, line = locations[location - 1]
        found[frame_id] = _Frame(f"{files[file_id - 1]}:{line}", files[file_id - 1], parent)
    return found

# SPDX-License-Identifier: Apache-2.0
"""Checkpoint tensors → parameters. Owns safetensors (single and sharded), the checks of names and shapes, and the copy.

Files are memory-mapped and each tensor is copied straight into its slice of the (fused) parameter, so the model's
memory is needed once. GGUF files are in gguf_weights.py.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from neuron_paged.errors import CheckpointError, ConfigError, UnsupportedModelError
from neuron_paged.models.llama import LlamaModel, WeightSlot
from neuron_paged.progress import each

TensorPart = tuple[slice, ...]
_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAMES_SHOWN = 6


class TensorSource(Protocol):
    """A checkpoint: tensors by their transformers names."""

    @property
    def location(self) -> str:
        """File or folder, for messages."""

    def names(self) -> Iterable[str]:
        """All tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""

    def read(self, name: str, part: TensorPart | None = None) -> Tensor:
        """The tensor, or a slice per axis of it, in a floating-point dtype, on the CPU; may be a view of the file."""


class SafetensorsSource:
    """`model.safetensors`, or the shards named in `model.safetensors.index.json`. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._files = _find_safetensors(folder)
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}

    def __enter__(self) -> "SafetensorsSource":
        from safetensors import SafetensorError, safe_open

        for path in self._files:
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise CheckpointError(f"{path}: not a complete safetensors file ({error}); fetch it again.") from error
            except RuntimeError as error:
                self._stack.close()
                raise ConfigError(f"model: {path} can't be mapped into memory ({error}).") from error
            self._handles |= dict.fromkeys(handle.keys(), handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handles.clear()
        self._stack.close()

    def names(self) -> Iterable[str]:
        return self._handles.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def read(self, name: str, part: TensorPart | None = None) -> Tensor:
        handle = self._handles[name]
        tensor = handle.get_tensor(name) if part is None else handle.get_slice(name)[part]
        if tensor.dtype not in _FLOAT_DTYPES:
            raise UnsupportedModelError(
                f"{self.location}: {name} is {tensor.dtype}, need fp32, fp16 or bf16 weights (quantised checkpoints "
                "are read as GGUF only)."
            )
        return tensor


def _find_safetensors(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pth"))
        hint = f" (found {', '.join(others[:3])}: convert them with transformers' save_pretrained)" if others else ""
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}.")
    try:
        shards = sorted({str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors shards ({error!r}).") from error
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {_listed(missing, 'shard')} not in the folder; fetch the checkpoint again.")
    return [folder / name for name in shards]


def _listed(names: Iterable[str], noun: str) -> str:
    """'2 tensors a, b', shortened after a few."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:_NAMES_SHOWN]) + (", …" if len(ordered) > _NAMES_SHOWN else "")
    return f"{len(ordered)} {noun}{'s' if len(ordered) > 1 else ''} {shown}"


def check_names(source: TensorSource, slots: dict[str, WeightSlot], is_ignorable: Callable[[str], bool]) -> None:
    """CheckpointError if names are missing or nobody knows them, or shapes differ from the config's."""
    found = set(source.names())
    complaints = []
    if missing := slots.keys() - found:
        complaints.append(f"missing {_listed(missing, 'tensor')}")
    if unexpected := {name for name in found - slots.keys() if not is_ignorable(name)}:
        complaints.append(f"unexpected {_listed(unexpected, 'tensor')}")
    if complaints:
        raise CheckpointError(f"{source.location}: {'; '.join(complaints)}. The config names another model than this.")
    for name, slot in slots.items():
        if (shape := source.shape(name)) != slot.shape:
            raise CheckpointError(f"{source.location}: {name} has shape {shape}, need {slot.shape} as the config says.")


def load_weights(
    model: LlamaModel,
    source: TensorSource,
    *,
    progress: bool = True,
    parts: Mapping[str, TensorPart] | None = None,
) -> None:
    """Fill every parameter from the source, converting to the model's dtype.

    parts: which part of each checkpoint tensor the model has; what a part leaves of a parameter becomes zero. None =
    all of them whole, whose names and shapes are then checked here.
    Raises CheckpointError before anything is read if names or shapes don't fit, or while reading a damaged file.
    """
    slots = model.checkpoint_slots()
    if parts is None:
        check_names(source, slots, model.is_ignorable)
    parameters = dict(model.named_parameters())
    for name, slot in each(slots.items(), "Loading weights", "tensor", enabled=progress):
        parameter = parameters[slot.parameter]
        rows = parameter.data[slot.start : slot.start + slot.shape[0]]
        if parts is None:
            rows.copy_(source.read(name))
            continue
        rows.zero_()
        sizes = [axis.stop - axis.start for axis in parts[name]]
        if min(sizes) > 0:
            rows[tuple(slice(size) for size in sizes)].copy_(source.read(name, parts[name]))

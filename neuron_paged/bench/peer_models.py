# SPDX-License-Identifier: Apache-2.0
"""The benchmark's model in the formats peers read, with the same weights, made once and kept in the cache folder."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from neuron_paged.env import cache_dir
from neuron_paged.errors import InvalidRequestError


def model_for_peer(model_path: Path, kind: str) -> Path:
    """A checkpoint of `model_path` (GGUF file or transformers folder) of `kind`, converted if needed.

    kind: "safetensors" (transformers folder, fp32), "gguf-fp32", or "gguf-fp16" (matrices rounded to fp16).
    """
    is_gguf = model_path.suffix == ".gguf"
    if kind == "safetensors" and not is_gguf:
        return model_path
    if not is_gguf:
        raise InvalidRequestError(
            f"--compare: this peer reads GGUF and {model_path} is not one; convert it first and pass --peer-model FILE."
        )
    if kind == "safetensors":
        return _cached(model_path, "fp32", lambda target: _write_safetensors(model_path, target))
    half = kind == "gguf-fp16"
    return _cached(model_path, kind[-4:] + ".gguf", lambda target: _write_gguf(model_path, target, half))


def _cached(source: Path, name: str, write: Callable[[Path], None]) -> Path:
    """`write` to a temporary place and rename, so that an interrupted conversion is never mistaken for a whole one."""
    stat = source.stat()
    key = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_dir() / "peer-models" / f"{source.stem}-{key}-{name}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / name
        write(unfinished)
        os.replace(unfinished, target)
    return target


def _write_safetensors(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from neuron_paged.models.gguf_file import GGUFFile
    from neuron_paged.models.gguf_weights import GGUFSource, gguf_config
    from neuron_paged.models.registry import normalise_config

    file = GGUFFile(source)
    hf_config = gguf_config(file)
    weights = GGUFSource(file, normalise_config(hf_config)[1])
    state = {name: weights.read(name) for name in weights.names()}
    if hf_config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    model.load_state_dict(state)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def _write_gguf(source: Path, target: Path, half: bool) -> None:
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue  # the writer makes these itself
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, weights.astype(np.float16) if half and weights.ndim > 1 else weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

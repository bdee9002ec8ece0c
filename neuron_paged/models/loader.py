# SPDX-License-Identifier: Apache-2.0
"""A name or path → a model ready to run, its config and its tokenizer.

Owns the search for files (folder, GGUF file, the demo package, Hugging Face hub) and the order of loading.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from neuron_paged.config import DEFAULT_MAX_MODEL_LEN
from neuron_paged.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    NeuronPagedError,
    UnsupportedModelError,
)
from neuron_paged.memory import available_memory_bytes, size_text
from neuron_paged.models.collectives import RankGroup
from neuron_paged.models.config import ModelConfig, as_token_ids, check_sizes, first_line
from neuron_paged.models.gguf_file import GGUFFile
from neuron_paged.models.gguf_weights import GGUFSource, gguf_config
from neuron_paged.models.kv_scales import load_kv_scales
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.locate import local_model
from neuron_paged.models.prepare_cpu import peak_memory_bytes, prepare_for_cpu
from neuron_paged.models.rank_heads import check_tensor_parallel_size
from neuron_paged.models.registry import Family, find_family, normalise_config
from neuron_paged.models.tensor_parallel import Shard, join_ranks
from neuron_paged.models.weights import SafetensorsSource, TensorSource, check_names, load_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# "auto" is fp32: exact for every checkpoint.
DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_HUB_SKIPPED = ("consolidated*", "original/*", "*/*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class LoadedModel:
    """model: ready to run, for sequences of up to max_model_len tokens. config: ours. tokenizer: None if the checkpoint
    has none. hf_config: transformers'."""

    model: LlamaModel
    config: ModelConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    hf_config: "PretrainedConfig"
    max_model_len: int


@dataclass(frozen=True)
class RankTask:
    """What another process needs to load its part of a model that `size` ranks share, with `load_rank`. Picklable."""

    path: Path
    config: ModelConfig
    dtype: torch.dtype
    packed_dtype: torch.dtype | None
    max_model_len: int
    size: int


# Starts ranks 1, 2, … on their parts and returns the group in which this process is rank 0.
StartRanks = Callable[[RankTask], RankGroup]


@dataclass(frozen=True)
class _Options:
    """What load_model was asked for; packed_dtype: of packed linear layers, None = plain torch modules."""

    dtype: torch.dtype
    packed_dtype: torch.dtype | None
    max_model_len: int | None
    progress: bool
    tensor_parallel_size: int
    start_ranks: StartRanks | None


def load_config(name_or_path: str | Path) -> ModelConfig:
    """The config of whatever load_model takes, or of a folder with a config.json only; no weights are fetched or read.

    Raises ModelNotFoundError, UnsupportedModelError, CheckpointError.
    """
    path = resolve(name_or_path, weights=False)
    return normalise_config(gguf_config(GGUFFile(path)) if path.is_file() else _hf_config(path))[1]


def resolve(name_or_path: str | Path, weights: bool = True) -> Path:
    """Folder with a checkpoint or a .gguf file on this machine; downloads `org/name` from the hub if need be.

    weights: False fetches the config only. Raises ModelNotFoundError.
    """
    path = local_model(name_or_path)
    return _from_hub(str(name_or_path), weights) if path is None else path


def _from_hub(name: str, weights: bool) -> Path:
    """Local copy of a hub repository; its config is read and checked before the weights are fetched, if they are."""
    import json

    from huggingface_hub import hf_hub_download, snapshot_download

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of every attempt, and the last one's error is ours
    try:
        config_file = Path(hf_hub_download(name, "config.json"))
        config = json.loads(config_file.read_text(encoding="utf-8"))
        find_family(config.get("architectures"), config.get("model_type"))
        if not weights:
            return config_file.parent
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_SKIPPED)))
    except UnsupportedModelError:
        raise
    except Exception as error:  # huggingface_hub lets errors of several HTTP libraries through
        raise ModelNotFoundError(
            f"model: {name!r} is no folder here and can't be fetched from the Hugging Face hub: {first_line(error)}"
        ) from error
    finally:
        log.setLevel(level)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    progress: bool = True,
    max_model_len: int | None = None,
    weight_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    prepare: bool = True,
    tensor_parallel_size: int = 1,
    start_ranks: StartRanks | None = None,
) -> LoadedModel:
    """Load a model for the CPU.

    name_or_path: folder with config.json and safetensors, .gguf file, "demo", or org/name on the hub.
    dtype: of weights, activations and (by default) the KV cache; "auto" is fp32.
    max_model_len: longest sequence in tokens, the rows of the rotary table; None = the model's max_position_embeddings,
        at most DEFAULT_MAX_MODEL_LEN.
    weight_dtype: what the linear layers' weights are stored in, arithmetic stays fp32; "auto" = dtype. "bf16" halves
        the memory traffic of fp32, which bounds decoding of few sequences.
    prepare: bring it into its fast CPU form; False keeps plain torch modules, which can be lowered and exported.
    tensor_parallel_size: ranks that share the model; above 1 this process gets the part of rank 0, once `start_ranks`
        has started the others, which it is asked to do when all that can be checked without weights is right.
    Raises ModelNotFoundError, UnsupportedModelError, CheckpointError, ConfigError; for a max_model_len above the
    model's, sizes that are not the checkpoint's and too little memory before anything large is allocated.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, need one of {', '.join(DTYPES)}.")
    if weight_dtype not in DTYPES:
        raise ConfigError(f"weight_dtype: got {weight_dtype!r}, need one of {', '.join(DTYPES)}.")
    if weight_dtype != "auto" and not prepare:
        raise ConfigError("weight_dtype: needs prepare=True, plain torch modules store their weights in dtype.")
    path = resolve(name_or_path)
    load = _load_gguf if path.is_file() else _load_folder
    packed_dtype = DTYPES[dtype if weight_dtype == "auto" else weight_dtype] if prepare else None
    with torch.inference_mode():
        return load(
            path, _Options(DTYPES[dtype], packed_dtype, max_model_len, progress, tensor_parallel_size, start_ranks)
        )


def read_config(name_or_path: str | Path, max_model_len: int | None = None) -> tuple[ModelConfig, int]:
    """The config that load_model would give, and its max_model_len, without reading weights.

    Raises ModelNotFoundError, UnsupportedModelError, CheckpointError, ConfigError.
    """
    path = resolve(name_or_path)
    if path.is_file():
        file = GGUFFile(path)
        _, config = normalise_config(gguf_config(file))
        config = GGUFSource(file, config).scale_rope(config)
    else:
        _, config = normalise_config(_hf_config(path))
        config = replace(config, eos_token_ids=_generation_eos(path) or config.eos_token_ids)
    return config, _fit_model_len(max_model_len, config.max_position_embeddings)


def _load_folder(path: Path, options: _Options) -> LoadedModel:
    hf_config = _hf_config(path)
    family, config = normalise_config(hf_config)
    config = replace(config, eos_token_ids=_generation_eos(path) or config.eos_token_ids)
    max_model_len = _fit_model_len(options.max_model_len, config.max_position_embeddings)
    with SafetensorsSource(path) as source:
        model = _build_model(path, family, config, source, options, max_model_len)
    return LoadedModel(model, config, _tokenizer(path), hf_config, max_model_len)


def _load_gguf(path: Path, options: _Options) -> LoadedModel:
    file = GGUFFile(path)
    hf_config = gguf_config(file)
    family, config = normalise_config(hf_config)
    source = GGUFSource(file, config)
    config = source.scale_rope(config)
    max_model_len = _fit_model_len(options.max_model_len, config.max_position_embeddings)
    model = _build_model(path, family, config, source, options, max_model_len)
    return LoadedModel(model, config, _gguf_tokenizer(path), hf_config, max_model_len)


def _fit_model_len(wanted: int | None, limit: int) -> int:
    """max_model_len of a model that allows `limit` tokens."""
    if wanted is None:
        return min(limit, DEFAULT_MAX_MODEL_LEN)
    if not 1 <= wanted <= limit:
        raise ConfigError(
            f"max_model_len: got {wanted}, need at most {limit} (max_position_embeddings of the model), at least 1."
        )
    return wanted


def _build_model(
    path: Path, family: Family, config: ModelConfig, source: TensorSource, options: _Options, max_model_len: int
) -> LlamaModel:
    """The model with its weights. Whatever can be wrong with names, shapes and memory shows before it has storage."""
    outline = family.model_class(config, dtype=options.dtype, device="meta", max_positions=max_model_len)
    check_names(source, outline.checkpoint_slots(), outline.is_ignorable)
    if options.tensor_parallel_size != 1:
        size = options.tensor_parallel_size
        check_tensor_parallel_size(size, config)
        assert options.start_ranks is not None
        task = RankTask(path, config, options.dtype, options.packed_dtype, max_model_len, size)
        largest = Shard(config, 0, size).new_model(
            family.model_class, dtype=options.dtype, device="meta", max_positions=max_model_len
        )
        check_memory(size * peak_memory_bytes(largest, options.packed_dtype), available_memory_bytes())
        return _build_rank(task, source, options.start_ranks(task), options.progress)
    check_memory(peak_memory_bytes(outline, options.packed_dtype), available_memory_bytes())
    model = family.model_class(config, dtype=options.dtype, max_positions=max_model_len)
    load_weights(model, source, progress=options.progress)
    load_kv_scales(model, source)
    if options.packed_dtype is not None:
        prepare_for_cpu(model, weight_dtype=options.packed_dtype)
    return model


def load_rank(task: RankTask, group: RankGroup) -> LlamaModel:
    """The part of a rank; the process that made the task has checked the checkpoint. Raises CheckpointError."""
    source: AbstractContextManager[TensorSource]
    if task.path.is_file():
        source = nullcontext(GGUFSource(GGUFFile(task.path), task.config))
    else:
        source = SafetensorsSource(task.path)
    with torch.inference_mode(), source as tensors:
        return _build_rank(task, tensors, group, progress=False)


def _build_rank(task: RankTask, source: TensorSource, group: RankGroup, progress: bool) -> LlamaModel:
    model_class = find_family((task.config.architecture,), None).model_class
    shard = Shard(task.config, group.rank, group.size)
    whole = model_class(task.config, dtype=task.dtype, device="meta", max_positions=task.max_model_len)
    model = shard.new_model(model_class, dtype=task.dtype, max_positions=task.max_model_len)
    load_weights(model, source, progress=progress, parts=shard.parts(whole, model))
    load_kv_scales(model, source, num_kv_heads=task.config.num_kv_heads, kv_heads=shard.kv_heads)
    join_ranks(model, shard, group)
    if task.packed_dtype is not None:
        prepare_for_cpu(model, weight_dtype=task.packed_dtype)
    return model


def check_memory(need_bytes: int, available_bytes: int) -> None:
    """ConfigError unless a model that needs so much fits into what is free."""
    if need_bytes > available_bytes:
        raise ConfigError(
            f"model: loading it takes {size_text(need_bytes)}, need at most the {size_text(available_bytes)} of memory "
            "that is free; take dtype='bf16', a smaller model or a machine with more memory."
        )


def _hf_config(folder: Path) -> "PretrainedConfig":
    """transformers' config, after our own look at architecture and sizes; its message on unknown ones fills a page."""
    from transformers import AutoConfig, PretrainedConfig

    try:
        raw, _ = PretrainedConfig.get_config_dict(folder)
        find_family(raw.get("architectures"), raw.get("model_type"))
        check_sizes(raw)
        return AutoConfig.from_pretrained(folder)
    except NeuronPagedError as error:
        raise type(error)(f"{folder}: {error}") from error
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and validation errors of its own
        raise CheckpointError(f"{folder}/config.json can't be read: {first_line(error)}") from error


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, where chat models name all of theirs."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return ()
    try:
        return as_token_ids(GenerationConfig.from_pretrained(folder).eos_token_id)
    except Exception as error:
        raise CheckpointError(f"{folder}/generation_config.json can't be read: {error}") from error


def _tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception on a damaged file
        raise CheckpointError(f"{folder}: the tokenizer can't be read: {first_line(error)}") from error


def _gguf_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """AutoTokenizer gives the same object, after reading the file's config for 4 s [measured on CPU]."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise CheckpointError(f"{path}: the tokenizer can't be read: {first_line(error)}") from error

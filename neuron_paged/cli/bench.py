# SPDX-License-Identifier: Apache-2.0
"""Benchmarks. Each prints a table, says what was measured and what is modelled, and writes --json FILE on request."""

import argparse
from collections.abc import Callable
from typing import Any

from neuron_paged.cli.arguments import (
    add_engine_arguments,
    add_model_arguments,
    engine_settings,
    need_package,
    positive_int,
    set_threads,
)
from neuron_paged.cli.bench_report import (
    engine_report,
    kernels_report,
    kv_utilisation_report,
    latency_report,
    tensor_parallel_report,
    throughput_report,
)
from neuron_paged.cli.bucket_report import buckets_report
from neuron_paged.cli.early_checks import check_model
from neuron_paged.cli.output import STDOUT, check_json_target, write_json
from neuron_paged.env import silence_profiler_log
from neuron_paged.errors import InvalidRequestError, NeuronPagedError
from neuron_paged.progress import told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-subcommand per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, add, text in (
        ("throughput", _add_throughput, "output tokens/s of many requests at once, beside a floor and beside peers"),
        ("latency", _add_latency, "prefill and decode tokens/s at several batch sizes"),
        ("kv-utilisation", _add_kv_utilisation, "KV waste and batch size against contiguous reservation"),
        ("engine", _add_engine, "what scheduling and batch building cost per step"),
        ("tensor-parallel", _add_tensor_parallel, "decode steps of several ranks beside those of one process"),
        ("kernels", _add_kernels, "modelled figures of the NKI attention kernels beside their goals, and decode steps"),
        ("buckets", _add_buckets, "sample traffic through bucket schemes: padding, fallbacks, bytes, modelled time"),
    ):
        sub = benchmarks.add_parser(name, help=text, description=text, allow_abbrev=False)
        add(sub)
        sub.add_argument("--json", metavar="FILE", help='write the results as JSON ("-": to standard output)')


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark and print its report."""
    check_json_target(args.json)
    if "model" in args and not getattr(args, "no_model", False):
        check_model(args.model)
    runners: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
        "throughput": (_throughput, throughput_report),
        "latency": (_latency, latency_report),
        "kv-utilisation": (_kv_utilisation, kv_utilisation_report),
        "engine": (_engine, engine_report),
        "tensor-parallel": (_tensor_parallel, tensor_parallel_report),
        "kernels": (_kernels, kernels_report),
        "buckets": (_buckets, buckets_report),
    }
    measure, describe = runners[args.benchmark]
    results = measure(args)
    if args.json != STDOUT:
        print(describe(results))
    write_json(args.json, results)
    return 0


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=positive_int, default=32, metavar="N")
    parser.add_argument("--prompt-len", type=int_range, default=(16, 512), metavar="LOW:HIGH", help="default 16:512")
    parser.add_argument("--output-len", type=int_range, default=(16, 256), metavar="LOW:HIGH", help="default 16:256")
    parser.add_argument("--workload-seed", type=int, default=123, metavar="SEED")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--repeats", type=positive_int, default=1, metavar="N", help="turns of engine and peers")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="PEER[:PYTHON]",
        help="also run a peer, in this environment or in that of PYTHON: transformers, vllm, openvino-genai, llama-cpp "
        "(repeatable)",
    )
    parser.add_argument("--peer-model", metavar="PATH", help="checkpoint for the peers instead of a converted one")
    parser.add_argument("--no-profile", action="store_true", help="leave out the profiled pass")
    add_model_arguments(parser)
    add_engine_arguments(parser)


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", type=positive_int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="N")
    parser.add_argument("--prompt-len", type=positive_int, default=128, metavar="TOKENS", help="default 128")
    parser.add_argument("--output-len", type=positive_int, default=64, metavar="TOKENS", help="default 64")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: all)")
    add_model_arguments(parser)
    add_engine_arguments(parser)


def _add_kv_utilisation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--distribution", choices=("sharegpt", "alpaca", "all"), default="all")
    parser.add_argument("--num-requests", type=positive_int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--slots", type=positive_int, default=15700, metavar="TOKENS", help="KV memory; default 15700")
    parser.add_argument("--block-sizes", type=positive_int, nargs="+", default=[8, 16, 32], metavar="TOKENS")
    parser.add_argument("--max-num-seqs", type=positive_int, default=1024, metavar="N", help="default 1024")
    parser.add_argument("--max-num-batched-tokens", type=positive_int, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--max-model-len", type=positive_int, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--workload-seed", type=int, default=0, metavar="SEED")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-seqs", type=positive_int, nargs="+", default=[32, 64, 128, 256, 512, 1024], metavar="N")
    parser.add_argument("--steps", type=positive_int, default=100, metavar="N", help="steps per point; default 100")
    parser.add_argument("--block-size", type=positive_int, default=32, metavar="TOKENS")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--no-model", action="store_true", help="leave out the real step at 32 sequences")
    add_model_arguments(parser)


def _add_tensor_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=2, help="default 2")
    parser.add_argument("--batch-sizes", type=positive_int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--steps", type=positive_int, default=40, metavar="N", help="steps per point; default 40")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads of all ranks (default: all)")


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer", metavar="nki-library=PATH",
        help="also run AWS's attention_tkg, from a clone of github.com/aws-neuron/nki-library, in the simulator",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="trn2 only, and no prefill")


def _add_buckets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=positive_int, default=400, metavar="N", help="per traffic; default 400")
    parser.add_argument("--max-num-seqs", type=positive_int, default=64, metavar="N", help="default 64")
    parser.add_argument("--workload-seed", type=int, default=0, metavar="SEED")


def _throughput(args: argparse.Namespace) -> dict[str, Any]:
    from neuron_paged.bench.compare import PeerSpec

    peers = [PeerSpec.parse(text) for text in args.compare]
    silence_profiler_log()

    from neuron_paged.bench.throughput import ThroughputPlan, run_throughput
    from neuron_paged.bench.workload import uniform_workload
    from neuron_paged.engine.llm import LLM

    num_threads = set_threads(args.threads)
    # Prompts may share text and are run again in every turn: hits would not be work done.
    settings = {"enable_prefix_caching": False, **engine_settings(args)}
    settings.setdefault("max_model_len", max(16, args.prompt_len[1] + args.output_len[1]))
    llm = LLM(args.model, dtype=args.dtype, weight_dtype=args.weight_dtype, progress=True, **settings)
    tokenizer = llm.get_tokenizer()
    if tokenizer is None:
        raise InvalidRequestError(f"--model: {args.model} has no tokenizer, which the workload's text needs.")
    workload = uniform_workload(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        num_requests=args.num_requests,
        prompt_range=args.prompt_len,
        output_range=args.output_len,
        seed=args.workload_seed,
    )
    plan = ThroughputPlan(workload, args.repeats, peers, args.peer_model, not args.no_profile, True)
    return {"model": args.model, "num_threads": num_threads, **run_throughput(llm, args.model, plan)}


def _latency(args: argparse.Namespace) -> dict[str, Any]:
    from neuron_paged.bench.latency import run_latency
    from neuron_paged.engine.llm import LLM

    num_threads = set_threads(args.threads)
    settings = {
        "enable_prefix_caching": False,
        "max_num_seqs": max(args.batch_sizes),
        "max_model_len": args.prompt_len + args.output_len,
        **engine_settings(args),
    }
    llm = LLM(args.model, dtype=args.dtype, weight_dtype=args.weight_dtype, progress=True, **settings)
    results = run_latency(
        llm,
        batch_sizes=args.batch_sizes,
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        progress=True,
    )
    return {"model": args.model, "num_threads": num_threads, **results}


def _tensor_parallel(args: argparse.Namespace) -> dict[str, Any]:
    from neuron_paged.bench.tensor_parallel import run_tensor_parallel

    set_threads(args.threads)
    return run_tensor_parallel(
        num_ranks=args.ranks, batch_sizes=args.batch_sizes, num_steps=args.steps, progress=True
    )


def _kv_utilisation(args: argparse.Namespace) -> dict[str, Any]:
    from neuron_paged.bench.kv_utilisation import StepModel, run_kv_utilisation
    from neuron_paged.bench.workload import DISTRIBUTIONS

    names = list(DISTRIBUTIONS) if args.distribution == "all" else [args.distribution]
    return {
        "distributions": [
            run_kv_utilisation(
                DISTRIBUTIONS[name],
                num_requests=args.num_requests,
                num_slots=args.slots,
                block_sizes=args.block_sizes,
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                max_model_len=args.max_model_len,
                seed=args.workload_seed,
                step_model=StepModel(),
                progress=True,
            )
            for name in names
        ]
    }


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    from neuron_paged.bench.engine import real_step, run_engine

    results = run_engine(
        num_seqs=sorted(set(args.num_seqs)), num_steps=args.steps, block_size=args.block_size, progress=True
    )
    results["model_step"] = None
    if not args.no_model:
        num_threads = set_threads(args.threads)
        step = real_step(args.model, args.dtype, 32, args.block_size)
        results["model_step"] = {"model": args.model, "num_threads": num_threads, **step}
    return results


def _kernels(args: argparse.Namespace) -> dict[str, Any]:
    need_package("ml_dtypes", "the NKI simulator")
    from neuron_paged.bench.kernels import run_kernels, run_peer
    from neuron_paged.bench.nki_library import library_source
    from neuron_paged.cli.kernel_files import describe_failure

    peer = None
    if args.peer is not None:
        name, _, path = args.peer.partition("=")
        if name != "nki-library" or not path:
            raise InvalidRequestError(f"--peer: got {args.peer!r}, need nki-library=PATH, the path of a clone.")
        source = library_source(path)
        try:
            with told() as tell:
                peer = run_peer(source, tell)
        except NeuronPagedError:
            raise
        except Exception as error:  # whatever a version of the library does that we don't know
            raise InvalidRequestError(f"--peer: attention_tkg failed: {describe_failure(error)}") from error
    with told() as tell:
        return run_kernels(peer, args.quick, tell)


def int_range(text: str) -> tuple[int, int]:
    """ "16:512" → (16, 512); "128" → (128, 128)."""
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = (0, 0)
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"got {text!r}, need LOW:HIGH with 1 <= LOW <= HIGH, such as 16:512")
    return bounds


def _buckets(args: argparse.Namespace) -> dict[str, Any]:
    need_package("ml_dtypes", "the NKI simulator")
    from neuron_paged.bench.buckets import run_buckets

    with told() as tell:
        return run_buckets(
            num_requests=args.num_requests, max_num_seqs=args.max_num_seqs, seed=args.workload_seed, tell=tell
        )

# SPDX-License-Identifier: Apache-2.0
"""From a trace of real traffic to the buckets worth compiling, with what they will pad, take and cost.

The trace has a line per request: arrival_s, prompt_tokens, output_tokens (JSON Lines, or CSV with these column names).
It is replayed through the engine's scheduler; times are modelled (simulated kernels, weights at memory bandwidth).
--instance alone, without --trace, shows with which tensor parallelism the model fits.
"""

import argparse
from typing import Any

from neuron_paged.cli.arguments import need_package, positive_int
from neuron_paged.cli.bucket_report import fits_report, plan_report
from neuron_paged.cli.early_checks import check_model
from neuron_paged.cli.output import STDOUT, check_file_target, check_json_target, write_file, write_json
from neuron_paged.errors import ConfigError, InvalidRequestError
from neuron_paged.memory import size_text
from neuron_paged.progress import told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to plan for, the budget, and where results go."""
    parser.add_argument("--trace", metavar="FILE", help="requests: JSON Lines or CSV")
    parser.add_argument("--max-graphs", type=_num_graphs, default=16, metavar="N", help="compiled graphs; default 16")
    parser.add_argument("--hbm-gb", type=_gibibytes, metavar="G", help="GiB of HBM per logical core (default: all)")
    parser.add_argument(
        "--model", default="demo", metavar="MODEL", help="demo, folder, GGUF file or org/name; only its config is read"
    )
    parser.add_argument("--target", metavar="T", help="inf2, trn1, trn2 or trn3 (default: --instance's, else trn2)")
    parser.add_argument("--instance", metavar="TYPE", help="EC2 instance, such as inf2.xlarge or trn2.48xlarge")
    parser.add_argument("--lnc", type=positive_int, metavar="N", help="NeuronCores per logical core (default: most)")
    parser.add_argument(
        "--tensor-parallel-size", type=positive_int, metavar="N",
        help="ranks (default: with --instance the fewest that fit, else 1)",
    )  # fmt: skip
    parser.add_argument("--block-size", type=positive_int, default=32, metavar="TOKENS", help="default 32")
    parser.add_argument("--max-num-seqs", type=positive_int, default=32, metavar="N", help="default 32")
    parser.add_argument("--max-num-batched-tokens", type=positive_int, default=512, metavar="N", help="default 512")
    parser.add_argument("--max-model-len", type=positive_int, metavar="N", help="default: the model's, at most 8192")
    parser.add_argument(
        "--tables", action="store_true", help="buckets of block tables instead of folds: for --graph-kernels plain"
    )
    parser.add_argument("--json", metavar="FILE", help='write the grids, a file of buckets ("-": to standard output)')
    parser.add_argument("--png", metavar="FILE", help="draw the traffic against the buckets")


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    check_json_target(args.json)
    check_file_target("--png", args.png)
    need_package("ml_dtypes", "the NKI simulator")
    if args.png is not None:
        need_package("matplotlib", "--png")
    if args.trace is None and args.instance is None:
        raise InvalidRequestError("--trace: missing, need a file of requests (or --instance alone, to see what fits).")
    from neuron_paged.planning.instances import find_instance
    from neuron_paged.planning.trace import read_trace

    # Before anything that takes seconds to import.
    trace = None if args.trace is None else read_trace(args.trace)
    if args.instance is not None:
        find_instance(args.instance)
    check_model(args.model)

    from neuron_paged.config import SchedulerConfig
    from neuron_paged.planning.bucket_plan import plan_buckets, replay_traffic
    from neuron_paged.planning.device_memory import DeviceMemory, fitting_ranks
    from neuron_paged.planning.replay import check_lengths
    from neuron_paged.planning.step_cost import step_cost

    setup = _Setup(args)
    rows = None
    if setup.instance is not None:
        rows = fitting_ranks(setup.model, setup.rank, setup.num_logical_cores, setup.hbm_bytes, setup.max_model_len)
        if trace is None and args.json != STDOUT:
            print(fits_report(setup.describe(), rows))
        if trace is None:
            write_json(args.json, {"instance": setup.instance.name, "ranks": rows})
            return 0 if any(row["fits"] for row in rows) else 1
    assert trace is not None
    rank = setup.rank(_tensor_parallel(args, setup, rows))
    memory = DeviceMemory(rank, setup.hbm_bytes)
    # What can't fit is refused before anything is simulated; the replay itself may see a part of the trace only.
    num_blocks = memory.num_blocks(args.max_num_seqs, setup.max_model_len)
    config = SchedulerConfig(args.max_num_seqs, args.max_num_batched_tokens, setup.max_model_len)
    check_lengths(trace, config, args.block_size, num_blocks)
    with told() as tell:
        cost = step_cost(rank, tell)
        tell(f"replaying {len(trace)} requests")
        traffic = replay_traffic(trace, config, memory, cost)
        tell(f"choosing at most {args.max_graphs} buckets for {len(traffic.replay.steps)} steps")
        plan = plan_buckets(traffic, memory, cost, args.max_graphs, args.tables)
        document = plan.document()
    if args.json != STDOUT:
        print(plan_report(setup.describe(), rank, document, plan))
    if args.json is not None:
        settings = {"max_num_seqs": args.max_num_seqs, "max_num_batched_tokens": args.max_num_batched_tokens,
                    "max_model_len": setup.max_model_len}  # fmt: skip
        write_json(args.json, plan.bucket_file(settings | {"plan": document}).document())
    if args.png is not None:
        from neuron_paged.planning.picture import draw_plan

        write_file("--png", args.png, lambda path: draw_plan(plan, path))
    return 0


class _Setup:
    """Model, target and device of the command line, checked."""

    def __init__(self, args: argparse.Namespace) -> None:
        from neuron_paged.config import DEFAULT_MAX_MODEL_LEN
        from neuron_paged.models.loader import load_config
        from neuron_paged.planning.decoder_model import decoder_model
        from neuron_paged.planning.instances import DEVICES, core_hbm_bytes, find_instance, logical_cores
        from neuron_paged.planning.rank import TARGETS
        from nki_kernels.hardware import DEFAULT_TARGET, generation

        self.args = args
        self.instance = None if args.instance is None else find_instance(args.instance)
        if self.instance is not None and args.target not in (None, self.instance.target):
            raise ConfigError(f"--target: got {args.target}, but {self.instance.name} is {self.instance.target}.")
        self.target = args.target or (self.instance.target if self.instance else DEFAULT_TARGET)
        if self.target not in TARGETS:
            raise ConfigError(f"--target: got {self.target!r}, need one of {', '.join(TARGETS)}.")
        self.num_cores = args.lnc or generation(self.target).lnc_max
        if self.num_cores > generation(self.target).lnc_max:
            raise ConfigError(
                f"--lnc: got {self.num_cores}, {self.target} has at most {generation(self.target).lnc_max} NeuronCores "
                "per logical core."
            )
        self.hbm_bytes = args.hbm_gb or core_hbm_bytes(self.target, self.num_cores)
        if self.hbm_bytes > core_hbm_bytes(self.target, self.num_cores):
            raise ConfigError(
                f"--hbm-gb: got {self.hbm_bytes / 2**30:g}, a logical core of {self.num_cores} NeuronCores of "
                f"{self.target} has {core_hbm_bytes(self.target, self.num_cores) / 2**30:g} GiB."
            )
        self.num_logical_cores = (
            logical_cores(self.instance, self.num_cores)
            if self.instance
            else DEVICES[self.target][0] * 16 // self.num_cores
        )
        config = load_config(args.model)
        self.model = decoder_model(str(args.model), config)
        self.max_model_len = args.max_model_len or min(config.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
        if self.max_model_len > config.max_position_embeddings:
            raise ConfigError(
                f"--max-model-len: got {self.max_model_len}, {args.model} takes {config.max_position_embeddings}."
            )
        windows = set(config.sliding_windows)
        # Layers with and without a window share a graph, whose plan is that of the layers without.
        self.sliding_window = windows.pop() if len(windows) == 1 else 0

    def rank(self, tensor_parallel: int) -> Any:
        from neuron_paged.planning.rank import Rank

        return Rank(
            self.model, self.target, tensor_parallel, self.num_cores, self.args.block_size, self.sliding_window,
            self.max_model_len,
        )  # fmt: skip

    def describe(self) -> str:
        where = f"{self.instance.name} ({self.target})" if self.instance else self.target
        return (
            f"{self.model.name} on {where}, {self.num_cores} NeuronCore{'s' * (self.num_cores > 1)} per rank with "
            f"{size_text(self.hbm_bytes)} of HBM, contexts up to {self.max_model_len} tokens"
        )


def _tensor_parallel(args: argparse.Namespace, setup: _Setup, rows: list[dict[str, Any]] | None) -> int:
    wanted: int | None = args.tensor_parallel_size
    if wanted is not None and wanted > setup.num_logical_cores:
        name = setup.instance.name if setup.instance else f"the largest {setup.target} instance"
        raise ConfigError(
            f"--tensor-parallel-size: got {wanted}, {name} has {setup.num_logical_cores} logical cores of "
            f"{setup.num_cores} NeuronCores."
        )
    if wanted is not None or rows is None:
        return wanted or 1
    fitting = [row["tensor_parallel_size"] for row in rows if row["fits"]]
    if not fitting:
        raise ConfigError(
            f"--instance: {setup.model.name} with {setup.max_model_len} tokens of context does not fit {args.instance} "
            f"with any of {', '.join(str(row['tensor_parallel_size']) for row in rows)} ranks; take a larger instance "
            "or a smaller --max-model-len."
        )
    return int(fitting[0])


def _num_graphs(text: str) -> int:
    count = positive_int(text)
    if count < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, need at least 2: decode steps and prompts take one each")
    return count


def _gibibytes(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"got {text!r}, need GiB, such as 16")
    return int(value * 2**30)

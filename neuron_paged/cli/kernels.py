# SPDX-License-Identifier: Apache-2.0
"""NKI kernels without a device: run them in the simulator, model this project's for a shape, compare the timing model
with measurements, lint sources."""

import argparse
from pathlib import Path

from neuron_paged.cli import Parser
from neuron_paged.cli.arguments import need_package, positive_int
from neuron_paged.cli.output import STDOUT, check_file_target, check_json_target, write_json
from neuron_paged.errors import InvalidRequestError

TARGETS = ("trn1", "inf2", "trn2", "trn3")
MAX_SEQS = 4096  # sequences and tokens that an option may name: beyond every bucket
MAX_LENGTH = 1 << 24
PROFILED = ("decode", "prefill", "reshape_and_cache", "copy_blocks", "rope")
_PROFILE = """\
Modelled cost of one call of this project's kernels: time and its range, bytes by kind, fractions of the HBM, DMA and
TensorE peaks, SBUF and PSUM, instructions, what bounds it. Heads are those of one rank. Nothing is measured.

lengths: 128,512,8192 or 8x8192 or 4x128,2x1024, tokens of each sequence
"""
_RUN = """\
Run one kernel on numpy arrays and print its outputs, what it depends on, and where the modelled time goes. Exit code 1
if it leaves elements of an output unwritten.

arguments, in the kernel's order (quote them, shells read brackets):
  'fp32[128,512]'          random normal by --seed; integers: zeros
  'bf16[128,512]=ones'     also zeros, arange, permutation, a number, LOW:HIGH (uniform), FILE.npy
  x.npy, bf16=x.npy        a numpy file; cast to the dtype before "="
  4, 0.5, True, None, (1, 2), "'text'", bfloat16    as Python reads them; dtype names are strings
"""
_CHECK = (
    "numpy reference, called with the same arguments (bf16, fp16 and fp8 arrays as fp32); what it returns, or writes "
    "into its arguments, must be what the kernel gives; exit code 1 if not"
)


class _IntermixedParser(Parser):
    """Positional arguments may stand between options."""

    _inside = False

    def parse_known_args(self, args=None, namespace=None):
        if self._inside:  # argparse's intermixed parsing calls this again, twice
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-subcommand per task."""

    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK", parser_class=_IntermixedParser)
    run_parser = tasks.add_parser(
        "run", help="run a kernel in the simulator", description=_RUN, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_run(run_parser)
    profile = tasks.add_parser(
        "profile", help="modelled cost of this project's kernels for a shape", description=_PROFILE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_profile(profile)
    text = "the timing model beside every measured figure, and the figures on which sources disagree"
    calibrate = tasks.add_parser("calibrate", help=text, description=text, allow_abbrev=False)
    calibrate.add_argument("--target", choices=TARGETS, help="only this instance family's (default: all)")
    calibrate.add_argument("--json", metavar="FILE", help='write the figures as JSON ("-": to standard output)')
    text = "what the NKI compiler refuses or hardware gets wrong, seen in the source; exit code 1 with errors"
    lint = tasks.add_parser("lint", help=text, description=text, allow_abbrev=False)
    lint.add_argument("paths", nargs="+", metavar="FILE|DIR", help="Python files, or folders with them")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kernel", metavar="FILE:KERNEL", help="without :KERNEL if FILE has one @nki.jit kernel")
    parser.add_argument("arguments", nargs="*", metavar="ARG", help="see above")
    parser.add_argument(
        "--kwarg", action="append", default=[], metavar="NAME=ARG", help="an argument by name (repeatable)"
    )
    parser.add_argument(
        "--target", choices=TARGETS, help="default: NEURON_PLATFORM_TARGET_OVERRIDE if it is set, else trn2"
    )
    parser.add_argument(
        "--grid", "--lnc", type=positive_int, metavar="N", help="programs that share the work: 2 is an LNC pair"
    )
    parser.add_argument("--strict", action="store_true", help="refuse what the NKI documents leave open, and poison")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the random arguments (default 0)")
    parser.add_argument("--check", metavar="FILE:FUNCTION", help=_CHECK)
    parser.add_argument(
        "--tolerance", type=float, metavar="X",
        help="of --check: relative Frobenius error (default: the spacing of the coarsest float dtype in use, but 1e-5 "
        "at least; integers must be equal)",
    )  # fmt: skip
    parser.add_argument(
        "--max-loop-iterations", type=positive_int, metavar="N", help="bound of a device loop (see the README)"
    )
    parser.add_argument("--hot-lines", type=int, default=5, metavar="N", help="busiest lines to print (default 5)")
    parser.add_argument("--traceback", action="store_true", help="also show Python's traceback when the kernel fails")
    group = parser.add_argument_group("files")
    group.add_argument("--json", metavar="FILE", help='write the results as JSON ("-": to standard output)')
    group.add_argument("--trace", metavar="FILE", help="write the timeline; opens in ui.perfetto.dev")
    group.add_argument("--png", metavar="FILE", help="draw the timeline")
    group.add_argument(
        "--save-outputs", metavar="FILE.npz", help="write the outputs (bf16 and fp8 as fp32, which is exact)"
    )


def _add_profile(parser: argparse.ArgumentParser) -> None:
    """Defaults are None, so that an option the kernel has no use for is noticed; kernel_profile.DEFAULTS has them."""
    parser.add_argument("kernel", choices=PROFILED, metavar="KERNEL", help=", ".join(PROFILED))
    parser.add_argument(
        "--target", choices=TARGETS, help="default: NEURON_PLATFORM_TARGET_OVERRIDE if it is set, else trn2"
    )
    parser.add_argument(
        "--context-lens", type=lengths, metavar="LENS", help="decode, prefill: tokens, this step's included"
    )
    parser.add_argument(
        "--query-lens", type=lengths, metavar="LENS",
        help="tokens of this step, one length for all or one per sequence (default: decode 1, prefill --context-lens)",
    )  # fmt: skip
    parser.add_argument("--num-pairs", type=positive_int, metavar="N", help="copy_blocks: blocks to copy")
    parser.add_argument("--num-heads", type=positive_int, metavar="N", help="query heads (default 8)")
    parser.add_argument("--num-kv-heads", type=positive_int, metavar="N", help="KV heads (default 1)")
    parser.add_argument("--head-dim", type=positive_int, metavar="N", help="default 128")
    parser.add_argument("--block-size", type=positive_int, metavar="TOKENS", help="default 32")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default bf16")
    parser.add_argument("--kv-dtype", choices=("bf16", "fp16", "fp32", "fp8"), help="of the cache (default: --dtype)")
    parser.add_argument("--lnc", type=positive_int, metavar="N", help="NeuronCores that share the work (default 1)")
    parser.add_argument("--sliding-window", type=positive_int, metavar="TOKENS", help="default: none")
    group = parser.add_argument_group("files")
    group.add_argument("--json", metavar="FILE", help='write the figures as JSON ("-": to standard output)')
    group.add_argument("--trace", metavar="FILE", help="write the timeline; opens in ui.perfetto.dev")
    group.add_argument("--png", metavar="FILE", help="draw the timeline")


def lengths(text: str) -> list[int]:
    """ "2x128,512" → [128, 128, 512]."""
    found: list[int] = []
    for part in text.split(","):
        count, times, length = part.rpartition("x")
        numbers = [count, length] if times else ["1", length]
        if not all(number.isdecimal() and 1 <= int(number) <= MAX_LENGTH for number in numbers):
            raise argparse.ArgumentTypeError(f"got {part!r} in {text!r}, need lengths such as 128,512 or 8x8192")
        if len(found) + int(numbers[0]) > MAX_SEQS:
            raise argparse.ArgumentTypeError(f"got more than {MAX_SEQS} sequences")
        found += [int(length)] * int(numbers[0])
    return found


def run(args: argparse.Namespace) -> int:
    """Run the chosen task."""
    if args.task == "lint":
        return _lint(args.paths)
    for option in ("trace", "png", "save_outputs"):
        check_file_target("--" + option.replace("_", "-"), getattr(args, option, None))
    check_json_target(args.json)
    need_package("ml_dtypes", "the NKI simulator")
    if args.task == "calibrate":
        return _calibrate(args)
    if args.png is not None:
        need_package("matplotlib", "--png")
    if args.task == "profile":
        from neuron_paged.cli.kernel_profile import profile_kernel

        return profile_kernel(args)
    from neuron_paged.cli.kernel_run import run_kernel

    return run_kernel(args)


def _calibrate(args: argparse.Namespace) -> int:
    from nki_kernels.simulator import calibration

    results = calibration.calibrate(args.target)
    if args.json != STDOUT:
        print(calibration.table(results))
    write_json(args.json, calibration.document(results))
    return 0


def _lint(paths: list[str]) -> int:
    from nki_kernels.source_lint import run_lint

    for path in paths:
        if not Path(path).exists():
            raise InvalidRequestError(f"{path} does not exist; pass Python files or folders with them.")
    return run_lint(paths)

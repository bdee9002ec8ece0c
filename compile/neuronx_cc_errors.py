# SPDX-License-Identifier: Apache-2.0
"""What neuronx-cc's failures mean and what to do: documented NCC codes (SDK 2.32, compiler/error-codes), exit codes,
and failures that third parties reported. Owns the table and the reading of a log; neuronx_cc.py owns the running.
"""

import re
from typing import NamedTuple


class Advice(NamedTuple):
    """meaning: what the compiler found. todo: what to change."""

    meaning: str
    todo: str


_HBM = Advice(
    "the graph's tensors, scratch space and spills exceed the memory of a logical core",
    "use fewer KV blocks (--num-blocks), smaller buckets, more tensor parallelism, or a target with more HBM",
)
_TOO_MANY_INSTRUCTIONS = Advice(
    "the graph became too many instructions (the limit is about 5 million)",
    "use smaller buckets or more tensor parallelism; for prefill try -O1",
)
_UNKNOWN_OPERATOR = Advice(
    "an operator is not supported",
    "run the graph lint; `neuronx-cc list-operators --framework XLA` lists what is",
)
_UNKNOWN_TARGET = Advice(
    "a custom call has a target this compiler does not know",
    "use AwsNeuronCustomNativeKernel or lower without kernels; the graph lint lists the known targets",
)
_INTERNAL = Advice(
    "an internal pass of the compiler failed",
    "try another -O level, a smaller bucket or another compiler version, and keep the log for a report",
)

ADVICE: dict[str, Advice] = {
    "EARG001": Advice(
        "the target does not have this logical-core configuration",
        "trn1 and inf2 have LNC 1 only; on trn2 and trn3 --lnc must equal NEURON_LOGICAL_NC_CONFIG",
    ),
    "EBIR023": Advice("an MLP kernel's intermediate size is above 4096", "use more tensor parallelism"),
    "EBVF030": _TOO_MANY_INSTRUCTIONS,
    "EHCA005": _UNKNOWN_TARGET,
    "EMOD025": Advice("a tensor has a dynamic dimension", "lower with static shapes; every bucket is one shape"),
    "EOOM001": _HBM,
    "EOOM002": _HBM,
    "ESFH002": Advice("a 64-bit constant does not fit 32 bits", "keep constants and indices within int32"),
    "ESPP004": Advice(
        "a dtype has no code generation, usually float64", "find the f64 with the graph lint; a Python float made it"
    ),
    "ESPP047": Advice("an fp8 type is not supported on this target", "use another KV-cache dtype or trn3"),
    "EUOC002": _UNKNOWN_OPERATOR,
    "EVRF001": _UNKNOWN_OPERATOR,
    "EVRF004": Advice("a tensor is complex", "compute with real tensors"),
    "EVRF005": Advice("an fp8 type is one of the fnuz variants", "use float8_e4m3 or bfloat16"),
    "EVRF007": _TOO_MANY_INSTRUCTIONS,
    "EVRF009": _HBM,
    "EVRF013": Advice("topk runs on integers", "convert its input to float32"),
    "EVRF015": _UNKNOWN_TARGET,
    "EVRF016": Advice("a scatter reduces integers", "reduce in float32, or write without a reduction"),
    "EVRF022": Advice("a right shift is not on 32 bits", "convert to int32 first"),
    "EVRF031": Advice("a scatter writes outside its operand", "check slot numbers against the cache's size"),
    "EVRF035": Advice("a matrix product has integer operands", "multiply in float32"),
    "EVRF051": Advice("float8_e4m3fn is native on trn3 only", "use float8_e4m3 on trn1 and trn2"),
    "EVRF052": Advice("float8_e4m3 is not supported after trn3", "use float8_e4m3fn"),
    "EVRF056": Advice("a gather reads outside its operand", "check positions against the rotary table's rows"),
    "EVRF059": Advice(
        "a kernel's file is missing", "pull the bundle again: kernel artifacts must lie beside the graph"
    ),
    "EVRF060": Advice("a scatter combines wide integers", "combine in float32"),
    "EVRF061": Advice("an all-reduce adds integers", "reduce float32"),
    "EVRF063": Advice("a reduce-scatter adds integers", "reduce float32"),
    "EVRF064": Advice("the graph violates XLA's shape rules", "lower again with the pinned torch_xla"),
    "EVRF065": Advice(
        "a kernel was traced by an older NKI", "rebuild with the NKI release that belongs to this compiler"
    ),
    "EXSP001": _HBM,
}
# Families without documentation of their own.
_PREFIXES: dict[str, Advice] = {
    "EOOM": _HBM,
    "EARG": Advice("the command line is wrong", "check the flags against this compiler version"),
    "EVRF": Advice("the graph's verification failed", "run the graph lint on the bucket"),
    **dict.fromkeys(("ITEN", "INLA", "INAS", "IBIR", "IXCG", "ISQI", "IXGM", "EOCP", "I"), _INTERNAL),
}
_OUT_OF_MEMORY = Advice(
    "the host ran out of memory or the compiler was killed",
    "compile fewer graphs at once (--jobs), set --memory, or use a host with more memory",
)
# Exit codes of the process; negative: killed by this signal. 137 = 128 + 9, from a shell in between.
_EXIT_CODES: dict[int, Advice] = {
    -9: _OUT_OF_MEMORY,
    137: _OUT_OF_MEMORY,
    -6: Advice("the compiler aborted", _INTERNAL.todo),
    -11: Advice("the compiler crashed", _INTERNAL.todo),
    -25: Advice("a file outgrew the limit of this process", "raise `ulimit -f`"),
    2: Advice("the command line is wrong", "check the flags against this compiler version"),
}
_CODE = re.compile(r"\bNCC_([A-Z]+\d+)\b")


def codes_in(log: str) -> list[str]:
    """NCC codes of a log, in order of appearance, each once, without "NCC_"."""
    return list(dict.fromkeys(_CODE.findall(log)))


def advice_for(code: str) -> Advice | None:
    """Advice on one NCC code, by the code itself or by its family."""
    if code in ADVICE:
        return ADVICE[code]
    for prefix in sorted(_PREFIXES, key=len, reverse=True):
        if code.startswith(prefix):
            return _PREFIXES[prefix]
    return None


def is_out_of_host_memory(exit_code: int, log: str) -> bool:
    """Whether the host's memory was the reason: killed, or the driver's own [F137]."""
    return exit_code in (-9, 137) or "[F137]" in log


def explain(exit_code: int, log: str) -> str:
    """One line: exit code, the first NCC code that is known, what it means and what to do."""
    codes = codes_in(log)
    advised = [(code, advice) for code in codes if (advice := advice_for(code)) is not None]
    if advised:
        code, advice = advised[0]
        return f"exit code {exit_code}, NCC_{code}: {advice.meaning}; {advice.todo}"
    known = _OUT_OF_MEMORY if is_out_of_host_memory(exit_code, log) else _EXIT_CODES.get(exit_code)
    named = "".join(f", NCC_{code}" for code in codes[:3])
    if known is not None:
        return f"exit code {exit_code}{named}: {known.meaning}; {known.todo}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"exit code {exit_code}{named}: {lines[-1][:200] if lines else 'it printed nothing'}"

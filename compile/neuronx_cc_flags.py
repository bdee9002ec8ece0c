# SPDX-License-Identifier: Apache-2.0
"""neuronx-cc's command line: documented options by compiler version and target, checked before anything starts, and in
a canonical form that is part of every key. Sources: the SDK's CLI reference (2.32) and AWS's own command lines.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from compile.errors import CompileError

Phase = Literal["prefill", "decode"]
NEURON_TARGETS = ("trn1", "inf2", "trn2", "trn3")
# Logical NeuronCore configurations: physical cores that act as one. The first is what the runtime uses by default.
LOGICAL_CORES: dict[str, tuple[int, ...]] = {"trn1": (1,), "inf2": (1,), "trn2": (2, 1), "trn3": (2, 1)}
# major.minor of neuronx-cc → SDK release it came with.
SDK_OF_COMPILER = {
    "2.22": "2.27", "2.23": "2.28", "2.24": "2.29", "2.25": "2.30", "2.26": "2.31", "2.27": "2.32",
}  # fmt: skip
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:\.(\d+))?(?:\+\w+)?")


@dataclass(frozen=True)
class Option:
    """One option.

    values: allowed ones; () takes none; None takes anything. default: what leaving it out means. since: first
    (major, minor) that knows it. internal: not on the documented command line, seen in AWS's own.
    """

    name: str
    values: tuple[str, ...] | None
    default: str | None = None
    since: tuple[int, int] = (2, 22)
    internal: bool = False


_FLAG: tuple[str, ...] = ()
OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option("--model-type", ("generic", "transformer", "unet-inference"), "generic"),
        Option("--auto-cast", ("none", "matmult", "all"), "none"),
        Option("--auto-cast-type", ("bf16", "fp16", "tf32", "fp8_e4m3"), "bf16"),
        Option("--optlevel", ("1", "2", "3"), "2"),
        Option("--native-int64", ("default", "enabled", "disabled"), "default", (2, 27)),
        Option("--implicit-integer-downcast", None, "default", (2, 27)),
        Option("--distribution-strategy", ("llm-training",)),
        Option("--enable-mixed-precision-accumulation", _FLAG),
        Option("--disable-mixed-precision-accumulation", _FLAG),
        Option("--enable-saturate-infinity", _FLAG),
        Option("--enable-fast-context-switch", _FLAG),
        Option("--enable-fast-loading-neuron-binaries", _FLAG),
        Option("--tensorizer-options", None, internal=True),
        Option("--internal-hlo2tensorizer-options", None, internal=True),
        Option("--internal-backend-options", None, internal=True),
        Option("--modular-flow-mac-threshold", None, internal=True),
        Option("--hbm-scratchpad-page-size", None, internal=True),
        Option("--experimental-unsafe-fp8e4m3fn-as-fp8e4m3", _FLAG, internal=True),
        Option("--verbose", ("info", "warning", "error", "critical", "debug"), "warning"),
    )
}
_SAME_AS = {"-O": "--optlevel", "-v": "--verbose"}
# Options that change what is printed, not what is compiled: no part of a key.
_COSMETIC = {"--verbose"}
# Refused by name, with the reason.
_REFUSED = {
    **dict.fromkeys(
        ("--no_cache", "--cache_dir", "--retry_failed_compilation", "--log_level"),
        "belongs to libneuronxla's wrapper, neuronx-cc does not know it; bundles and stores take the cache's place",
    ),
    **dict.fromkeys(("--framework", "--output", "--logfile", "-o"), "is set by this program"),
    "--target": "is set by this program; use its own --target",
    **dict.fromkeys(("--logical-nc-config", "-lnc", "--lnc"), "is set by this program; use its own --lnc"),
}


def compiler_version(text: str) -> tuple[int, ...]:
    """Numbers of a version such as "2.27.5334.0" or "2.22.12471.0+b4a00d10". ValueError if it is none."""
    found = _VERSION.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"compiler version: got {text!r}, need numbers such as 2.27.5334.0.")
    return tuple(int(part) for part in found.groups() if part is not None)


def check_compiler_version(text: str, *, allow_unknown: bool = False) -> str:
    """The version without its build hash. CompileError if the release is not one whose options are known here.

    allow_unknown: take a newer release for the newest known one.
    """
    version = compiler_version(text)
    known = [tuple(map(int, name.split("."))) for name in SDK_OF_COMPILER]
    if version[:2] not in known and not (allow_unknown and version[:2] > max(known)):
        first, last = min(known), max(known)
        raise CompileError(
            f"neuronx-cc: got version {text.strip()}, need {first[0]}.{first[1]} to {last[0]}.{last[1]} (SDK 2.27 to "
            "2.32), whose options are known here; install one of these"
            + ("." if version[:2] < first else ", or pass --allow-unknown-compiler to take it for the newest of them.")
        )
    return ".".join(map(str, version))


def check_lnc(target: str, lnc: int | None) -> int:
    """The logical-core configuration, the target's default for None. ValueError if the target does not have it."""
    if target not in LOGICAL_CORES:
        raise ValueError(f"target: got {target!r}, need one of {', '.join(NEURON_TARGETS)}.")
    allowed = LOGICAL_CORES[target]
    if lnc is None:
        return allowed[0]
    if lnc not in allowed:
        need = " or ".join(map(str, sorted(allowed)))
        raise ValueError(f"lnc: got {lnc} for {target}, need {need} (neuronx-cc would stop with NCC_EARG001).")
    return lnc


def default_flags(phase: Phase, version: str) -> tuple[str, ...]:
    """What this project passes unless told otherwise, canonical.

    As AWS's NxD Inference: no auto-cast, the transformer model type, -O2 for decode, -O1 for prefill (faster compiles,
    less splitting). From 2.27 on int64 is pinned off: the next release announces other defaults.
    """
    flags = ["--auto-cast=none", "--model-type=transformer", f"--optlevel={'1' if phase == 'prefill' else '2'}"]
    if compiler_version(version)[:2] >= (2, 27):
        flags += ["--native-int64=disabled", "--implicit-integer-downcast=all"]
    return canonical_flags(flags, version)


def parse_flags(text: str) -> tuple[str, ...]:
    """Words of NEURON_CC_FLAGS, split as a shell would; nothing is expanded. ValueError on an open quote."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"NEURON_CC_FLAGS: got {text!r}: {str(error).lower()}; close the quote.") from error


def canonical_flags(words: Iterable[str], version: str, *, origin: str = "flags") -> tuple[str, ...]:
    """The flags in one spelling and order: "--name=value" sorted by name, the last of equal names, no defaults.

    Equal results mean equal compiles. version: of neuronx-cc. origin: named in errors.
    ValueError for an option that is unknown, refused, too new for the compiler, or has a wrong value.
    """
    release = compiler_version(version)[:2]
    found: dict[str, str | None] = {}
    for name, value in _pairs(list(words), origin):
        option = OPTIONS[name]
        if release < option.since:
            since = ".".join(map(str, option.since))
            raise ValueError(f"{origin}: {name} needs neuronx-cc {since} or newer, got {version}; leave it out.")
        if option.values and value not in option.values:
            raise ValueError(f"{origin}: got {name}={value}, need one of {', '.join(option.values)}.")
        found[name] = value
    pair = ("--enable-mixed-precision-accumulation", "--disable-mixed-precision-accumulation")
    if all(name in found for name in pair):
        raise ValueError(f"{origin}: got both {' and '.join(pair)}, need one of them at most.")
    return tuple(
        name if value is None else f"{name}={value}"
        for name, value in sorted(found.items())
        if value is None or value != OPTIONS[name].default
    )


def flags_by_phase(version: str, environment: str, given: Iterable[str]) -> dict[Phase, tuple[str, ...]]:
    """All flags of a build: the defaults, then NEURON_CC_FLAGS (`environment`), then those of the command line.

    Raises ValueError naming where a wrong flag comes from.
    """
    more = canonical_flags(parse_flags(environment), version, origin="NEURON_CC_FLAGS")
    more += canonical_flags(given, version, origin="--compiler-flags")
    return {phase: canonical_flags([*default_flags(phase, version), *more], version) for phase in get_args(Phase)}


def _pairs(words: Sequence[str], origin: str) -> Iterable[tuple[str, str | None]]:
    """(name, value) of every option; value None for options without one."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word.startswith("-O") and len(word) > 2 and not word.startswith("-O="):
            word = f"-O={word[2:]}"
        name, equals, value = word.partition("=")
        if name in _REFUSED:
            raise ValueError(f"{origin}: {name} {_REFUSED[name]}; leave it out.")
        name = _SAME_AS.get(name, name)
        option = OPTIONS.get(name)
        if option is None:
            raise ValueError(f"{origin}: {word!r} is no option known here; need one of {', '.join(OPTIONS)}.")
        if option.values == _FLAG:
            if equals:
                raise ValueError(f"{origin}: {name} takes no value, got {word!r}.")
            yield name, None
            continue
        if not equals:
            if position == len(words):
                raise ValueError(f"{origin}: {name} needs a value.")
            value = words[position]
            position += 1
        if not value.strip() or "\0" in value:
            raise ValueError(f"{origin}: got {name}={value!r}, need a value.")
        yield name, value.strip()


def keyed_flags(flags: Iterable[str]) -> list[str]:
    """Canonical flags that change what is compiled."""
    return [flag for flag in flags if flag.partition("=")[0] not in _COSMETIC]


def command_line(
    compiler: str, target: str, lnc: int, flags: Sequence[str], *, graph: str = "graph.hlo", output: str = "graph.neff"
) -> list[str]:
    """The command, without a shell. flags: canonical. graph, output: file names in the folder where it runs."""
    check_lnc(target, lnc)
    command = [compiler, "compile", graph, "--framework", "XLA", "--target", target]
    if len(LOGICAL_CORES[target]) > 1:
        command.append(f"--logical-nc-config={lnc}")
    return [*command, *flags, "--output", output]

# SPDX-License-Identifier: Apache-2.0
"""Keys of graphs: whatever changes a graph changes its key, what only looks different does not."""

import ast
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from compile.bundle import bundle_key, differences, graph_key
from compile.host_cpu import instruction_sets
from compile.neuronx_cc_flags import canonical_flags
from compile.source_digest import sources_digest
from neuron_paged.engine import graph_fields
from neuron_paged.engine.bundles import wanted_fields
from neuron_paged.models.config import ModelConfig, RopeConfig
from neuron_paged.models.graph_plans import GraphModel

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2,
    head_dim=8, vocab_size=300, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope=RopeConfig("default", (1.0, 0.1, 0.01, 0.001)), sliding_windows=(0, 20), rope_layers=(True, True),
)  # fmt: skip
MODEL = GraphModel(CONFIG, "float32", 64, 8, 24, "float32")
VERSION = "2.27.5334.0"
KERNEL = '"""Doc."""\ndef kernel(x):\n    return x + 1\n'


def key(model: GraphModel = MODEL, target: str = "trn2", lnc: int = 2, version: str = VERSION, flags=("-O2",),
        operators: str = "plain", bucket: str = "decode_table-2x4") -> str:  # fmt: skip
    canonical = {"decode": canonical_flags(flags, VERSION), "prefill": canonical_flags(flags, VERSION)}
    return graph_key(graph_fields.neuron_fields(model, target, lnc, version, canonical, operators), bucket)


CHANGES: dict[str, Callable[[], str]] = {
    "layers": lambda: key(
        MODEL._replace(config=replace(CONFIG, num_layers=1, sliding_windows=(0,), rope_layers=(True,)))
    ),
    "norm": lambda: key(MODEL._replace(config=replace(CONFIG, rms_norm_eps=1e-6))),
    "window": lambda: key(MODEL._replace(config=replace(CONFIG, sliding_windows=(0, 21)))),
    "rope": lambda: key(MODEL._replace(config=replace(CONFIG, rope=RopeConfig("default", (1.0, 0.1, 0.01, 0.0011))))),
    "dtype": lambda: key(MODEL._replace(dtype="bfloat16")),
    "max_positions": lambda: key(MODEL._replace(max_positions=128)),
    "block_size": lambda: key(MODEL._replace(block_size=16)),
    "num_blocks": lambda: key(MODEL._replace(num_blocks=25)),
    "kv_cache_dtype": lambda: key(MODEL._replace(kv_cache_dtype="bfloat16")),
    "tensor_parallel": lambda: key(MODEL._replace(tensor_parallel_size=2)),
    "target": lambda: key(target="trn3"),
    "lnc": lambda: key(lnc=1),
    "version": lambda: key(version="2.26.6360.0"),
    "flag": lambda: key(flags=("-O1",)),
    "operators": lambda: key(operators="kernels"),
    "bucket": lambda: key(bucket="decode_table-2x8"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_changes_the_key(change: str) -> None:
    keys = {name: make() for name, make in CHANGES.items()}
    assert keys[change] != key()
    assert [name for name, other in keys.items() if other == keys[change]] == [change]


def test_what_only_looks_different_does_not() -> None:
    assert key() == key(flags=()) == key(flags=("--optlevel", "2", "--auto-cast=none", "--verbose=debug"))
    one = key(flags=("--enable-saturate-infinity", "-O1"))
    assert one == key(flags=("-O", "1", "--enable-saturate-infinity"))
    assert key() == key(MODEL._replace(config=replace(CONFIG, eos_token_ids=(2,))))
    nudged = RopeConfig("default", (1.0, 0.1 * (1 + 1e-15), 0.01, 0.001))
    assert key() == key(MODEL._replace(config=replace(CONFIG, rope=nudged)))
    code = "from tests.cpu.test_graph_fields import key; print(key())"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.stdout.strip() == key(), other.stderr


COSMETIC = [
    '"""Another docstring."""\n\n# a comment\ndef kernel( x ):\n\n    """Doc."""\n    return (x+1)  # why\n',
    "def kernel(\n    x,\n):\n    'text'\n    return x + 0x1\n",
]
REAL = [
    KERNEL.replace("+ 1", "+ 2"), KERNEL.replace("+ 1", "+ 1.0"), KERNEL.replace("+", "-"),
    KERNEL.replace("(x)", "(x, y=0)"), KERNEL.replace("kernel", "other"), KERNEL + "SIZE = 3\n",
    KERNEL.replace("return", "yield"),
]  # fmt: skip


def test_kernel_sources_count_by_meaning() -> None:
    digest = sources_digest({"k.py": KERNEL})
    assert [sources_digest({"k.py": text}) for text in COSMETIC] == [digest] * len(COSMETIC)
    others = [sources_digest({"k.py": text}) for text in REAL] + [sources_digest({"l.py": KERNEL})]
    assert len({digest, *others}) == 2 + len(REAL)


def test_real_kernels_survive_reformatting_and_notice_an_edit(tmp_path: Path) -> None:
    for source in (ROOT / "nki_kernels").glob("*.py"):
        text = ast.unparse(ast.parse(source.read_text()))  # without comments, in other lines
        (tmp_path / "nki_kernels").mkdir(exist_ok=True)
        (tmp_path / "nki_kernels" / source.name).write_text("# changed\n" + text)
    digest = graph_fields.kernel_sources_digest.__wrapped__
    assert digest(tmp_path) == digest()
    (tmp_path / "nki_kernels" / "prefill_estimates.py").write_text("")  # models figures, which no graph has
    assert digest(tmp_path) == digest()
    edited = tmp_path / "nki_kernels" / "paged_attention_decode.py"
    edited.write_text(edited.read_text() + "\nEXTRA = 1\n")
    assert digest(tmp_path) != digest()


GROUPS = (
    graph_fields.STEP_SOURCES, graph_fields.OPERATOR_SOURCES, graph_fields.LOWERING_SOURCES,
    graph_fields.KERNEL_SOURCES,
)  # fmt: skip


def test_every_named_source_exists() -> None:
    for pattern, names in GROUPS:
        assert [name for name in names if not (ROOT / pattern.format(name)).is_file()] == []


# Imported by the listed sources, but no graph says what they do: values that are in the key, host code, loading.
NOT_IN_GRAPHS = {
    "neuron_paged.models": {"config", "kv_scales", "weights"},
    "neuron_paged.ops": {"autograd", "cpu", "value_checks", "host_kernels"},
    "compile": {"child_process", "errors", "lower"},
    "nki_kernels": {"simulator"},
}


def imported_modules(source: Path, package: str) -> set[str]:
    """Modules of a package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        own = [".".join(source.parent.relative_to(ROOT).parts)] if node.level else []
        module = ".".join([*own, *([node.module] if node.module else [])])
        if module == package:
            found |= {alias.name for alias in node.names}
        elif module.startswith(f"{package}."):
            found.add(module.removeprefix(f"{package}.").partition(".")[0])
    return found


def test_the_named_sources_are_closed_under_imports() -> None:
    sources = [ROOT / pattern.format(name) for pattern, names in GROUPS for name in names]
    for (_, names), package in zip(GROUPS, NOT_IN_GRAPHS, strict=True):
        imported = set().union(*(imported_modules(source, package) for source in sources))
        assert imported - set(names) - NOT_IN_GRAPHS[package] == set(), f"add to graph_fields' sources of {package}"


def test_settings_that_are_not_given_are_left_open() -> None:
    whole = graph_fields.cpu_fields(MODEL, "kernels")
    here = partial(graph_fields.served_cpu_fields, kernels="cpu")
    wanted = wanted_fields(CONFIG, dtype="auto", cache={}, max_model_len=None, fields_here=here)
    assert "cache" not in wanted and not {"max_positions", "dtype"} & set(wanted["model"])
    given = {"block_size": 8, "num_blocks": 24, "kv_cache_dtype": "fp32"}
    assert wanted_fields(CONFIG, dtype="fp32", cache=given, max_model_len=64, fields_here=here) == whole
    assert bundle_key(whole, ["a"]) != bundle_key(graph_fields.cpu_fields(MODEL, "plain"), ["a"])


def test_a_neuron_bundle_of_either_kind_of_operators_is_served() -> None:
    """Who names no kernels gets what the bundle has; target, LNC, model and cache must be those of here."""
    flags = {"decode": ("--optlevel=2",), "prefill": ("--optlevel=1",)}
    here = graph_fields.served_neuron_fields(MODEL, "cpu", "trn1", 1)
    for operators, target in (("plain", "trn2"), ("kernels", "trn1")):
        made = graph_fields.neuron_fields(MODEL._replace(target=target), "trn1", 1, VERSION, flags, operators)
        assert differences(made, here, partial=True) == []
        plain = graph_fields.served_neuron_fields(MODEL, "plain", "trn1", 1)
        says = [] if operators == "plain" else ["operators: kernels → plain"]
        assert differences(made, plain, partial=True) == says
    other = graph_fields.served_neuron_fields(MODEL._replace(num_blocks=25), "cpu", "trn2", 2)
    found = differences(made, other, partial=True)
    assert found == ["cache.num_blocks: 24 → 25", "lnc: 1 → 2", "target: trn1 → trn2"]


def test_instruction_sets_ignore_what_code_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("processor : 0\nflags : fpu avx2 sse4_2 hypervisor\n")
    (tmp_path / "two").write_text("flags : sse4_2 avx2 lm\nflags : sse2\n")
    (tmp_path / "three").write_text("flags : sse4_2 avx2 avx512f\n")
    one, two, three = (instruction_sets(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three and "avx512f" in three

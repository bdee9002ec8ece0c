# SPDX-License-Identifier: Apache-2.0
"""The rules of the kernel source lint, as data: what is refused, why, what to write instead, and who says so.

`error` means the NKI compiler refuses the code or the device miscomputes or hangs; `warning` means known slow,
or true for some releases and generations only. Nothing here was measured by this project; origins are tagged
[doc] AWS documentation of Neuron SDK 2.32 (NKI 0.6), [front end] the published NKI front end (KLR, March 2026),
[hardware] third-party runs on trn1, trn2 or trn3, [source] AWS's published kernels.
"""

from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]


class Rule(NamedTuple):
    """One rule: `reason` and `fix` are one line each; `origin` says where the knowledge comes from."""

    id: str
    severity: Severity
    reason: str
    fix: str
    origin: str


_E: Severity = "error"
_W: Severity = "warning"

_LANGUAGE = (
    Rule("comprehension", _E, "the front end has no comprehensions or generator expressions",
         "build the list with a for loop and append", "[front end] [hardware]"),
    Rule("for-target", _E, "a for target must be one simple variable; tuples are refused",
         "loop over an index and read the elements by subscript", "[front end] [hardware]"),
    Rule("assign-target", _E, "tuple targets may hold simple names only; stores into objects stand alone",
         "unpack into plain names, then store each one in its own statement", "[front end]"),
    Rule("starred", _E, "the front end has no tuple (*x) or keyword (**x) expansion",
         "pass the arguments one by one", "[front end]"),
    Rule("varargs", _E, "functions in kernel code cannot take *args", "name every parameter", "[front end]"),
    Rule("kwargs-parameter", _W, "**kwargs is accepted only as long as it stays empty",
         "name every parameter", "[front end]"),
    Rule("keyword-only", _E, "the `*` separator in a signature is not supported; keyword-only defaults get lost",
         "drop the `*` and put parameters with defaults last", "[doc] [hardware]"),
    Rule("dict-key", _E, "dictionary keys must be string literals", "use string keys, or a list", "[doc] [front end]"),
    Rule("set-value", _E, "the language has no sets", "use a list or a dict with string keys", "[doc]"),
    Rule("constant-type", _E, "values are None, bool, int32, float32 and str only",
         "pass complex or bytes data as a tensor", "[doc]"),
    Rule("int-range", _E, "integer constants must fit 32 signed bits", "split the constant, or load it from a tensor",
         "[doc] [front end]"),
    Rule("lambda", _E, "the front end has no lambda", "define a module-level function", "[front end]"),
    Rule("inner-function", _E, "inner functions are accepted only as bodies of fori_loop and while_loop",
         "move the function to module level and pass what it needs", "[doc] [front end]"),
    Rule("inner-class", _E, "classes cannot be defined inside a function", "move the class to module level",
         "[front end]"),
    Rule("local-import", _E, "import statements inside kernel code are refused; names resolve through module globals",
         "import at module level", "[front end] [hardware]"),
    Rule("try", _E, "try statements are refused", "test the condition with if, or assert", "[front end]"),
    Rule("raise", _E, "raise statements are refused", "use assert condition, message", "[front end]"),
    Rule("global-nonlocal", _E, "kernel code cannot rebind outer names", "pass the state as argument and return it",
         "[front end]"),
    Rule("async-yield", _E, "no async, await or yield in kernel code", "write a plain function returning a list",
         "[front end] [hardware]"),
    Rule("unsupported-statement", _E, "del, match and type statements are refused", "use if/elif, rebind the name",
         "[front end]"),
    Rule("walrus", _E, "assignment expressions are refused", "assign in a statement of its own", "[front end]"),
    Rule("loop-else", _E, "for/while ... else is refused", "use a flag", "[front end]"),
    Rule("with-context", _E, "the only context manager is `with nl.no_reorder():`", "remove the with statement",
         "[front end]"),
    Rule("matmul-operator", _E, "the @ operator is refused", "call nisa.nc_matmul", "[front end]"),
    Rule("format-spec", _E, "f-strings may not carry a format specifier", "drop the part after the colon",
         "[front end]"),
    Rule("is-operator", _W, "`is` means `==` during tracing, and is documented as unsupported",
         "use == or !=", "[doc] [front end]"),
    Rule("is-none", _W, "`is None` is documented as unsupported, though AWS's own kernels rely on it",
         "use == None, or a flag decided on the host", "[doc] [source]"),
    Rule("host-builtin", _W, "this Python built-in is not among the front end's",
         "write the loop out, or compute the value on the host", "[front end]"),
    Rule("min-max-arguments", _W, "the front end's min and max take two values or one list",
         "nest the calls", "[front end]"),
    Rule("host-library", _E, "numpy, torch and the like do not exist inside a kernel",
         "compute on the host and pass the result, or wrap constant arrays in nl.shared_constant", "[doc]"),
    Rule("mutable-global", _W, "kernels are cached by their arguments: a change of this global is not seen",
         "make it a tuple or constant, or pass it as argument", "[doc]"),
    Rule("jitted-subkernel", _W, "documented to fail with a misleading NKIObject error; some releases unwrap it",
         "leave it undecorated; write nki.jit(kernel) where it is called on its own", "[doc] [front end] [source]"),
    Rule("jit-platform-target", _E, "nki.jit(platform_target=...) raises since NKI 0.3",
         "set NEURON_PLATFORM_TARGET_OVERRIDE", "[doc]"),
    Rule("jit-mode", _W, "nki.jit(mode=...) is ignored since NKI 0.3", "remove the argument", "[doc]"),
    Rule("decorator", _E, "the front end knows staticmethod, dataclass and nki.jit only",
         "remove the decorator", "[front end]"),
    Rule("class-base", _E, "classes in kernel code must derive from NKIObject only (or be an Enum or NamedTuple)",
         "derive from nl.NKIObject", "[doc] [front end]"),
    Rule("legacy-namespace", _E, "neuronxcc.nki inside kernels is a compile error since NKI 0.4",
         "import nki, nki.isa, nki.language", "[doc]"),
    Rule("list-argument", _E, "list (and dict, set) kernel arguments are refused", "take a tuple", "[doc]"),
)

_API = (
    Rule("string-buffer", _E, "buffer names as strings are refused", "use nl.sbuf, nl.psum, nl.shared_hbm, nl.hbm",
         "[doc]"),
    Rule("int-enum", _E, "plain integers for enum parameters are refused", "use the member, e.g. nisa.engine.vector",
         "[doc]"),
    Rule("mask-argument", _E, "the mask parameter is gone", "clip the slices with min()", "[doc]"),
    Rule("removed-api", _E, "this call was removed from NKI", "see the NKI migration guide; slices and .ap replace it",
         "[doc]"),
    Rule("isa-arguments", _E, "the arguments do not fit the instruction's NKI 0.6 signature",
         "pass dst first and the parameters by their documented names", "[doc]"),
    Rule("unknown-instruction", _E, "nki.isa of NKI 0.6 has no instruction of this name",
         "use a documented instruction", "[doc]"),
    Rule("undocumented-argument", _W, "no document has this argument, though published kernels pass it",
         "leave it out", "[source]"),
    Rule("deprecated-range", _W, "affine_range, sequential_range and static_range are deprecated aliases of range",
         "use range", "[doc]"),
    Rule("dynamic-range", _W, "dynamic_range and `while register:` are deprecated since NKI 0.6",
         "use nl.fori_loop or nl.while_loop", "[doc]"),
    Rule("experimental-api", _W, "the nki.language convenience calls are experimental",
         "use the nisa instruction with an explicit dst", "[doc]"),
    Rule("output-buffer", _E, "tensors that a kernel returns must be in shared_hbm",
         "allocate it with buffer=nl.shared_hbm", "[doc]"),
    Rule("on-chip-result", _W, "SBUF and PSUM tiles can be returned to a calling kernel only, not to the host",
         "return a tensor in nl.shared_hbm if the host launches this kernel", "[doc] [source]"),
    Rule("on-chip-rank", _E, "SBUF and PSUM tensors have at least two dimensions", "use shape (1, n) or (n, 1)",
         "[doc]"),
    Rule("partition-limit", _E, "SBUF and PSUM have 128 partitions", "tile the first dimension by 128", "[doc]"),
    Rule("ap-on-view", _W, ".ap on a sliced view: documents disagree whether the slice counts",
         "call .ap on the whole tensor and give the offset", "[doc]"),
    Rule("ap-indirection", _E, "vector_offset goes with indirect_dim=0 and without scalar_offset",
         "reshape so that the indexed dimension is the first", "[doc]"),
    Rule("tile-in-loop", _W, "tiles allocated in unrolled loops overran SBUF and aliased silently on trn1",
         "allocate a ring of tiles once, before the loop", "[hardware]"),
)

_LOOPS = (
    Rule("nested-device-loop", _E, "nested device loops fail on trn1 and through NKI 0.5 (operand dominance error)",
         "unroll the outer or the inner loop with range", "[hardware] [doc]"),
    Rule("loop-body-callable", _E, "a loop body must be a plain function, not partial, lambda or method call",
         "define the body with def", "[hardware]"),
    Rule("loop-return", _E, "a fori_loop body returns None, a while_loop body the next condition register",
         "keep state in SBUF or HBM", "[doc]"),
    Rule("loop-jump", _E, "break, continue and return are refused in a device loop", "compute the trip count first",
         "[front end]"),
    Rule("loop-step", _E, "the step must be a positive compile-time integer", "count up", "[doc]"),
    Rule("loop-variable", _E, "the loop variable is a register: no Python arithmetic, comparison or branch on it",
         "use it as .ap(scalar_offset=i) only", "[doc]"),
    Rule("register-arithmetic", _E, "registers have no arithmetic and cannot steer Python",
         "compute in SBUF, then register_load", "[doc]"),
    Rule("loop-psum", _E, "PSUM allocated outside a device loop and used inside fails (NCC_IBIR092)",
         "allocate the PSUM tile in the loop body", "[hardware]"),
    Rule("loop-dge-none", _E, "dge_mode.none inside a device loop is refused", "leave dge_mode away or use swdge",
         "[source]"),
    Rule("loop-dma-name", _E, "names of DMAs in a device loop must be unique", "give each its own name", "[source]"),
    Rule("loop-no-reorder", _E, "device loops cannot sit inside nl.no_reorder()", "put no_reorder inside the body",
         "[doc]"),
)

_INSTRUCTIONS = (
    Rule("implicit-accumulate", _W, "accumulate=None can chain into a reused PSUM tile",
         "pass accumulate=False for the first matmul of a chain, True for the rest", "[hardware]"),
    Rule("accumulate-memset", _E, "accumulating onto memset PSUM is undefined on NeuronCore-v2 and v3",
         "drop the memset and start the chain with accumulate=False", "[doc]"),
    Rule("accumulate-slice", _W, "several accumulation chains in one PSUM tile lose partial sums on trn1",
         "one PSUM tensor per chain", "[hardware]"),
    Rule("matmul-buffers", _E, "nc_matmul reads SBUF and writes PSUM", "copy the operand into SBUF, take a PSUM dst",
         "[doc]"),
    Rule("matmul-tile", _E, "tile_position and tile_size come together, in multiples of 32",
         "pass both or neither", "[doc]"),
    Rule("dma-psum", _E, "DMA does not reach PSUM", "tensor_copy into SBUF first", "[doc]"),
    Rule("dma-transpose-skip", _E, "oob_mode.skip on dma_transpose can wedge the device",
         "point padded indices at a valid row", "[hardware]"),
    Rule("hwdge-gather", _E, "vector offsets go through swdge, never hwdge", "leave dge_mode away", "[doc]"),
    Rule("scatter-source", _E, "the source of a vector scatter must be in SBUF", "load it into SBUF first", "[source]"),
    Rule("skip-view-source", _W, "a skipped scatter with a sub-tensor view as source still wrote, on trn1",
         "copy the view into a tile of its own", "[hardware]"),
    Rule("dma-compute-op", _E, "dma_compute reduces with nl.add only, at most 16 sources", "use nl.add", "[doc]"),
    Rule("dynamic-operand", _W, "runtime offsets on compute operands fail on hardware (NCC_INLA001, NCC_IBIR829)",
         "move the data with dma_copy; only DMA addresses may be dynamic", "[hardware]"),
    Rule("two-psum-operands", _E, "VectorE reads at most one PSUM operand per instruction",
         "copy one operand into SBUF", "[hardware] [doc]"),
    Rule("gpsimd-psum", _E, "GpSimd does not reach PSUM", "use engine vector or scalar", "[doc]"),
    Rule("gpsimd-tensor-scalar", _W, "tensor_scalar on GpSimd fails on NeuronCore-v2 (rsqrt excepted)",
         "use engine vector", "[hardware]"),
    Rule("activation-reduce", _E, "activation reduces with nl.add only", "use tensor_reduce for other reductions",
         "[doc]"),
    Rule("activation-accumulator", _W, "reduce_res with reduce_cmd idle reads stale accumulators",
         "pass reduce_cmd=nisa.reduce_cmd.reset_reduce", "[doc]"),
    Rule("activation-immediate", _W, "a constant bias is refused on NeuronCore-v2 and costs a memset elsewhere",
         "keep a [P, 1] tile with the constant", "[doc] [hardware]"),
    Rule("reduce-axis", _E, "tensor_reduce runs over the last free axes, never over partitions",
         "transpose first, or reduce with a ones-matmul", "[doc]"),
    Rule("partition-reduce", _W, "tensor_partition_reduce is slow, and maximum is refused on trn3",
         "transpose and reduce, or a ones-matmul for sums", "[hardware]"),
    Rule("range-select", _E, "range_select reduces with maximum and fills with the lowest fp32 only",
         "leave reduce_op and on_false_value away", "[doc]"),
    Rule("memset-type", _E, "the Python type of value must match the tile's dtype", "write 0 for integers, 0.0 else",
         "[doc]"),
    Rule("infinite-value", _W, "infinities become NaN in NeuronCore-v2 transposes and in differences",
         "use a large finite value such as -3.0e38", "[doc]"),
    Rule("needs-v3", _W, "absent on NeuronCore-v2, and no get_nc_version() gate is in sight",
         "gate it with nisa.get_nc_version()", "[doc] [hardware]"),
    Rule("needs-v4", _W, "absent before NeuronCore-v4, and no get_nc_version() gate is in sight",
         "gate it with nisa.get_nc_version()", "[doc]"),
)

_LINT = (
    Rule("suppression", _E, "a suppression needs known rules and a reason",
         "write `# nki-lint: allow RULE reason`", "this lint"),
    Rule("unused-suppression", _W, "nothing on this line needs the suppression", "remove the comment", "this lint"),
)

RULES: dict[str, Rule] = {rule.id: rule for group in (_LANGUAGE, _API, _LOOPS, _INSTRUCTIONS, _LINT) for rule in group}

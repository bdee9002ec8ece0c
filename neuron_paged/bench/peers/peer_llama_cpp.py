# SPDX-License-Identifier: Apache-2.0
"""llama.cpp through `llama-cpp-python`, batched the way its server does: every step takes one token of each decoding
slot, then prompt tokens of waiting requests up to the batch size."""

import ctypes
import time
from typing import Any

NAME = "llama.cpp (server-style batching)"


def version() -> str:
    """Version of the peer."""
    import llama_cpp

    return llama_cpp.__version__


def load(job: dict[str, Any]) -> Any:
    """Load the model and return `generate(requests)`."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(job["model"].encode(), model_params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {job['model']}")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    slots, budget = job["max_num_seqs"], job["max_num_batched_tokens"]
    longest = max(len(r["prompt_token_ids"]) + r["max_tokens"] for r in job["requests"])
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = slots * ((longest + 255) // 256 * 256)
    params.n_batch = params.n_ubatch = budget
    params.n_seq_max = slots
    params.n_threads = params.n_threads_batch = job["threads"]
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")
    batch = llama_cpp.llama_batch_init(budget, 0, 1)

    def put(token: int, position: int, slot: int, wants_logits: bool) -> int:
        row = batch.n_tokens
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, wants_logits
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, slot
        batch.n_tokens = row + 1
        return row

    def argmax(row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, ctypes.c_int32(row))
        return int(np.ctypeslib.as_array(logits, shape=(vocab_size,)).argmax())

    def generate(requests: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[float]]]:
        outputs: list[list[int]] = [[] for _ in requests]
        times: list[list[float]] = [[] for _ in requests]
        computed = [0] * len(requests)
        waiting = list(range(len(requests)))
        running: dict[int, int] = {}  # slot: request
        start = time.perf_counter()
        while waiting or running:
            for slot in range(slots):
                if waiting and slot not in running:
                    running[slot] = waiting.pop(0)
            batch.n_tokens = 0
            rows: dict[int, int] = {}  # slot: row whose logits give the next token
            decoding = [slot for slot, index in running.items() if outputs[index]]
            for slot in decoding:
                index = running[slot]
                rows[slot] = put(outputs[index][-1], computed[index], slot, True)
                computed[index] += 1
            for slot, index in running.items():
                prompt = requests[index]["prompt_token_ids"]
                while slot not in decoding and computed[index] < len(prompt) and batch.n_tokens < budget:
                    last = computed[index] == len(prompt) - 1
                    row = put(prompt[computed[index]], computed[index], slot, last)
                    computed[index] += 1
                    if last:
                        rows[slot] = row
            status = llama_cpp.llama_decode(context, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")
            now = time.perf_counter() - start
            for slot, row in rows.items():
                index = running[slot]
                outputs[index].append(argmax(row))
                times[index].append(now)
                if len(outputs[index]) == requests[index]["max_tokens"]:
                    del running[slot]
                    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), slot, -1, -1)
        return outputs, times

    return generate

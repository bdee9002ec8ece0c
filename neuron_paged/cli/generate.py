# SPDX-License-Identifier: Apache-2.0
"""Generate text from prompts, batched continuously over a paged KV cache.

Prompts come from --prompt (repeatable) and --prompts-file (one per line; .jsonl: {"prompt": …} or {"messages": […]}).
If the model has a chat template, a plain prompt is one user message of a chat; --raw passes it on as it stands.
Text goes to standard output, progress and figures to standard error.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from neuron_paged import __version__
from neuron_paged.cli.arguments import (
    add_engine_arguments,
    add_graph_arguments,
    add_model_arguments,
    add_sampling_arguments,
    engine_settings,
    graph_settings,
    positive_int,
    sampling_params,
    set_threads,
)
from neuron_paged.cli.early_checks import check_graphs, check_model
from neuron_paged.cli.output import STDOUT, check_json_target, write_json
from neuron_paged.cli.prompts import Prompt, collect_prompts
from neuron_paged.errors import InvalidRequestError

if TYPE_CHECKING:
    from neuron_paged.engine.llm import LLM
    from neuron_paged.engine.outputs import RequestOutput
    from neuron_paged.engine.prompts import Prompt as EnginePrompt
    from neuron_paged.engine.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 256
_HEADER_LEN = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `neuron-paged generate`."""
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--prompts-file", metavar="FILE", help='text or .jsonl, "-" is standard input')
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="apply the chat template; an error if the model has none")
    form.add_argument("--raw", action="store_true", help="never apply a chat template")
    parser.add_argument("--stream", action="store_true", help="print text as it comes, prompt by prompt")
    parser.add_argument("--json", metavar="FILE", help='write results and figures as JSON ("-": to standard output)')
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, metavar="N",
        help="processes that share weights, KV heads and the CPU threads (default: 1)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no figures")
    add_model_arguments(parser)
    add_engine_arguments(parser)
    add_graph_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without the model, load it, generate, print."""
    if args.stream and args.json == STDOUT:
        raise InvalidRequestError("--stream: both it and --json - write to standard output; give --json a file.")
    prompts = collect_prompts(args.prompt, args.prompts_file)
    params = sampling_params(args, max_tokens=DEFAULT_MAX_TOKENS)
    check_json_target(args.json)
    check_model(args.model)
    check_graphs(args.bundle, args.graph_bucket)

    from neuron_paged.engine.llm import LLM

    num_threads = set_threads(args.threads)
    progress = not args.quiet
    settings = {**engine_settings(args), **graph_settings(args)}
    llm = LLM(args.model, dtype=args.dtype, weight_dtype=args.weight_dtype, progress=progress, **settings)
    rendered = [_render(llm, prompt, args) for prompt in prompts]
    headers = [prompt.text if prompt.text is not None else _last_message(prompt) for prompt in prompts]

    start = time.perf_counter()
    if args.stream:
        outputs = _stream(llm, rendered, params, headers)
    else:
        outputs = llm.generate(rendered, params, use_tqdm=progress)
    seconds = time.perf_counter() - start

    if not args.stream and args.json != STDOUT:
        _print_texts(outputs, headers)
    statistics = _statistics(llm, outputs, seconds, num_threads)
    if not args.quiet:
        sys.stdout.flush()
        print(_figures(statistics, args.executor), file=sys.stderr)
    write_json(args.json, _document(args, outputs, headers, params, statistics))
    return _report_errors(outputs)


def _report_errors(outputs: list["RequestOutput"]) -> int:
    """Say which prompts' output is cut short by an error; the exit code."""
    failed = [(number, output.error) for number, output in enumerate(outputs, start=1) if output.error is not None]
    for number, error in failed:
        print(f"neuron-paged: prompt {number}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _render(llm: "LLM", prompt: Prompt, args: argparse.Namespace) -> "EnginePrompt":
    """What the engine gets: token ids of a chat, or the bare text."""
    if prompt.messages is not None:
        if args.raw:
            raise InvalidRequestError("--raw: the prompts file has `messages`, which need a chat template.")
        return llm.render_chat(prompt.messages)
    assert prompt.text is not None
    tokenizer = llm.get_tokenizer()
    has_template = tokenizer is not None and bool(tokenizer.chat_template)
    if args.chat or (has_template and not args.raw):
        return llm.render_chat([{"role": "user", "content": prompt.text}])
    return prompt.text


def _last_message(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"] if prompt.messages else ""


def _header(text: str, sample: int | None) -> str:
    line = " ".join(text.split())
    short = line if len(line) <= _HEADER_LEN else line[: _HEADER_LEN - 1] + "…"
    return f">>> {short}" + ("" if sample is None else f"  [{sample + 1}]")


def _completions(outputs: list["RequestOutput"]) -> Iterator[tuple[int, int, str]]:
    """(prompt, sample, text) in order."""
    for index, output in enumerate(outputs):
        for completion in output.outputs:
            yield index, completion.index, completion.text


def _print_texts(outputs: list["RequestOutput"], headers: list[str]) -> None:
    listed = list(_completions(outputs))
    for index, sample, text in listed:
        if len(listed) == 1:
            print(text)
        else:
            print(f"{_header(headers[index], sample if len(outputs[index].outputs) > 1 else None)}\n{text}\n")


def _stream(llm: "LLM", prompts: list[Any], params: "SamplingParams", headers: list[str]) -> list["RequestOutput"]:
    """All prompts run together; the first unfinished completion is printed live, the others wait for their turn."""
    from neuron_paged.engine.sampling import RequestOutputKind

    latest: dict[int, RequestOutput] = {}
    order = [(index, sample) for index in range(len(prompts)) for sample in range(params.n)]
    position = printed = 0
    started = False
    for index, output in llm.stream(prompts, params, output_kind=RequestOutputKind.CUMULATIVE):
        latest[index] = output
        while position < len(order) and order[position][0] in latest:
            prompt, sample = order[position]
            completions = {completion.index: completion for completion in latest[prompt].outputs}
            if sample not in completions:
                break
            if not started and len(order) > 1:
                print(_header(headers[prompt], sample if params.n > 1 else None))
            started = True
            completion = completions[sample]
            print(completion.text[printed:], end="", flush=True)
            printed = len(completion.text)
            if not completion.finished:
                break
            print("\n" if len(order) > 1 else "", flush=True)
            position, printed, started = position + 1, 0, False
    return [latest[index] for index in range(len(prompts))]


def _statistics(llm: "LLM", outputs: list["RequestOutput"], seconds: float, num_threads: int) -> dict[str, Any]:
    num_output = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    first = [o.metrics.first_token_time - o.metrics.arrival_time for o in outputs if o.metrics.first_token_time]
    return {
        "num_requests": len(outputs),
        "num_prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "num_cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "num_output_tokens": num_output,
        "seconds": seconds,
        "output_tokens_per_s": num_output / seconds,
        "mean_time_to_first_token_s": sum(first) / len(first) if first else None,
        "num_threads": num_threads,
        "kv_cache": _kv_cache(llm),
        "engine": llm.engine.metrics.snapshot(),
    }


def _kv_cache(llm: "LLM") -> dict[str, Any]:
    """Size and most use of the KV cache, in blocks without the null block, token slots and bytes."""
    config, metrics = llm.engine.config, llm.engine.metrics
    executor = llm.engine.executor
    num_bytes = sum(cache.nbytes for cache in getattr(executor, "kv_caches", ())) * getattr(executor, "num_ranks", 1)
    block_size, used = config.cache.block_size, metrics.max_used_blocks
    return {
        "block_size": block_size,
        "num_blocks": metrics.num_blocks,
        "bytes": num_bytes,
        "max_used_blocks": used,
        "max_used_slots": used * block_size,
        "max_used_bytes": num_bytes * used // (metrics.num_blocks + 1),
        "slots_if_reserved_to_max_model_len": metrics.num_requests_received * config.scheduler.max_model_len,
    }


def _figures(statistics: dict[str, Any], executor: str | None) -> str:
    first, cache = statistics["mean_time_to_first_token_s"], statistics["kv_cache"]
    on_device = executor in ("xla", "neuron")
    where = f"executor {executor}" if on_device else f"measured on CPU, {statistics['num_threads']} threads"
    return (
        f"{statistics['num_requests']} request(s) in {statistics['seconds']:.2f} s: "
        f"{statistics['num_prompt_tokens']} prompt tokens ({statistics['num_cached_tokens']} from the prefix cache), "
        f"{statistics['num_output_tokens']} output tokens, {statistics['output_tokens_per_s']:.1f} output tokens/s"
        + ("" if first is None else f", first token after {first:.2f} s")
        + f" ({where})\n"
        f"KV cache: at most {cache['max_used_blocks']} of {cache['num_blocks']} blocks in use = "
        f"{cache['max_used_slots']} token slots, {cache['max_used_bytes'] / 2**20:.1f} MiB; reserving max_model_len "
        f"per request would have taken {cache['slots_if_reserved_to_max_model_len']} slots"
    )


def _document(
    args: argparse.Namespace,
    outputs: list["RequestOutput"],
    headers: list[str],
    params: "SamplingParams",
    statistics: dict[str, Any],
) -> dict[str, Any]:
    """The JSON result: one entry per prompt, in order."""
    return {
        "neuron_paged": __version__,
        "model": args.model,
        "sampling_params": {**asdict(params), "output_kind": params.output_kind.name},
        "requests": [
            {
                "prompt": headers[index],
                "num_prompt_tokens": len(output.prompt_token_ids),
                "num_cached_tokens": output.num_cached_tokens,
                "prompt_logprobs": _logprobs(output.prompt_logprobs),
                "error": output.error,
                "outputs": [
                    {
                        "index": completion.index,
                        "text": completion.text,
                        "token_ids": completion.token_ids,
                        "finish_reason": completion.finish_reason,
                        "stop_reason": completion.stop_reason,
                        "cumulative_logprob": completion.cumulative_logprob,
                        "logprobs": _logprobs(completion.logprobs),
                    }
                    for completion in output.outputs
                ],
            }
            for index, output in enumerate(outputs)
        ],
        "statistics": statistics,
    }


def _logprobs(positions: Any) -> Any:
    """Per position a list, the token itself first: JSON's object keys would turn token ids into strings."""
    if positions is None:
        return None
    return [
        None if tokens is None else [{"token_id": token_id, **entry._asdict()} for token_id, entry in tokens.items()]
        for tokens in positions
    ]

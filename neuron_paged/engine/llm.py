# SPDX-License-Identifier: Apache-2.0
"""LLM: a model and an engine behind vLLM's Python API (generate, chat), and stream for output as it comes."""

import itertools
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from neuron_paged.config import CacheConfig, EngineConfig, GraphConfig, SchedulerConfig, check_tensor_parallel_size
from neuron_paged.engine.cache_sizing import choose_num_blocks
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.outbox import Outbox
from neuron_paged.engine.outputs import RequestOutput
from neuron_paged.engine.prompts import Prompt, TokensPrompt, is_single_prompt
from neuron_paged.engine.rank_messages import LOADED
from neuron_paged.engine.sampling import RequestOutputKind, SamplingParams
from neuron_paged.errors import ConfigError, InvalidRequestError, StepError
from neuron_paged.memory import available_memory_bytes
from neuron_paged.progress import counted, told

_CACHE_SETTINGS = {f.name for f in fields(CacheConfig)}
_SCHEDULER_SETTINGS = {f.name for f in fields(SchedulerConfig)}
_OWN_SETTINGS = {"dtype", "weight_dtype", "tensor_parallel_size", "seed", "progress"}

Message = Mapping[str, Any]


class LLM:
    """A model ready to generate.

    model: "demo", a folder with config.json and safetensors, a .gguf file, or org/name on the Hugging Face hub.
    dtype: of activations and KV cache, "auto" | "fp32" | "bf16" | "fp16"; "auto" is fp32, or the bundle's.
    weight_dtype: what the linear layers' weights are stored in, "auto" is dtype; "bf16" decodes few sequences faster,
    their products stay in fp32.
    tensor_parallel_size: processes that share the weights, KV heads and CPU threads of this one; this is the first.
    seed: of the generator that gives requests without a seed theirs. engine_settings: any field of CacheConfig and
    SchedulerConfig; max_model_len defaults to what the model allows, at most config.DEFAULT_MAX_MODEL_LEN; num_blocks
    to a quarter of the free memory.
    executor: "eager" runs steps as they come; "hlo-cpu" lowers the model into one static graph per bucket, as for a
    device, and runs those on XLA:CPU; "xla" and "neuron": see GraphConfig; None: "hlo-cpu" with a bundle, else "eager".
    graph_buckets: names of compile.buckets ("decode-8x0x4x2", "decode_table-8x16") or files of grids, None = ladders
    from the limits. graph_kernels, graph_python: see GraphConfig.kernels and .python. bundle: store with graphs that
    `neuron-paged compile` made, a folder or s3://bucket/prefix: for target cpu, or with executor "neuron" for this
    machine's target; cache settings and max_model_len that are not given are the bundle's.
    no_compile: without a fitting bundle fail at once instead of lowering and compiling.
    Raises ModelNotFoundError, UnsupportedModelError, CheckpointError, ConfigError, GraphError, RankError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
        weight_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
        tensor_parallel_size: int = 1,
        seed: int | None = 0,
        progress: bool = True,
        executor: Literal["eager", "hlo-cpu", "xla", "neuron"] | None = None,
        graph_buckets: Sequence[str] | None = None,
        graph_kernels: Literal["cpu", "simulator", "plain"] = "cpu",
        graph_python: str | Path | None = None,
        bundle: str | Path | None = None,
        no_compile: bool = False,
        **engine_settings: Any,
    ) -> None:
        cache, scheduler = split_settings(engine_settings)
        executor = executor or ("eager" if bundle is None else "hlo-cpu")
        graphs = GraphConfig(
            executor,
            _bucket_names(graph_buckets),
            graph_kernels,
            None if graph_python is None else Path(graph_python),
            bundle=None if bundle is None else str(bundle),
            allow_compiling=not no_compile,
        )
        graphs.check_cache(CacheConfig(**cache))
        check_tensor_parallel_size(tensor_parallel_size, graphs)
        if executor != "eager" and weight_dtype != "auto":
            raise ConfigError(f"weight_dtype: got {weight_dtype!r}, graphs need 'auto': they store weights in dtype.")
        from neuron_paged.engine.make_executor import find_graphs, make_executor, require_graph_packages
        from neuron_paged.engine.model_runner import block_bytes
        from neuron_paged.engine.rank_pool import RankPool
        from neuron_paged.models.loader import load_model

        require_graph_packages(graphs)
        chosen = find_graphs(
            graphs, model, dtype=dtype, cache=cache, max_model_len=scheduler.get("max_model_len")
        )
        if chosen is not None:
            dtype = chosen.dtype
            cache = cache | chosen.cache_settings
            scheduler = scheduler | {"max_model_len": chosen.max_model_len}
        ranks = RankPool(tensor_parallel_size)
        with ExitStack() as on_error:
            on_error.callback(ranks.stop)
            loaded = load_model(
                model,
                dtype=dtype,
                weight_dtype=weight_dtype,
                progress=progress,
                max_model_len=scheduler.get("max_model_len"),
                prepare=executor == "eager",
                tensor_parallel_size=tensor_parallel_size,
                start_ranks=ranks.start,
            )
            with told(enabled=progress and tensor_parallel_size > 1) as tell:
                tell(f"loading {tensor_parallel_size} ranks")
                ranks.wait_for(LOADED)  # what their weights take is no longer free then
            scheduler_config = SchedulerConfig(**(scheduler | {"max_model_len": loaded.max_model_len}))
            cache_config = CacheConfig(**cache)
            all_ranks_block_bytes = tensor_parallel_size * block_bytes(loaded.model, cache_config)
            # A bundle's blocks, which are in the device's memory, need none of the host's.
            on_device = chosen is not None and graphs.serves_neffs
            available_bytes = sys.maxsize if on_device else available_memory_bytes()
            num_blocks = choose_num_blocks(cache_config, scheduler_config, all_ranks_block_bytes, available_bytes)
            config = EngineConfig(replace(cache_config, num_blocks=num_blocks), scheduler_config)
            # Mostly zeroing the cache; the first time on a machine the CPU kernels are compiled as well.
            with _note_if_slow("Preparing the model and its KV cache ...", progress and executor == "eager"):
                runner = make_executor(loaded.model, config, graphs, ranks, progress=progress, bundle=chosen)
            on_error.pop_all()
        self.engine = LLMEngine(
            config,
            runner,
            vocab_size=loaded.config.vocab_size,
            eos_token_ids=loaded.config.eos_token_ids,
            tokenizer=loaded.tokenizer,
            seed=seed,
        )
        self._request_ids = itertools.count()

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> "LLM":
        """The same API over an engine that exists."""
        llm = cls.__new__(cls)
        llm.engine = engine
        llm._request_ids = itertools.count()
        return llm

    def get_tokenizer(self) -> Any:
        """transformers' tokenizer; None if the checkpoint has none."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Finished outputs in the order of the prompts, batched continuously.

        prompts: one or a list; each text, token ids, or a dict (see engine.prompts). sampling_params: one for all or
        one per prompt. priority: one per prompt, for policy "priority".
        Raises InvalidRequestError and its subclasses before anything runs; StepError if a step of these requests
        fails. Whatever is raised (KeyboardInterrupt too), all requests of the call have ended and their blocks are
        free. What fails for one request alone ends that one with finish_reason "error"; RequestOutput.error says why.
        """
        finished: dict[str, RequestOutput] = {}
        with self._requests(prompts, sampling_params, RequestOutputKind.FINAL_ONLY, priority) as (request_ids, outbox):
            start, num_tokens = time.monotonic(), 0
            with counted("Requests", len(request_ids), "request", enabled=use_tqdm) as counter:
                for output in self._outputs(outbox):
                    finished[output.request_id] = output
                    num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
                    counter.note(f"{num_tokens / (time.monotonic() - start):.1f} output tokens/s")
                    counter.update()
        return [finished[request_id] for request_id in request_ids]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        output_kind: RequestOutputKind = RequestOutputKind.DELTA,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """(index of the prompt, RequestOutput) as they come: with DELTA only what is new, with CUMULATIVE everything.

        Text that may become a stop string or is half a character is held back. Closing the generator ends the requests.
        Other calls may run in between, whose steps these requests take part in: their next output says all that is new.
        Requests that are aborted meanwhile give nothing more. Raises as generate() does; requests that end by a failed
        step of another call have finish_reason "error".
        """
        with self._requests(prompts, sampling_params, output_kind, None) as (request_ids, outbox):
            index_of = {request_id: index for index, request_id in enumerate(request_ids)}
            for output in self._outputs(outbox):
                yield index_of[output.request_id], output

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """generate() for conversations: one (a list of {"role", "content"}) or a list of them.

        template_options: see render_chat.
        """
        single = len(messages) > 0 and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [self.render_chat(conversation, **template_options) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> TokensPrompt:
        """The prompt of a conversation by the tokenizer's chat template (transformers' apply_chat_template).

        Raises InvalidRequestError if there is no tokenizer or template, or the template refuses the messages.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None or (chat_template is None and not tokenizer.chat_template):
            what = "tokenizer" if tokenizer is None else "chat template"
            raise InvalidRequestError(f"messages: the model has no {what}; use generate() or give chat_template.")
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise InvalidRequestError(f'messages: got {messages!r}, need a list of {{"role": …, "content": …}}.')
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
        except Exception as error:  # templates raise jinja2's errors, and whatever their own code does
            raise InvalidRequestError(f"messages: the chat template refused them: {error}") from error
        # The template writes the special tokens itself.
        return {"prompt": text, "prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    @contextmanager
    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        output_kind: RequestOutputKind,
        priority: Sequence[int] | None,
    ) -> Iterator[tuple[list[str], Outbox]]:
        """Requests added for these prompts, and where their outputs go; what is unfinished at the end is aborted."""
        listed: Sequence[Any] = [prompts] if is_single_prompt(prompts) else _as_list("prompts", prompts)
        params = _one_each("sampling_params", sampling_params, len(listed), (SamplingParams, type(None)))
        priorities = _one_each("priority", 0 if priority is None else priority, len(listed), (int,))
        request_ids: list[str] = []
        outbox = Outbox()
        try:
            for index, prompt in enumerate(listed):
                chosen = SamplingParams() if params[index] is None else params[index]
                if isinstance(chosen, SamplingParams):
                    chosen = chosen.with_output_kind(output_kind)
                request_id = f"llm-{next(self._request_ids)}"
                try:
                    self.engine.add_request(request_id, prompt, chosen, priority=priorities[index], outbox=outbox)
                except InvalidRequestError as error:
                    if len(listed) > 1:
                        raise type(error)(f"prompt {index}: {error}") from error
                    raise
                request_ids.append(request_id)
            yield request_ids, outbox
        finally:
            self.engine.abort_request(request_ids)

    def _outputs(self, outbox: Outbox) -> Iterator[RequestOutput]:
        """Outputs of a call's requests as they come, until all have ended. Runs steps whenever none waits."""
        failure: StepError | None = None
        while True:
            while (output := outbox.take()) is not None:
                yield output
            if failure is not None:
                raise failure
            if outbox.num_unfinished == 0:
                return
            try:
                self.engine.run_step(outbox)
            except StepError as error:
                if error.outputs:  # else it ended requests of other calls only
                    failure = error


@contextmanager
def _note_if_slow(message: str, enabled: bool) -> Iterator[None]:
    """Print `message` to standard error if the block takes more than a second."""
    timer = threading.Timer(1.0, print, (message,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if enabled:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """CacheConfig's and SchedulerConfig's among keyword arguments; ConfigError for others and for wrong values."""
    unknown = sorted(set(settings) - _CACHE_SETTINGS - _SCHEDULER_SETTINGS)
    if unknown:
        known = sorted(_CACHE_SETTINGS | _SCHEDULER_SETTINGS | _OWN_SETTINGS)
        raise ConfigError(f"LLM: got unknown setting {', '.join(unknown)}, need one of {', '.join(known)}.")
    cache = {name: value for name, value in settings.items() if name in _CACHE_SETTINGS}
    scheduler = {name: value for name, value in settings.items() if name in _SCHEDULER_SETTINGS}
    EngineConfig(CacheConfig(**cache), SchedulerConfig(**scheduler))  # wrong values show before a model is loaded
    return cache, scheduler


def _bucket_names(buckets: Sequence[str] | None) -> tuple[str, ...] | None:
    if buckets is None:
        return None
    from neuron_paged.engine.named_buckets import named_buckets

    named_buckets(buckets)  # wrong names show before a model is loaded
    return tuple(buckets)


def _as_list(name: str, values: Any) -> Sequence[Any]:
    if not isinstance(values, Sequence):
        raise InvalidRequestError(f"{name}: got {type(values).__name__}, need a prompt or a list of prompts.")
    return values


def _one_each(name: str, value: Any, count: int, kinds: tuple[type, ...]) -> Sequence[Any]:
    if isinstance(value, kinds):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidRequestError(f"{name}: got {type(value).__name__}, need one for all prompts or a list.")
    if len(value) != count:
        raise InvalidRequestError(f"{name}: got {len(value)} for {count} prompts, need one each.")
    return value

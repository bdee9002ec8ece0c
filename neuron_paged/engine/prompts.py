# SPDX-License-Identifier: Apache-2.0
"""Prompts as callers give them → checked token ids. Owns the tokenizer calls on the way in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypedDict

from neuron_paged.errors import InvalidRequestError


class TextPrompt(TypedDict, total=False):
    """{"prompt": text, "cache_salt": …}"""

    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """{"prompt_token_ids": ids, "cache_salt": …}, optionally with the "prompt" text they came from."""

    prompt_token_ids: list[int]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_NEED = 'a string, a list of token ids, {"prompt": …} or {"prompt_token_ids": …}'


@dataclass(frozen=True)
class ParsedPrompt:
    """text: None if only ids came. cache_salt: prompts of different salts never share cached blocks."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None


def is_single_prompt(prompts: Any) -> bool:
    """Whether this is one prompt, not a list of them."""
    if isinstance(prompts, (str, Mapping)):
        return True
    return isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(p, Integral) for p in prompts)


def parse_prompt(prompt: Any, tokenizer: Any, vocab_size: int) -> ParsedPrompt:
    """Token ids of a prompt; text is tokenized with the tokenizer's special tokens. Raises InvalidRequestError."""
    cache_salt = None
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - _KEYS
        if unknown or not {"prompt", "prompt_token_ids"} & set(prompt):
            raise InvalidRequestError(f"prompt: got a dict with keys {sorted(map(str, prompt))}, need {_NEED}.")
        cache_salt = prompt.get("cache_salt")
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise InvalidRequestError(f"prompt: got cache_salt {cache_salt!r}, need a string.")
        if "prompt_token_ids" in prompt:
            text = prompt.get("prompt")
            return ParsedPrompt(text, _check_token_ids(prompt["prompt_token_ids"], vocab_size), cache_salt)
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        return ParsedPrompt(None, _check_token_ids(prompt, vocab_size), cache_salt)
    return ParsedPrompt(prompt, _check_token_ids(_tokenize(prompt, tokenizer), vocab_size), cache_salt)


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    if text == "":
        raise InvalidRequestError("prompt: got an empty string, need at least one token of text.")
    if tokenizer is None:
        raise InvalidRequestError("prompt: got text but the model has no tokenizer, need prompt_token_ids.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"prompt: got text that is not valid Unicode ({error}), need valid text.") from error
    return tokenizer(text, add_special_tokens=True)["input_ids"]


def _check_token_ids(token_ids: Any, vocab_size: int) -> list[int]:
    if not isinstance(token_ids, Sequence) and hasattr(token_ids, "tolist"):  # numpy array, tensor
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, (str, bytes)):
        raise InvalidRequestError(f"prompt: got {type(token_ids).__name__}, need {_NEED}.")
    if len(token_ids) == 0:
        raise InvalidRequestError("prompt: got no tokens, need at least one.")
    if set(map(type, token_ids)) == {int} and 0 <= min(token_ids) and max(token_ids) < vocab_size:
        return list(token_ids)
    for position, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, Integral) or not 0 <= int(token_id) < vocab_size:
            raise InvalidRequestError(
                f"prompt_token_ids: got {token_id!r} at position {position}, need integers in [0, {vocab_size - 1}] "
                "(the model's vocabulary)."
            )
    return [int(token_id) for token_id in token_ids]

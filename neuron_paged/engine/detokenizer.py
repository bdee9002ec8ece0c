# SPDX-License-Identifier: Apache-2.0
"""Token ids to text as they come: never half a character, O(1) amortised per token, any tokenizer with decode().

`tokenizers.decoders.DecodeStream` does nearly this (1.1 us per token against 1.6 us here, measured on CPU) but can't
flush what it holds at the end, holds an endless run of invalid bytes for ever, and takes only Rust tokenizers.
"""

from collections.abc import Callable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so at most 3 trailing replacement characters can still become one.
_MAX_UNSETTLED = 3
# The window is cut back to _CONTEXT ids when it holds more than _WINDOW: a few ids of context keep a decoder from
# taking the next token for the start of the text (it may strip a space there).
_CONTEXT = 5
_WINDOW = 16

Decode = Callable[[list[int]], str]


def make_decode(tokenizer: Any, skip_special_tokens: bool) -> Decode:
    """decode(ids) -> str of a transformers tokenizer, past its Python wrapper where there is a Rust one (3x faster)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


class IncrementalDetokenizer:
    """Text of one sequence's output.

    prompt_token_ids: their last few are context, so that the text is what decoding prompt and output together adds to
    the prompt's text. A byte-fallback decoder rejects all bytes of a run that ends inside a character, also those it
    accepted before; text already given stays as it was.
    """

    __slots__ = ("_decode", "_window", "_given", "_num_held")

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-2 * _CONTEXT :])
        self._given = ""  # start of decode(window) that is prompt or already given
        self._num_held = 0  # last ids of the window, since all text was given
        if self._window:
            self._cut_window()
            self._given = decode(self._window)

    def append(self, token_ids: Sequence[int]) -> str:
        """Text that these ids settle; an unfinished character waits for the next call."""
        self._window.extend(token_ids)
        self._num_held += len(token_ids)
        text = self._decode(self._window)
        if not text.startswith(self._given):
            self._given = self._given[: _settled_length(self._given)]  # the prompt may have ended inside a character
        if not text.startswith(self._given):
            if self._num_held <= _MAX_UNSETTLED:
                return ""
            # The bytes held are no character: on without the run that they spoilt.
            self._window = self._window[-self._num_held :]
            self._given = ""
            text = self._decode(self._window)
        start, end = len(self._given), _settled_length(text)
        self._given = text[: max(start, end)]
        if end == len(text):
            self._num_held = 0
        if len(self._window) > _WINDOW:
            self._cut_window()
        return text[start:end]

    def flush(self) -> str:
        """The rest: an unfinished character as replacement characters. Nothing may be appended after it."""
        text = self._decode(self._window)
        if text.startswith(self._given):
            return text[len(self._given) :]
        return self._decode(self._window[-self._num_held :])

    def _cut_window(self) -> None:
        for size in range(_CONTEXT, 2 * _CONTEXT):
            text = self._decode(self._window[-size:])
            # A window that starts inside a character would make a byte-fallback decoder reject all bytes after it.
            if not text.startswith(REPLACEMENT):
                break
        self._window = self._window[-size:]
        self._given = text[: _settled_length(text)]
        self._num_held = min(self._num_held, size)


def _settled_length(text: str) -> int:
    if not text.endswith(REPLACEMENT):
        return len(text)
    unsettled = len(text) - len(text.rstrip(REPLACEMENT))
    return len(text) - min(unsettled, _MAX_UNSETTLED)

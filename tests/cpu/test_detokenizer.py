# SPDX-License-Identifier: Apache-2.0
"""Detokenizer and stop strings on real tokenizers built here: byte-level BPE and byte-fallback."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from neuron_paged.engine.detokenizer import REPLACEMENT, IncrementalDetokenizer
from neuron_paged.engine.stop_checker import StopStringChecker

TEXT = "Hello wörld, 你好世界 😀👩‍👩‍👧 — naïve  café\n\n  x = 'ÿ' \u0645\u0631\u062d\u0628\u0627 🇩🇪!"


def byte_level() -> Tokenizer:
    """Every byte one token, and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("Ġ", "w"), ("Ã", "¶")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's arrangement: ▁ for spaces, bytes for what is unknown, a space stripped from the start."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ["▁", "▁Hello", "▁w", "rld", ",", "x", "=", "'", "!", "é", "caf", "na", "ve", "▁▁"]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


def decoder_of(tokenizer: Tokenizer, skip_special_tokens: bool = True):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def run(tokenizer: Tokenizer, ids: list[int], prompt: list[int] = ()) -> list[str]:
    detokenizer = IncrementalDetokenizer(decoder_of(tokenizer), prompt)
    return [detokenizer.append([i]) for i in ids] + [detokenizer.flush()]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
def test_text_equals_decoding_at_once_and_no_character_is_split(tokenizer):
    ids = (
        BYTE_LEVEL.encode(TEXT).ids
        if tokenizer is BYTE_LEVEL
        else [byte + 1 for byte in (" " + TEXT).encode()]
    )
    pieces = run(tokenizer, ids)
    assert "".join(pieces) == TEXT == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert pieces[-1] == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 261), max_size=120), st.integers(1, 5))
def test_any_byte_level_ids_decode_as_at_once(ids, group):
    detokenizer = IncrementalDetokenizer(decoder_of(BYTE_LEVEL))
    text = "".join(detokenizer.append(ids[i : i + group]) for i in range(0, len(ids), group)) + detokenizer.flush()
    assert text == BYTE_LEVEL.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_output_is_what_it_adds_to_the_prompt(prompt, output):
    prompt_ids, output_ids = ([b + 1 for b in text.encode("utf-8", "ignore")] for text in (prompt, output))
    detokenizer = IncrementalDetokenizer(decoder_of(BYTE_FALLBACK), prompt_ids)
    text = "".join(detokenizer.append([i]) for i in output_ids) + detokenizer.flush()
    expected = output.encode("utf-8", "ignore").decode()
    assert REPLACEMENT in output or REPLACEMENT not in text
    # Without a prompt a leading space belongs to the start of the text, which this decoder strips.
    assert text == (expected if prompt_ids else expected.removeprefix(" "))


def test_leading_space_is_kept_after_a_prompt():
    hello, world = BYTE_FALLBACK.token_to_id("▁Hello"), BYTE_FALLBACK.token_to_id("▁w")
    assert "".join(run(BYTE_FALLBACK, [hello, world])) == "Hello w"
    assert "".join(run(BYTE_FALLBACK, [world], prompt=[hello])) == " w"


def test_unfinished_character_comes_at_the_end_only():
    ids = BYTE_LEVEL.encode("a😀").ids[:-1]
    pieces = run(BYTE_LEVEL, ids)
    assert pieces[:-1] == ["a", "", "", ""] and pieces[-1] == REPLACEMENT


def test_endless_invalid_bytes_are_not_held_for_ever():
    invalid = BYTE_LEVEL.encode("ÿ").ids[-1:] * 50
    pieces = run(BYTE_LEVEL, invalid)
    assert "".join(pieces[:-1]) == REPLACEMENT * 47 and pieces[-1] == REPLACEMENT * 3


def test_special_tokens_are_skipped_or_shown():
    ids = [*BYTE_LEVEL.encode("a").ids, BYTE_LEVEL.token_to_id("<|end|>"), *BYTE_LEVEL.encode("b").ids]
    shown = IncrementalDetokenizer(decoder_of(BYTE_LEVEL, False))
    assert [shown.append([i]) for i in ids] == ["a", "<|end|>", "b"]
    assert "".join(run(BYTE_LEVEL, ids)) == "ab"


def test_work_per_token_does_not_grow_with_the_text():
    sizes: list[int] = []

    def decode(ids: list[int]) -> str:
        sizes.append(len(ids))
        return BYTE_LEVEL.decode(ids)

    detokenizer = IncrementalDetokenizer(decode, BYTE_LEVEL.encode(TEXT * 20).ids)
    ids = BYTE_LEVEL.encode(TEXT * 40).ids
    for i in ids:
        detokenizer.append([i])
    assert max(sizes) <= 20 and sum(sizes) < 14 * len(ids)


def test_stop_string_over_several_tokens_is_found_once_complete():
    checker, text = StopStringChecker(["</end>"], False), ""
    for piece in ("abc<", "/e", "nd", "> tail"):
        text += piece
        match = checker.find(text, len(piece))
    assert match.stop == "</end>" and text[: match.text_length] == "abc"


def test_leftmost_stop_string_wins_and_may_be_included():
    assert StopStringChecker(["tail", "end"], True).find("the end of tail", 15) == ("end", 7)
    assert StopStringChecker(["end of", "end"], False).find("the end of", 10).stop == "end of"
    assert StopStringChecker(["end"], False).find("end and more", 3) is None  # stood there before


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text("ab<c", max_size=30),
    st.booleans(),
)
def test_streamed_text_never_shows_part_of_a_stop_string(stops, text, include):
    checker, shown = StopStringChecker(stops, include), ""
    positions = {stop: text.find(stop) for stop in stops if stop in text}
    for end in range(1, len(text) + 1):
        so_far = text[:end]
        match = checker.find(so_far, 1)
        visible = so_far[: match.text_length] if match else so_far[: end - checker.num_held_back(so_far)]
        assert visible.startswith(shown)
        shown = visible
        if match:
            first = min(positions[stop] + len(stop) for stop in positions)
            assert end == first
            assert include or not any(stop in shown for stop in stops)
            return
    assert not positions

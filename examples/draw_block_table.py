# SPDX-License-Identifier: Apache-2.0
"""Draws block tables at work: runs the demo model on a tiny KV cache and writes the cache's state as an SVG.

    python examples/draw_block_table.py examples/block_table.svg

Three requests share the beginning of their prompt; the third also draws two completions from one prompt.
"""

import sys
from html import escape
from pathlib import Path

from neuron_paged import LLM, SamplingParams
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import Executor, StepResult
from neuron_paged.engine.sequence import Sequence

BLOCK_SIZE, NUM_BLOCKS = 8, 25
STEPS_BETWEEN_REQUESTS = 6
COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1")
SHARED = "#e3e3e3"
SYSTEM = "You are a patient teacher. Answer in one short sentence."
QUESTIONS = ("What is a page table?", "What is a cache?", "Name a color.")
SLOT, ROW, LEFT, COLUMNS = 54, 40, 350, 2


class LastBatch:
    """An executor that keeps the batch it ran last."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.batch: Batch | None = None

    def execute(self, batch: Batch) -> StepResult:
        self.batch = batch
        return self.inner.execute(batch)


def run() -> tuple[list[Sequence], LLM]:
    """Sequences in the middle of their answers."""
    llm = LLM("demo", block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_model_len=96, progress=False)
    recorder = LastBatch(llm.engine.executor)
    llm.engine.executor = recorder
    for index, question in enumerate(QUESTIONS):
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=40, n=2 if index == 2 else 1, ignore_eos=True)
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        llm.engine.add_request(str(index), llm.render_chat(chat), params)
        for _ in range(STEPS_BETWEEN_REQUESTS):  # the next request finds this one's blocks in the prefix cache
            llm.engine.step()
    assert recorder.batch is not None
    sequences = sorted(recorder.batch.sequences, key=lambda sequence: (sequence.request_id, sequence.seq_id))
    return sequences, llm


def draw(sequences: list[Sequence], llm: LLM) -> str:
    """The SVG: block tables on the left, the cache's blocks with the tokens they hold on the right."""
    tokenizer = llm.get_tokenizer()
    owners: dict[int, list[int]] = {}
    tokens: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        for index, block_id in enumerate(sequence.block_ids):
            owners.setdefault(block_id, []).append(number)
            held = sequence.token_ids[: sequence.num_computed_tokens]
            tokens[block_id] = held[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
    rows = -(-NUM_BLOCKS // COLUMNS)
    width, height = LEFT + COLUMNS * (BLOCK_SIZE * SLOT + 50) + 10, rows * ROW + 96
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="12" y="24" font-size="15" font-weight="bold">Block tables (one row per sequence)</text>',
        f'<text x="{LEFT + 8}" y="24" font-size="15" font-weight="bold">KV cache: {NUM_BLOCKS} blocks of {BLOCK_SIZE} '
        "token slots</text>",
    ]
    for number, sequence in enumerate(sequences):
        y = 52 + number * 78
        question = QUESTIONS[int(sequence.request_id)]
        parts.append(f'<text x="12" y="{y}">… {escape(question)} (sequence {number})</text>')
        for index, block_id in enumerate(sequence.block_ids):
            fill = SHARED if len(owners[block_id]) > 1 else COLORS[number % len(COLORS)]
            ink = "black" if len(owners[block_id]) > 1 else "white"
            x = 12 + index * 34
            parts.append(f'<rect x="{x}" y="{y + 8}" width="31" height="22" rx="3" fill="{fill}"/>')
            parts.append(f'<text x="{x + 15}" y="{y + 23}" text-anchor="middle" fill="{ink}">{block_id}</text>')
        parts.append(
            f'<text x="12" y="{y + 47}" fill="#555">context length {sequence.num_computed_tokens}, '
            f"{sequence.num_cached_tokens} tokens from the prefix cache</text>"
        )
    for block_id in range(NUM_BLOCKS):
        column, row = divmod(block_id, rows)
        x, y = LEFT + column * (BLOCK_SIZE * SLOT + 50), 40 + row * ROW
        parts.append(f'<text x="{x + 24}" y="{y + 20}" text-anchor="end" fill="#555">{block_id}</text>')
        users = owners.get(block_id, [])
        fill = "white" if not users else SHARED if len(users) > 1 else COLORS[users[0] % len(COLORS)]
        for offset in range(BLOCK_SIZE):
            held = tokens.get(block_id, [])
            is_live = offset < len(held)
            parts.append(
                f'<rect x="{x + 30 + offset * SLOT}" y="{y + 4}" width="{SLOT - 2}" height="{ROW - 14}" '
                f'fill="{fill if is_live else "white"}" stroke="{"#999" if users else "#ddd"}"/>'
            )
            if is_live:
                text = tokenizer.decode([held[offset]]).replace("\n", "⏎").strip()[:8]
                ink = "black" if len(users) > 1 else "white"
                parts.append(
                    f'<text x="{x + 30 + offset * SLOT + SLOT / 2 - 1}" y="{y + 21}" text-anchor="middle" '
                    f'fill="{ink}">{escape(text)}</text>'
                )
        if block_id == 0:
            parts.append(f'<text x="{x + 36}" y="{y + 21}" fill="#999">null block: takes every padded write</text>')
    used = sum(len(held) for held in tokens.values())
    parts.append(
        f'<text x="12" y="{height - 16}" fill="#333">grey: blocks shared by several sequences, written once. '
        f"{len(tokens)} blocks in use hold {used} tokens; {len(tokens) * BLOCK_SIZE - used} slots are empty, all in "
        "last blocks. White: free.</text></svg>"
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python examples/draw_block_table.py FILE.svg", file=sys.stderr)
        sys.exit(2)
    Path(sys.argv[1]).write_text(draw(*run()), encoding="utf-8")

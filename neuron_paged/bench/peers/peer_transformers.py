# SPDX-License-Identifier: Apache-2.0
"""transformers `generate` on left-padded batches, in the order of arrival."""

from typing import Any

NAME = "transformers (padded batches)"
BATCH = 8  # faster here than one batch of 32: less padding


def version() -> str:
    """Version of the peer."""
    import transformers

    return transformers.__version__


def load(job: dict[str, Any]) -> Any:
    """Load the model and return `generate(requests)`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(requests: list[dict[str, Any]]) -> tuple[list[list[int]], None]:
        outputs = []
        for first in range(0, len(requests), BATCH):
            batch = requests[first : first + BATCH]
            width = max(len(request["prompt_token_ids"]) for request in batch)
            rows = [[0] * (width - len(r["prompt_token_ids"])) + r["prompt_token_ids"] for r in batch]
            mask = [[0] * (width - len(r["prompt_token_ids"])) + [1] * len(r["prompt_token_ids"]) for r in batch]
            with torch.inference_mode():
                tokens = model.generate(
                    torch.tensor(rows),
                    attention_mask=torch.tensor(mask),
                    do_sample=False,
                    max_new_tokens=max(request["max_tokens"] for request in batch),
                )
            for row, request in zip(tokens.tolist(), batch, strict=True):
                outputs.append(row[width : width + request["max_tokens"]])
        return outputs, None

    return generate

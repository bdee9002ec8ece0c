# SPDX-License-Identifier: Apache-2.0
"""What a tensor-parallel rank above 0 does: loads its part of the model and follows rank 0's steps.

Owns no process: rank_worker.py calls it in one.
"""

from multiprocessing.connection import Connection
from typing import Any

import torch

from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.rank_messages import CONNECTED, IMPORTED, LOADED, READY, RankStart, StepMessage
from neuron_paged.models.collectives import connect
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.loader import load_rank
from neuron_paged.models.tensor_parallel import ShardedModelStep


def serve(connection: Connection) -> None:
    """Answer rank 0's messages (rank_messages) until it closes the connection, which is EOFError."""
    start: RankStart = connection.recv()
    torch.set_num_threads(start.num_threads)
    connection.send(IMPORTED)
    task, rendezvous = connection.recv()
    group = connect(start.rank, start.size, rendezvous)
    connection.send(CONNECTED)
    model = load_rank(task, group)
    connection.send(LOADED)
    runner = ModelRunner(model, connection.recv())
    runner.warm_up()
    connection.send(READY)
    step = ShardedModelStep(model)
    while True:
        _follow(runner, step, connection.recv())


def _follow(runner: ModelRunner, step: ShardedModelStep, message: StepMessage) -> None:
    def tensor(array: Any) -> Any:
        return None if array is None else torch.from_numpy(array)

    with torch.inference_mode():
        runner.move_blocks(message)
        step.follow(
            tensor(message.token_ids),
            tensor(message.positions),
            AttentionInputs(
                tensor(message.slot_mapping),
                tensor(message.block_table),
                tensor(message.context_lens),
                tensor(message.cu_seqlens_q),
            ),
            tensor(message.logits_indices),
            message.is_greedy,
            runner.kv_caches,
            tensor(message.prompt_indices),
        )

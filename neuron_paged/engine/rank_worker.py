# SPDX-License-Identifier: Apache-2.0
"""The process of a tensor-parallel rank above 0: loads its part of the model and follows rank 0's steps.

Ends with the engine's process, however that ends. rank_pool.py starts it.
"""

import os
import select
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.rank_messages import CONNECTED, IMPORTED, LOADED, READY, RankFailed, RankStart, StepMessage
from neuron_paged.models.collectives import CollectiveError, connect
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.loader import load_rank
from neuron_paged.models.tensor_parallel import ShardedModelStep

_PARENT_CHECK_MS = 1000


def main(descriptor: int, parent_pid: int) -> None:
    """Entry of the process. descriptor: of the socket to rank 0."""
    connection = Connection(descriptor)
    threading.Thread(target=_end_with_parent, args=(descriptor, parent_pid), daemon=True).start()
    code = 0
    try:
        _run(connection)
    except (EOFError, ConnectionError):  # the engine's process has closed
        pass
    except BaseException as error:
        code = 1
        traceback.print_exc()
        connection.send(RankFailed(f"{type(error).__name__}: {error}", isinstance(error, CollectiveError)))
    finally:
        sys.stderr.flush()
        os._exit(code)  # gloo's threads may be waiting for ranks that are gone


def _end_with_parent(descriptor: int, parent_pid: int) -> None:
    """End this process as soon as the other one has gone, even in the middle of a step."""
    poll = select.poll()
    poll.register(descriptor, 0)  # hang-up only: what can be read is the main thread's
    while not poll.poll(_PARENT_CHECK_MS) and os.getppid() == parent_pid:
        pass
    os._exit(1)


def _run(connection: Connection) -> None:
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

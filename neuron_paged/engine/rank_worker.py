# SPDX-License-Identifier: Apache-2.0
"""The process of a tensor-parallel rank above 0, which ends with the engine's, however that ends.

rank_pool.py starts it, rank_step.py is what it does. Imports little: it watches the engine's process from the first
moment on, while torch is still being imported.
"""

import os
import select
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from neuron_paged.engine.rank_messages import RankFailed

_PARENT_CHECK_MS = 1000


def main(descriptor: int, parent_pid: int) -> None:
    """Entry of the process. descriptor: of the socket to rank 0."""
    connection = Connection(descriptor)
    threading.Thread(target=_end_with_parent, args=(descriptor, parent_pid), daemon=True).start()
    code = 0
    try:
        from neuron_paged.engine.rank_step import serve

        serve(connection)
    except (EOFError, ConnectionError):  # the engine's process has closed
        pass
    except BaseException as error:
        code = 1
        traceback.print_exc()
        from neuron_paged.models.collectives import CollectiveError

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

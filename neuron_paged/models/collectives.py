# SPDX-License-Identifier: Apache-2.0
"""The collectives of a tensor-parallel model, the only place where ranks meet inside a step.

On CPU tensors they run over gloo; traced by torch_xla they become all-reduces with replica groups in the graph. Owns no
process: engine.rank_pool starts the ranks.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Ranks wait so long for the slowest one before a step counts as failed; a rank that dies is noticed at once.
COLLECTIVE_TIMEOUT_S = 120.0
# Up to so many elements a gather and a sum take half the time of gloo's all-reduce (measured on CPU, 2 ranks: 520 →
# 270 µs for 576 elements, 630 → 260 µs for 18432).
_GATHERED_ELEMENTS = 2**18


class CollectiveError(RuntimeError):
    """A collective failed because another rank is gone or stuck."""


@dataclass(frozen=True)
class RankGroup:
    """One rank among `size`; process_group: gloo's, None where nothing is computed (meta tensors, lowering)."""

    rank: int
    size: int
    process_group: Any = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x. May be x itself, overwritten."""
        if x.device.type == "xla":
            # The form without torch_xla's token, which would be an extra parameter of the graph.
            from torch_xla import _XLAC

            return _XLAC._xla_spmd_all_reduce("sum", x, 1.0, [list(range(self.size))])
        if x.device.type == "meta":
            return x
        if x.numel() * self.size <= _GATHERED_ELEMENTS:
            return self._gather(x).sum(0)
        x = x.contiguous()
        self._wait(self.process_group.allreduce, [x])
        return x

    def all_gather(self, x: Tensor, is_rank: Tensor) -> Tensor:
        """x of every rank, [size, *x.shape]. is_rank: [size] of x's dtype, 1 at this rank's place, else 0.

        In graphs an all-reduce of x in its place and zeros elsewhere: graphs with all-gathers were reported to block
        the devices of processes that load them later, and the rank is no constant of the graph, so that all ranks
        share one. Not finite entries then make all ranks' entries at their place NaN.
        """
        if x.device.type != "cpu":
            return self.all_reduce(is_rank.view(-1, *(1,) * x.dim()) * x)
        return self._gather(x)

    def _gather(self, x: Tensor) -> Tensor:
        out = torch.empty((self.size, *x.shape), dtype=x.dtype)
        self._wait(self.process_group.allgather, [list(out.unbind())], [x.contiguous()])
        return out

    def _wait(self, collective: Any, *arguments: Any) -> None:
        try:
            collective(*arguments).wait()
        except RuntimeError as error:
            raise CollectiveError(str(error).splitlines()[0]) from error


def connect(rank: int, size: int, rendezvous: Path) -> RankGroup:
    """Join the gloo group that `size` processes of this machine form through the file `rendezvous`.

    Returns when all have joined; CollectiveError if they don't within COLLECTIVE_TIMEOUT_S. Does not touch
    torch.distributed's default group, and listens on the loopback interface only.
    """
    from torch.distributed import FileStore, ProcessGroupGloo

    gloo: Any = ProcessGroupGloo  # whose options torch's type stubs leave out
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    try:
        return RankGroup(rank, size, gloo(FileStore(str(rendezvous), size), rank, size, options))
    except RuntimeError as error:
        raise CollectiveError(f"ranks can't connect: {str(error).splitlines()[0]}") from error

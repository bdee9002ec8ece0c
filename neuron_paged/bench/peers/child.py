# SPDX-License-Identifier: Apache-2.0
"""Runs one peer engine in its own process and Python environment: `python child.py`.

Protocol, one JSON object per line on stdin and stdout: first the job in, {"ready", "name", "version"} out; then per
line {"run": true} in, one result out, until stdin closes. A failure is {"error": "…"} out and exit code 1.
job: {"peer", "model", "threads", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
"requests": [{"prompt_token_ids", "max_tokens"}]}. result: {"wall_s", "outputs" (token ids per request),
"token_times_s" (seconds since the start per token and request, or null), "peak_rss_mib"}.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

# Peers write to stdout at will: they get stderr instead, and the protocol keeps the real one for itself.
_protocol_fd = os.dup(1)
os.dup2(2, 1)

# generate(requests) -> (token ids per request, seconds of each token since the call or None)
Generate = Callable[[list[dict[str, Any]]], tuple[list[list[int]], list[list[float]] | None]]


def reply(**message: Any) -> None:
    """Send one line to the parent."""
    os.write(_protocol_fd, (json.dumps(message) + "\n").encode())


def peak_rss_mib() -> float:
    """Largest resident set of this process so far; ru_maxrss would count the parent's at the fork."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Serve the protocol on stdin and stdout."""
    job = json.loads(sys.stdin.readline())
    try:
        adapter = import_module(f"peer_{job['peer']}")
        generate: Generate = adapter.load(job)
        generate([{**request, "max_tokens": 4} for request in job["requests"][:2]])  # warm-up, not timed
        reply(ready=True, name=adapter.NAME, version=adapter.version())
        for _ in sys.stdin:
            start = time.perf_counter()
            outputs, times = generate(job["requests"])
            wall = time.perf_counter() - start
            reply(wall_s=wall, outputs=outputs, token_times_s=times, peak_rss_mib=peak_rss_mib())
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

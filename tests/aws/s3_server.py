# SPDX-License-Identifier: Apache-2.0
"""S3 on loopback for tests: moto's server in a process of its own, and a proxy before it that misbehaves on order."""

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def moto_server() -> Iterator[str]:
    """URL of a running server."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "moto's server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


class FaultyProxy:
    """Passes S3 requests on. faults: probability of each of "503" (SlowDown), "500", "cut" (the answer's body ends
    early), "drop" (the connection closes without an answer), "lost" (so too, but a conditional write was done) and
    "409" (a conditional write meets another one). counts: how often each happened."""

    def __init__(self, url: str, faults: dict[str, float], seed: int = 0) -> None:
        host, port = url.removeprefix("http://").split(":")
        rng, lock = random.Random(seed), threading.Lock()
        self.counts = dict.fromkeys(faults, 0)
        counts = self.counts
        codes = {"503": "SlowDown", "500": "InternalError", "409": "ConditionalRequestConflict"}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    fault = next((f for f, p in faults.items() if rng.random() < p), None)
                    writes = self.command in ("PUT", "POST") and bool(self.headers.get("If-None-Match"))
                    if (fault == "cut" and self.command != "GET") or (fault in ("lost", "409") and not writes):
                        fault = None
                    if fault is not None:
                        counts[fault] += 1
                if fault in codes:
                    code = codes[fault]
                    text = f"<Error><Code>{code}</Code><Message>on order</Message></Error>".encode()
                    self.send_response(int(fault))
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(b"" if self.command == "HEAD" else text)
                    return
                if fault == "drop":
                    self.close_connection = True
                    return
                upstream = http.client.HTTPConnection(host, int(port), timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                content = answer.read()
                if fault == "lost":
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if fault == "cut" and self.command == "GET" and len(content) > 100:
                    content = content[: len(content) // 2]
                    self.close_connection = True
                self.wfile.write(content)
                upstream.close()

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

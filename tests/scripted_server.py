"""An OpenAI-compatible server whose answers a test scripts: the fake at the HTTP seam."""

import json
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One HTTP response."""

    status: int = 200
    body: str = ""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    declared_length: int | None = None
    reset: bool = False
    """Break the connection off instead of answering."""
    drip: float = 0.0
    """Seconds between two bytes of the body."""


def completion(
    text: str | None,
    *,
    finish_reason: str = "stop",
    refusal: str | None = None,
    tokens: list[dict[str, float]] | None = None,
) -> Answer:
    """A well-formed chat completion; each of the `tokens` is the first of its alternatives and their logarithms."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish_reason}
    if tokens is not None:
        content = [
            {"token": next(iter(each)), "top_logprobs": [{"token": t, "logprob": p} for t, p in each.items()]}
            for each in tokens
        ]
        choice["logprobs"] = {"content": content}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return Answer(body=json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}))


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that are killed are none of its business; any other error is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            traceback.print_exc()


class Server:
    """The running server: its `url` and what it was sent.

    `n_under_way` are the requests without an answer yet, `peak` the most of them at once, and `n_answered` the answers
    that were written to the end.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.peak = 0
        self.n_answered = 0
        self.n_under_way = 0
        self._lock = threading.Lock()
        self._http = _Quiet(("127.0.0.1", 0), self._handler(answer))
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def _handler(self, answer: Callable[[dict[str, Any]], Answer]) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                data = self.rfile.read(length := int(self.headers["content-length"]))
                if len(data) < length:  # the client was killed while it wrote
                    self.close_connection = True
                    return
                body = json.loads(data)
                with server._lock:
                    server.bodies.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.n_under_way += 1
                    server.peak = max(server.peak, server.n_under_way)
                try:
                    self._send(answer(body))
                    with server._lock:
                        server.n_answered += 1
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with server._lock:
                        server.n_under_way -= 1

            def _send(self, reply: Answer) -> None:
                time.sleep(reply.delay)
                if reply.reset:
                    # Without lingering, closing sends a reset.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    raise ConnectionResetError
                data = reply.body.encode("utf-8", "surrogatepass")
                self.send_response(reply.status)
                self.send_header("content-type", reply.content_type)
                self.send_header("content-length", str(reply.declared_length or len(data)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for i in range(len(data) if reply.drip else 0):
                    self.wfile.write(data[i : i + 1])
                    time.sleep(reply.drip)
                self.wfile.write(b"" if reply.drip else data)
                self.close_connection = self.close_connection or reply.declared_length is not None

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[Server]:
    """Run a server for the length of a `with` block."""
    server = Server(answer)
    thread = threading.Thread(target=server._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()
        thread.join()

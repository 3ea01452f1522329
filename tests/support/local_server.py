"""A small HTTP server on the loopback address, for the clients that talk to the internet."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Respond = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(respond: Respond) -> Iterator[str]:
    """Address of a server that answers every request by `respond`; stopped at the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self)

        do_POST = do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            """Keep the tests' output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    """One complete answer."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


@dataclass
class Chat:
    """A chat endpoint: `says` gives status and body to a prompt; requests are kept."""

    url: str = ""
    says: Callable[[str], tuple[int, Any]] = lambda prompt: (200, f"echo {prompt}")
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.asked.append(body)
        self.keys.append(handler.headers["Authorization"])
        self.paths.append(handler.path)
        status, said = self.says(body["messages"][0]["content"])
        if isinstance(said, str):
            said = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        # a busy endpoint says how long to wait: here no time, so that tests need none
        waits = {"Retry_After_Ms": "1"} if status != 200 else {}
        reply(handler, status, json.dumps(said).encode(), Content_Type="application/json", **waits)

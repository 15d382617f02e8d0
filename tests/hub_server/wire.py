"""HTTP of the loopback Hub: one request in, one answer out, and the faults that happen on the way."""

from __future__ import annotations

import io
import json
import re
import socket
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from .errors import HubError, repo_not_found
from .faults import Fault, Request
from .store import CHUNK, Repo


if TYPE_CHECKING:
    from .server import HubServer, User


@dataclass
class Answer:
    """What a route returns: JSON, or a file of which a client may ask a range."""

    json: Any = None
    file: Path | None = None
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


@dataclass
class Call:
    """What a route is given: the request, who sent it, and the groups of the route's pattern, unquoted."""

    hub: HubServer
    request: Request
    user: User | None
    params: dict[str, str]
    body: IO[bytes]
    fault: Fault | None

    @property
    def form(self) -> dict[str, list[str]]:
        """The body as a form; a JSON body gives the same shape."""
        content = self.body.read()
        if "json" not in self.request.headers.get("content-type", ""):
            return parse_qs(content.decode())
        return {key: value if isinstance(value, list) else [value] for key, value in json.loads(content).items()}

    @property
    def json(self) -> dict[str, Any]:
        content = self.body.read()
        return json.loads(content) if content else {}

    def flag(self, name: str) -> bool:
        return self.request.query.get(name, [""])[0].lower() in ("1", "true")

    def values(self, name: str) -> list[str]:
        return self.request.query.get(name, []) + self.request.query.get(f"{name}[]", [])

    @property
    def repo_type(self) -> str:
        return (self.params.get("type") or "models").rstrip("s")

    def repo(self, write: bool = False) -> Repo:
        """The repository that the address names; raises what a client without the rights gets to see."""
        repo_id, signed_in = self.params["repo"], self.user is not None
        try:
            repo = self.hub.store.get(self.repo_type, repo_id)
        except HubError:
            raise repo_not_found(repo_id, signed_in) from None
        if not self.may_read(repo):
            raise repo_not_found(repo_id, signed_in)
        if write:
            self.check_owner(repo.namespace)
        return repo

    def may_read(self, repo: Repo) -> bool:
        return not repo.private or (self.user is not None and self.user.owns(repo.namespace))

    def check_owner(self, namespace: str) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self.user.owns(namespace):
            raise HubError(403, f'You don\'t have the rights to write to the namespace "{namespace}"')

    def paged(self, items: list, limit: int | None = None) -> Answer:
        """One page of a list, the address of the next one in the Link header."""
        size = min(limit or self.hub.page_size, self.hub.page_size)
        start = int(self.request.query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(items):
            query = urlencode({**self.request.query, "cursor": [str(start + size)]}, doseq=True)
            headers["Link"] = f'<{self.hub.url}{quote(self.request.path)}?{query}>; rel="next"'
        return Answer(items[start : start + size], headers=headers)


Route = Callable[[Call], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Register a function for a method and a pattern of the quoted path; TYPE and REPO stand for their groups."""
    pattern = pattern.replace("TYPE", "(?P<type>models|datasets|spaces)").replace("REPO", "(?P<repo>[^/]+(?:/[^/]+)?)")

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Dropped(Exception):
    """The connection is to be closed without another byte."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def close_connections(self) -> None:
        """End kept-alive connections too: a stopped Hub answers nobody."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news; what goes wrong in a route is kept in `hub.crashes`."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "LoopbackHub"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: `hub.requests` is the log."""

    def serve(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(url.path), parse_qs(url.query), headers)
        hub = self.server.hub
        hub.requests.add(request)
        fault = hub.faults.take(request.line)
        try:
            with self._read_body(request, fault) as body:
                answer = self._answer(url.path, request, body, fault)
            self._send(request, answer, fault)
        except (Dropped, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def _read_body(self, request: Request, fault: Fault | None) -> IO[bytes]:
        """The whole body, so that the connection can be used again whatever the answer is."""
        allowed = fault.bytes if fault is not None and fault.kind == "drop_upload" else None
        body = tempfile.SpooledTemporaryFile(max_size=CHUNK)
        chunked = "chunked" in request.headers.get("transfer-encoding", "")
        left = self._next_chunk() if chunked else int(request.headers.get("content-length", 0))
        while left:
            data = self.rfile.read(min(left, CHUNK if allowed is None else allowed - request.received))
            if not data:
                raise Dropped
            request.received += len(data)
            body.write(data)
            if allowed is not None and request.received >= allowed:
                raise Dropped
            left -= len(data)
            if chunked and not left:
                self.rfile.readline()
                left = self._next_chunk()
        if allowed is not None:
            raise Dropped
        if fault is not None and fault.kind == "truncate_upload":
            body.truncate(fault.bytes)
        body.seek(0)
        return body

    def _next_chunk(self) -> int:
        size = int(self.rfile.readline().split(b";")[0], 16)
        if size == 0:
            self.rfile.readline()
        return size

    def _answer(self, path: str, request: Request, body: IO[bytes], fault: Fault | None) -> Answer:
        hub = self.server.hub
        if fault is not None and fault.kind == "slow":
            hub.stopping.wait(fault.seconds)
        if hub.stopping.is_set() or (fault is not None and fault.kind == "drop"):
            raise Dropped
        try:
            if fault is not None and fault.kind == "status":
                raise HubError(fault.status, fault.message, fault.error_code)
            user = hub.user_of(request.headers.get("authorization"))
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(path)
                if match and (method == request.method or (method == "GET" and request.method == "HEAD")):
                    params = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    return function(Call(hub, request, user, params, body, fault))
            raise HubError(404, f"The loopback Hub has no {request.line}")
        except HubError as error:
            message = error.message.splitlines()[0].encode("latin-1", "replace").decode("latin-1")
            headers = {"X-Error-Message": message, **error.headers}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            return Answer({"error": error.message, **error.body}, headers=headers, status=error.status)
        except Exception as error:
            hub.crashes.append(traceback.format_exc())
            return Answer({"error": repr(error)}, status=500)

    def _send(self, request: Request, answer: Answer, fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else None
        body: IO[bytes] = (
            io.BytesIO(json.dumps(answer.json).encode()) if answer.file is None else open(answer.file, "rb")
        )
        with body:
            size = body.seek(0, io.SEEK_END)
            status, start, end = answer.status, 0, size
            headers = {"Content-Type": "application/json" if answer.file is None else "application/octet-stream"}
            headers |= answer.headers
            if answer.file is not None and request.method == "GET" and "range" in request.headers:
                status, start, end = byte_range(request.headers["range"], size)
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}" if end else f"bytes */{size}"
            announced = end - start
            if fault is not None and kind == "wrong_size":
                announced += fault.bytes if request.method == "HEAD" else 0
                headers |= {"X-Linked-Size": str(size + fault.bytes)} if "X-Linked-Size" in headers else {}
            if kind == "wrong_etag":
                headers |= {name: f'"{"0" * 64}"' for name in ("ETag", "X-Linked-Etag") if name in headers}
            request.status = status
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(announced)}.items():
                self.send_header(name, value)
            self.end_headers()
            if request.method == "HEAD":
                return
            body.seek(start)
            left = min(end - start, fault.bytes) if fault is not None and kind == "drop_after" else end - start
            while left and (data := body.read(min(left, CHUNK))):
                if kind == "corrupt" and body.tell() == len(data):
                    data = bytes([data[0] ^ 0xFF]) + data[1:]
                left -= len(data)
                request.sent += len(data)
                self.wfile.write(data)
        if kind == "drop_after":
            self.wfile.flush()
            raise Dropped


def byte_range(header: str, size: int) -> tuple[int, int, int]:
    """Status, first byte and end (exclusive) of a `bytes=a-b`, `bytes=a-` or `bytes=-n` header."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or not any(match.groups()):
        return 200, 0, size
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last) + 1, size) if first and last else size
    return (206, start, end) if start < end else (416, 0, 0)

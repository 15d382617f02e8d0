"""Faults that a test orders from the loopback Hub, and the log of requests that it counts."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal


Kind = Literal[
    "status",
    "drop",
    "drop_after",
    "slow",
    "stale_parent",
    "wrong_size",
    "wrong_etag",
    "corrupt",
    "drop_upload",
    "truncate_upload",
]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with the requests whose `"METHOD /path"` the regular expression `match` finds.

    Kinds, with the fields that they read:
        status: answer `status` with `error_code` and `message` in place of the real answer.
        drop: close the connection without an answer; the request has no effect.
        drop_after: send the headers and the first `bytes` of the body, then close the connection; the request has
            had its effect, so that `bytes=0` on a commit is an answer that got lost.
        slow: wait `seconds`, then answer.
        stale_parent: let somebody else commit to the branch first (a file `concurrent.txt`).
        wrong_size: announce a size that is `bytes` too large (in X-Linked-Size, and in Content-Length on HEAD).
        wrong_etag: announce another hash than the content's.
        corrupt: invert the first byte of the body: right size and ETag, wrong content.
        drop_upload: read `bytes` of the request's body, then close the connection; nothing is stored.
        truncate_upload: keep only the first `bytes` of an LFS upload, answer as if all were well.

    Attributes:
        times: how many requests it hits; None for all.
        skip: how many matching requests it lets pass first.
    """

    match: str
    kind: Kind
    times: int | None = 1
    skip: int = 0
    status: int = 500
    error_code: str | None = None
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    bytes: int = 1
    seconds: float = 0.0


class Faults:
    """The faults in force; a request takes the first one that matches and is not used up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._active.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._active.clear()

    def pending(self) -> list[Fault]:
        """Faults that still have requests to hit, with what is left of `times` and `skip`."""
        with self._lock:
            return list(self._active)

    def take(self, line: str) -> Fault | None:
        """The fault for the request `"METHOD /path"`, counted as used."""
        with self._lock:
            for position, fault in enumerate(self._active):
                if re.search(fault.match, line) is None:
                    continue
                if fault.skip:
                    self._active[position] = replace(fault, skip=fault.skip - 1)
                    continue
                if fault.times == 1:
                    del self._active[position]
                elif fault.times is not None:
                    self._active[position] = replace(fault, times=fault.times - 1)
                return fault
        return None


@dataclass
class Request:
    """One request; `status` (0: no answer was sent) and the byte counts are filled in as it is served."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    status: int = 0
    received: int = 0
    sent: int = 0

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


class RequestLog:
    """Requests in the order in which they arrived; iterate, `len`, filter by a regular expression on the line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def clear(self) -> None:
        with self._lock:
            self._requests.clear()

    def matching(self, pattern: str) -> list[Request]:
        """Requests whose `"METHOD /path"` (unquoted, without the query) the regular expression finds."""
        return [request for request in self if re.search(pattern, request.line)]

    def count(self, pattern: str = "") -> int:
        return len(self.matching(pattern))

    @property
    def lines(self) -> list[str]:
        return [request.line for request in self]

    def __iter__(self) -> Iterator[Request]:
        with self._lock:
            return iter(list(self._requests))

    def __len__(self) -> int:
        with self._lock:
            return len(self._requests)

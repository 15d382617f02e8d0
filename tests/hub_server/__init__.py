"""A Hugging Face Hub on 127.0.0.1 for the tests: real clients talk to it, faults on demand, every request counted."""

from .errors import HubError
from .faults import Fault, Request, RequestLog
from .server import HubServer, User


__all__ = ["Fault", "HubError", "HubServer", "Request", "RequestLog", "User"]

"""The OpenAI API over an engine; needs the extra `serve`."""

from __future__ import annotations

from importlib.util import find_spec


def require_packages() -> None:
    """Check that the packages of the extra are there.

    Raises:
        ValueError: naming those that are not, and how to get them.
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ValueError(f"Serving needs {', '.join(missing)}: pip install 'finesteer-hf[serve]'.")

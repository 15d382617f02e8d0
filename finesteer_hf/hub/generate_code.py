"""Code that an adapter's repo may carry, so that plain transformers can steer."""

from __future__ import annotations

from pathlib import Path
from string import Template

from finesteer_hf.adapters.config import CUSTOM_GENERATE_NAME


_TEMPLATE = Template('''\
"""Steer with this repo's adapter: model.generate(**inputs, custom_generate=$repo, trust_remote_code=True).

steering_scale, output_steering and everything that generate takes may be added; revision= is the adapter's.
"""

ADAPTER = $repo


def generate(model, steering_adapter=ADAPTER, revision=None, **kwargs):
    try:
        from finesteer_hf.custom_generate import generate_steered
    except ImportError as error:
        raise ImportError("This adapter steers with finesteer_hf. Install it: pip install finesteer-hf") from error
    return generate_steered(model, steering_adapter, revision=revision, **kwargs)
''')


def write_custom_generate(directory: str | Path, repo: str | None) -> Path:
    """Write `custom_generate/generate.py` into a folder.

    Args:
        directory: root of the future repo.
        repo: repo that the code loads, `org/name`; None if it is not known yet: callers must then pass
            `steering_adapter="org/name"`.

    Returns:
        Path of the file.
    """
    path = Path(directory) / CUSTOM_GENERATE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(generate_code(repo))
    return path


def generate_code(repo: str | None) -> bytes:
    """Content of `custom_generate/generate.py`; argument as for `write_custom_generate`."""
    return _TEMPLATE.substitute(repo=repr(repo)).encode()

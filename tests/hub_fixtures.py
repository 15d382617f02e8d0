"""Clients of the loopback Hub: in this process with its settings swapped for a while, or in a process of their own.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET once, when it is imported, and other libraries copy
what it read. `hub_client` therefore replaces the values wherever they are kept and puts the old ones back;
`run_client` and `run_command` start a process that sees nothing else from the start.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import HfFileSystem, constants, hf_api
from huggingface_hub.utils import close_session


LIBRARIES = ("huggingface_hub", "transformers", "peft", "datasets", "finesteer_hf")
FOREIGN = ("HUGGINGFACE_HUB_CACHE", "HUGGINGFACE_ASSETS_CACHE", "HUGGINGFACE_CO_STAGING", "TRANSFORMERS_OFFLINE")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty loopback Hub; the test fails if a route of it crashed."""
    with HubServer() as server:
        yield server
    assert not server.crashes, "\n".join(server.crashes)


@pytest.fixture
def hub_client(hub: HubServer, tmp_path: Path) -> Iterator[HubServer]:
    """`hub`, with the Hub clients of this process turned to it: empty cache, signed in as `user`, no xet."""
    with client_of(hub, tmp_path / "hf_home"):
        yield hub


def client_env(hub: HubServer, home: Path, token: str | None = None) -> dict[str, str]:
    """Environment of a client of `hub` that keeps everything in `home` and makes no request of its own accord.

    Args:
        token: default: the first user's; "" for a visitor.
    """
    home.mkdir(parents=True, exist_ok=True)
    # Without these two files a client first asks which coding tool runs it, or whether there is a newer version.
    (home / ".agent_harnesses.json").write_text('{"standardEnvVars": [], "harnesses": {}}')
    (home / ".check_for_update_done").touch()
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    token = hub.token if token is None else token
    return {**env, "HF_TOKEN": token} if token else env


def run_command(
    command: Sequence[str],
    hub: HubServer,
    *,
    home: Path | None = None,
    token: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a program as a client of `hub`; its result has `returncode`, `stdout` and `stderr`.

    Args:
        home: HF_HOME; default: a new one that is deleted afterwards.
        token: see `client_env`.
        env: variables to add to the environment or to change in it.
    """
    with tempfile.TemporaryDirectory(prefix="hf-home-") as folder:
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN and name != "HF_TOKEN"}
        full = {**kept, **client_env(hub, home or Path(folder), token), **(env or {})}
        return subprocess.run(
            [*command], env=full, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False
        )


def run_client(
    code: str,
    hub: HubServer,
    *,
    home: Path | None = None,
    token: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
) -> Any:
    """Run Python code in a process that knows no other Hub, and return the value it leaves in `result`.

    Args:
        code: may be indented; `result` (default None) has to be something that JSON can say.
        home, token, env: see `run_command`.

    Raises:
        AssertionError: the process failed; with its stderr.
    """
    with tempfile.TemporaryDirectory(prefix="hub-client-") as folder:
        answer, script = Path(folder) / "answer.json", Path(folder) / "client.py"
        ending = f"import json as _json\nopen({str(answer)!r}, 'w').write(_json.dumps(result))\n"
        script.write_text("result = None\n" + textwrap.dedent(code) + "\n" + ending, encoding="utf-8")
        done = run_command(
            [sys.executable, str(script)], hub, home=home, token=token, env=env, cwd=cwd, timeout=timeout
        )
        assert done.returncode == 0, f"the client failed:\n{done.stdout}\n{done.stderr}"
        return json.loads(answer.read_text())


@contextlib.contextmanager
def client_of(hub: HubServer, home: Path, token: str | None = None) -> Iterator[None]:
    """Turn this process's Hub clients to `hub` for the time of the block, then back to what they were.

    Not for threads: everything in this process that talks to a Hub talks to this one meanwhile.
    """
    env = client_env(hub, home, token)
    new: dict[str, Any] = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HUGGINGFACE_HUB_CACHE": env["HF_HUB_CACHE"],
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }
    kept = ("HF_ENDPOINT", "HF_HOME", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE")
    new |= {name: env[name] for name in (*kept, "HF_MODULES_CACHE")}
    old = {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HUB_DATASETS_URL": constants.ENDPOINT + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_MODULES_CACHE": os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules")),
        **{name: getattr(constants, name) for name in new if hasattr(constants, name)},
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in (*FOREIGN, "HF_TOKEN"):
                patch.delenv(name, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            for module, name in kept_settings(new):
                patch.setattr(module, name, new[name])
            # The functions that huggingface_hub exports are methods of this one object.
            patch.setattr(hf_api.api, "endpoint", hub.url)
            forget_connections()
            yield
    finally:
        forget_connections()
        # A module imported inside the block copied the replaced values, and nothing was there to be put back.
        for module, name in kept_settings(old):
            if getattr(module, name) == new[name]:
                setattr(module, name, old[name])


def forget_connections() -> None:
    """Drop what clients keep between calls: connections, proxies read from the environment, file systems, endpoints."""
    HfFileSystem.clear_instance_cache()
    if "transformers.utils.hub" in sys.modules:
        # transformers makes one client and keeps the endpoint that it began with.
        sys.modules["transformers.utils.hub"]._hf_api = None  # type: ignore[attr-defined]
    close_session()


def kept_settings(names: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Modules of the libraries that hold one of the settings as a global, with the setting's name."""
    modules = [module for key, module in list(sys.modules.items()) if key.split(".")[0] in LIBRARIES and module]
    return [(module, name) for module in modules for name in names if name in vars(module)]

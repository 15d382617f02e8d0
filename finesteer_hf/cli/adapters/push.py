"""`finesteer push`: an adapter to the Hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import AsJson, console, print_json, say, table
from finesteer_hf.cli.options import PUSH, takes


@takes(pushing=PUSH)
def push(
    adapter: Annotated[str, typer.Argument(help="Adapter: folder or Hub id.")],
    repo_id: Annotated[str, typer.Argument(help="org/name on the Hub; created if missing.")],
    as_json: AsJson = False,
    *,
    pushing: dict[str, Any],
) -> None:
    """Push an adapter to the Hub, in one commit.

    Sign in first with `hf auth login`, or set HF_TOKEN. Your own text in the repo's README is kept.
    """
    from finesteer_hf.adapters.adapter import SteeringAdapter
    from finesteer_hf.hub import push_adapter

    loaded = SteeringAdapter.from_pretrained(adapter)
    say(f"pushing {adapter} to {repo_id}")
    commit = push_adapter(loaded, repo_id, **pushing)
    name = commit.repo_url.repo_id
    inner = f"{name}/{pushing['subfolder']}" if pushing["subfolder"] else name
    at = pushing["tag"] or (commit.pr_revision if pushing["create_pr"] else pushing["revision"])
    facts = {
        "repo": name,
        "commit": commit.oid,
        "url": commit.pr_url or commit.repo_url.url,
        "steering": f"{inner}@{at}" if at else inner,
    }
    if as_json:
        print_json(facts)
        return
    console.print(table(("pushed", facts["repo"]), [(key, facts[key]) for key in ("commit", "url", "steering")]))

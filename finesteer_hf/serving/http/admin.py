"""Adapters at run time, behind the admin token; requests in flight keep theirs."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from finesteer_hf.serving.catalogue import Catalogue, Offered
from finesteer_hf.serving.http.errors import ApiError
from finesteer_hf.serving.http.fields import Strict
from finesteer_hf.serving.http.logs import LOGGER


class Source(Strict):
    """Where an adapter comes from."""

    source: str = Field(min_length=1)
    version: str | None = None


class NewAdapter(Source):
    """An adapter to load."""

    name: str


def admin_routes(catalogue: Catalogue, changeable: bool) -> APIRouter:
    """List, load, replace and drop.

    Args:
        catalogue: the adapters.
        changeable: whether they can be changed; under tensor parallelism the other ranks would not know.
    """
    router = APIRouter(prefix="/admin")

    @router.get("/adapters")
    async def listing() -> dict[str, Any]:
        """All adapters; `current` is what a name without a version means."""
        return {"adapters": [shown(catalogue, each) for each in catalogue.offered()]}

    @router.post("/adapters", status_code=201)
    async def load(body: NewAdapter) -> dict[str, Any]:
        """Load an adapter, or another version of one; its name means it from now on."""
        return await change(body.name, body, replace=False)

    @router.put("/adapters/{name}")
    async def replace(name: str, body: Source) -> dict[str, Any]:
        """Load an adapter in place of what its name means now."""
        return await change(name, body, replace=True)

    @router.delete("/adapters/{reference}")
    async def drop(reference: str) -> dict[str, Any]:
        """Drop `name`, all of its versions, or `name@version`."""
        check_changeable()
        gone = await asyncio.to_thread(catalogue.drop, reference)
        LOGGER.info("adapters dropped", extra={"fields": {"adapters": [each.key for each in gone]}})
        return {"dropped": [each.key for each in gone]}

    async def change(name: str, body: Source, *, replace: bool) -> dict[str, Any]:
        check_changeable()
        offered = await asyncio.to_thread(catalogue.add, name, body.source, body.version, replace=replace)
        LOGGER.info("adapter loaded", extra={"fields": {"adapter": offered.key, "replaced": replace}})
        return shown(catalogue, offered)

    def check_changeable() -> None:
        if not changeable:
            raise ApiError(
                409, "Under tensor parallelism adapters are given at start; the other ranks would not load them."
            )

    return router


def shown(catalogue: Catalogue, offered: Offered) -> dict[str, Any]:
    """An adapter as JSON."""
    return {**dataclasses.asdict(offered), "current": catalogue.resolve(offered.name).key == offered.key}

"""Find steering adapters on the Hub."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import HfApi

from finesteer_hf.hub.names import check_repo_id


LIBRARY = "finesteer_hf"
_BASE_TAG = "base_model:adapter:"


@dataclass(frozen=True)
class HubAdapter:
    """A repo of the Hub that says it holds a steering adapter.

    Attributes:
        repo_id: what `steering=` takes.
        base_models: models that it names as its base.
        tags: all its tags; among them the steering method in lower case.
        downloads: in the last 30 days.
        likes: how many liked it.
        private: whether only its owners see it.
    """

    repo_id: str
    base_models: tuple[str, ...]
    tags: tuple[str, ...]
    downloads: int
    likes: int
    private: bool


def list_adapters(
    base_model: str | None = None,
    *,
    method: str | None = None,
    author: str | None = None,
    token: str | bool | None = None,
    limit: int | None = None,
) -> list[HubAdapter]:
    """List the steering adapters of the Hub, by the tags of their cards.

    Args:
        base_model: Hub id of the model that they have to be for.
        method: a steering method, such as `FINESTEER`.
        author: a user or organisation.
        token: token of the Hub, if not the one that is signed in; it shows private repos too.
        limit: how many at most.

    Returns:
        The adapters, in the Hub's order.

    Raises:
        ValueError: if `base_model` is no Hub id.
    """
    tags = [LIBRARY]
    if base_model is not None:
        check_repo_id(base_model)
        tags.append(f"{_BASE_TAG}{base_model}")
    if method is not None:
        tags.append(method.lower())
    found = HfApi(token=token).list_models(filter=tags, author=author, limit=limit)
    return [
        HubAdapter(
            repo_id=info.id,
            base_models=tuple(tag.removeprefix(_BASE_TAG) for tag in info.tags or [] if tag.startswith(_BASE_TAG)),
            tags=tuple(info.tags or ()),
            downloads=info.downloads or 0,
            likes=info.likes or 0,
            private=bool(info.private),
        )
        for info in found
    ]

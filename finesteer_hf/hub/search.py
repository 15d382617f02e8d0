"""Find steering adapters on the Hub."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import HfApi

from finesteer_hf.hub.names import check_repo_id


LIBRARY = "finesteer_hf"
_BASE_TAG = "base_model:adapter:"


@dataclass(frozen=True)
class HubAdapter:
    """A Hub repo tagged as a steering adapter.

    Attributes:
        repo_id: id for `steering=`.
        base_models: base models that it names.
        tags: all its tags, including the steering method in lower case.
        downloads: downloads in the last 30 days.
        likes: number of likes.
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
    search: str | None = None,
    method: str | None = None,
    author: str | None = None,
    token: str | bool | None = None,
    limit: int | None = None,
) -> list[HubAdapter]:
    """List the steering adapters of the Hub, by the tags of their cards.

    Args:
        base_model: only adapters for this model, a Hub id.
        search: text that the repo's id contains.
        method: a steering method, such as `FINESTEER`.
        author: a user or organisation.
        token: Hub token, if not the signed-in one; shows its private repos too.
        limit: most results.

    Returns:
        The adapters, in the Hub's order.

    Raises:
        ValueError: if `base_model` is not a Hub id.
    """
    tags = [LIBRARY]
    if base_model is not None:
        check_repo_id(base_model)
        tags.append(f"{_BASE_TAG}{base_model}")
    if method is not None:
        tags.append(method.lower())
    found = HfApi(token=token).list_models(filter=tags, search=search, author=author, limit=limit)
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

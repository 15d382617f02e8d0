"""Which cache blocks requests may share.

The engine knows a block by its tokens and those before it. A steered token's keys and values also depend on what was
added to it, so here a block is known by both: a steered token counts as another token, which its row's fingerprint picks.
Unsteered parts are shared by all, steered ones by requests that add the same. Blocks of a request that is not decided yet
are not looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.cache import PagedAttentionCache

from finesteer_hf.serving.requests import SteeredRequest


if TYPE_CHECKING:
    from finesteer_hf.serving.paged import PagedSession


class SteeredCache(PagedAttentionCache):
    """The engine's cache, with blocks that are known by what was added to them as well."""

    session: PagedSession
    scheduler: Any

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """Number of tokens at the beginning of a waiting request that blocks of the cache hold already."""
        state = self.scheduler.waiting_requests.get(request_id)
        request = None if state is None else self.session.of(state)
        if request is not None and request.plan:
            if request.decided:
                prompt_ids = known_as(prompt_ids, request)
            else:
                # One more: the engine never matches the last token that it is shown.
                prompt_ids = prompt_ids[: request.clean + 1]
        matched = super().search_prefix_match(request_id, prompt_ids)
        self.session.stats.matched += matched
        return matched

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        """Make the blocks that the last forward filled known."""
        request = self.session.of(state)
        if request is None or not request.plan or (request.decided and not request.fired):
            super().mark_complete_blocks(state, complete_blocks)
            return
        initial, generated = state.initial_tokens, state.generated_tokens
        tokens = known_as([*initial, *generated], request)
        try:
            # The engine hashes these two, one after the other.
            state.initial_tokens, state.generated_tokens = tokens, []
            super().mark_complete_blocks(state, complete_blocks)
        finally:
            state.initial_tokens, state.generated_tokens = initial, generated


def known_as(tokens: Sequence[int], request: SteeredRequest) -> list[int]:
    """The ids that a text's blocks are known by: a token's own, or one that its row's fingerprint picks.

    Args:
        tokens: of the text, from its beginning.
        request: decided, or with only its clean tokens in the text.
    """
    result: list[int] = []
    for region, count in request.regions(0, len(tokens)).items():
        salt = request.salts.get(region, 0)
        part = tokens[len(result) : len(result) + count]
        result += [token ^ salt for token in part] if salt else part
    return result

"""Which columns of a batch are pads, prompt, query or generated, by absolute position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finesteer_hf.processors import Positions


@dataclass(frozen=True)
class Window:
    """The columns of a sequence; the first `prompt_end` are prompt, pads included.

    Attributes:
        prompt_end: absolute position after the last prompt column.
        mask: bool `[rows, prompt_end]`, False at pads; None if there are none.
        query: absolute column of each row's query token: a number if all rows agree, else int64 `[rows]`.
        first_query, last_query: smallest and largest of them.
    """

    prompt_end: int
    mask: torch.Tensor | None
    query: int | torch.Tensor
    first_query: int
    last_query: int

    @classmethod
    def of(cls, prompt_end: int, mask: torch.Tensor | None, lengths: torch.Tensor | None) -> Window:
        """Find the query columns.

        Args:
            prompt_end: absolute position after the last prompt column.
            mask: bool `[rows, prompt_end]` or None.
            lengths: int64 `[rows]`: number of real prompt tokens of each row, if the query is not the last real token
                (a plain forward over prompt and answer).

        Raises:
            ValueError: if a row has no real token, or a length exceeds the row.
        """
        if mask is not None and lengths is None and bool(mask.all()):
            mask = None
        if mask is None and lengths is None:
            return cls(prompt_end, None, prompt_end - 1, prompt_end - 1, prompt_end - 1)
        if mask is not None and not bool(mask.any(dim=1).all()):
            raise ValueError("A row of the batch is all padding; every row needs at least one real token.")
        if lengths is not None:
            first = mask.int().argmax(dim=1) if mask is not None else torch.zeros_like(lengths)
            real = mask.sum(dim=1) if mask is not None else torch.full_like(lengths, prompt_end)
            lengths = lengths.to(real.device)
            if bool((lengths < 1).any()) or bool((lengths > real).any()):
                raise ValueError(
                    f"prompt_lengths must be between 1 and the number of real tokens of the row; got "
                    f"{lengths.tolist()} for rows of {real.tolist()}."
                )
            query = first + lengths - 1
        else:
            assert mask is not None
            query = prompt_end - 1 - mask.int().flip(1).argmax(dim=1)
        columns = query.tolist()
        low, high = min(columns), max(columns)
        if mask is not None and bool(mask.all()):
            mask = None
        return cls(prompt_end, mask, low if low == high else query, low, high)

    def moved(self, shift: torch.Tensor, mask: torch.Tensor) -> Window:
        """The same rows, each moved right.

        Args:
            shift: int64 `[rows]` columns.
            mask: `[rows, columns]`, 0 at pads, of the moved rows; at least as wide as the window becomes.
        """
        end = self.prompt_end + int(shift.max())
        columns = (shift + (self.query if isinstance(self.query, int) else self.query.to(shift.device))).tolist()
        low, high = min(columns), max(columns)
        query = low if low == high else torch.tensor(columns, device=shift.device)
        return Window(end, mask[:, :end].bool(), query, low, high)

    @property
    def uniform(self) -> bool:
        """Whether all rows have their query in the same column."""
        return isinstance(self.query, int)

    def query_within(self, past: int, tokens: int) -> bool:
        """Whether a forward over columns `past` to `past + tokens` contains every row's query."""
        return past <= self.first_query and self.last_query < past + tokens

    def query_state(self, hidden: torch.Tensor, past: int) -> torch.Tensor:
        """States of the query tokens, `[rows, width]` float32, from `[rows, tokens, width]`."""
        if isinstance(self.query, int):
            return hidden[:, self.query - past].detach().float()
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows, self.query.to(hidden.device) - past].detach().float()

    def prompt_mean(self, hidden: torch.Tensor) -> torch.Tensor:
        """Means over the real tokens up to the query, `[rows, width]` float32, from `[rows, tokens, width]`.

        The columns start at the prompt's first and reach at least the last query.
        """
        prompt = hidden[:, : self.last_query + 1].detach()
        named = self.token_mask("prompt", 0, prompt.shape[1], prompt.device)
        if named is None:
            return prompt.float().mean(dim=1)
        # States at pads may be NaN, so they are replaced, not multiplied by zero.
        return torch.where(named[..., None], prompt.float(), 0.0).sum(dim=1) / named.sum(dim=1, keepdim=True)

    def real(self, past: int, tokens: int, device: torch.device) -> torch.Tensor | None:
        """Bool `[rows, tokens]`, False at pads; None if the forward has none. Generated columns are real."""
        if self.mask is None or past >= self.prompt_end:
            return None
        part = self.mask[:, past : past + tokens].to(device)
        missing = tokens - part.shape[1]
        return torch.nn.functional.pad(part, (0, missing), value=True) if missing else part

    def token_mask(self, positions: Positions, past: int, tokens: int, device: torch.device) -> torch.Tensor | None:
        """Bool `[rows or 1, tokens]`: the real tokens that `positions` selects; None if it selects all."""
        real = self.real(past, tokens, device)
        if positions == "all":
            return real
        if self.shared_columns(positions, past, tokens) == slice(0, tokens):
            return None
        columns = torch.arange(past, past + tokens, device=device)[None]
        query = self.query if isinstance(self.query, int) else self.query.to(device)[:, None]
        named = columns <= query if positions == "prompt" else columns >= query
        return named if real is None else named & real

    def shared_columns(self, positions: Positions, past: int, tokens: int) -> slice | None:
        """Columns of a forward that `positions` selects; None if rows have pads or differ in them."""
        if past >= self.prompt_end:
            query = -1
        elif isinstance(self.query, int) and self.mask is None:
            query = min(max(self.query - past, -1), tokens)
        else:
            return None
        return {
            "all": slice(0, tokens),
            "prompt": slice(0, min(query + 1, tokens)),
            "generated": slice(max(query, 0), tokens),
        }[positions]

    def newest(self, past: int, tokens: int, device: torch.device) -> torch.Tensor | None:
        """Index within a forward of each row's newest real token, int64 `[rows]`; None if it is the last column."""
        real = self.real(past, tokens, device)
        return None if real is None else tokens - 1 - real.int().flip(1).argmax(dim=1)

    def position_ids(self, rows: int, device: torch.device) -> torch.Tensor:
        """Rotary positions of the prompt columns as in `generate`, with pads at 0: `[rows, prompt_end]` int64."""
        if self.mask is None:
            return torch.arange(self.prompt_end, device=device).expand(rows, -1)
        mask = self.mask.to(device).long()
        return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)

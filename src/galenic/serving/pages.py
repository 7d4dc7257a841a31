"""Reading the entry of the token before each token from pages. Needs nothing but torch."""

import torch


def exchange(
    raw: torch.Tensor,
    pages: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Writes each token's entry to its place and returns the entry of the token before it.

    Rows of one request follow each other, so for all but a request's first row that is the row above. The first row's
    is read from the pages, where an earlier step, or another request with the same beginning, left it.

    Args:
        raw: [T, ...], entries of the T tokens of this step, request after request.
        pages: [blocks, places, ...], written in place; may be any view.
        starts: [R + 1] int, the first row of each request, and T. Requests without a row repeat the one after.
        lengths: [R] int, tokens of each request up to and including this step.
        table: [R, columns] int, the block of the request's positions [c * places, (c + 1) * places) in column c.
        slots: [T] int, where each entry goes: block * places + place.

    Returns:
        [T, ...]; zeros for the first token of a text.
    """
    places = pages.shape[1]
    starts, slots = starts.long(), slots.long()
    first, counts = starts[:-1], starts.diff()
    begin = lengths.long() - counts  # position of each request's first row
    last = (begin - 1).clamp_min(0)
    block = table.gather(1, (last // places).long()[:, None])[:, 0].long()
    kept = pages[block, last % places]
    shape = (-1, *(1,) * (raw.ndim - 1))
    kept = kept.masked_fill((begin == 0).view(shape), 0)

    # One row more than there are tokens, for requests without a row.
    before = torch.cat((torch.zeros_like(raw[:1]), raw))
    before[first] = kept.to(raw.dtype)
    pages[slots // places, slots % places] = raw.to(pages.dtype)
    return before[:-1]

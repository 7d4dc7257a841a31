"""Small networks, tokens and random shapes for the tests of the network."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM

VOCABULARY, WINDOW, WIDTH = 48, 5, 24


def small(**changes) -> BaichuanM1Config:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_swa_attention_heads": 6,
        "num_swa_key_value_heads": 2,
        "sliding_window": WINDOW,
        "rope_theta": 100.0,
    }
    return BaichuanM1Config(**(sizes | changes))


def build(attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = BaichuanM1ForCausalLM._from_config(small(**changes), attn_implementation=attention, dtype=dtype)
    with torch.no_grad():  # large weights and odd taps, so that every mistake shows
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.5 if parameter.numel() < 500 else 0.3)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (rows, length), generator=generator)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def all_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-9):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        close(actual[name], tensor, tolerance)


@st.composite
def shapes(draw, **fixed) -> dict:
    """Draws what `small` and `build` take: kinds of layers, heads, window, taps, vocabulary, head."""
    layers = draw(st.integers(1, 4))
    changes = {
        "vocab_size": draw(st.integers(8, 60)),
        "num_hidden_layers": layers,
        "sliding_window_layers": sorted(draw(st.sets(st.integers(0, layers - 1)))),
        "sliding_window": draw(st.integers(2, 9)),
        "conv_window": draw(st.integers(1, 4)),
        "norm_head": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from((10.0, 1e4))),
    }
    for prefix in ("num", "num_swa"):
        heads = draw(st.sampled_from((1, 2, 3, 4, 6, 12)))
        changes[f"{prefix}_attention_heads"] = heads
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        changes[f"{prefix}_key_value_heads"] = draw(st.sampled_from(divisors))
    return changes | fixed


def padded(texts: list[torch.Tensor], sides: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts texts [T_i] into one batch, each row padded on its own side; returns ids and mask [B, T]."""
    width = max(len(text) for text in texts)
    rows, mask = torch.full((len(texts), width), 3), torch.zeros(len(texts), width, dtype=torch.long)
    for i, (text, side) in enumerate(zip(texts, sides, strict=True)):
        place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        rows[i, place], mask[i, place] = text, 1
    return rows, mask


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def in_chunks(model, rows: torch.Tensor, cuts, cache=None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, T, V] of rows fed piece by piece through a cache, cut before the columns `cuts`."""
    pieces = []
    for start, end in itertools.pairwise([0, *sorted(cuts), rows.shape[1]]):
        seen = None if mask is None else mask[:, :end]
        out = model(rows[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


@contextlib.contextmanager
def flex_unfused() -> Iterator[None]:
    """Runs flex attention without compiling: the same masks and heads, in any dtype, in milliseconds."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", "_compile flag on create_block_mask", DeprecationWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit", DeprecationWarning)
        yield

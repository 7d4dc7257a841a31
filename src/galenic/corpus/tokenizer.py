"""Verb `tokenizer`: documents in, a Hugging Face tokenizer and token shards out.

The report's rules (section 4.1, appendix C): no normalisation, whitespace kept, digits one by one, characters
above a coverage get an entry, the rest is spelled in bytes.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from galenic.corpus.chat_format import BOS, EOS, SPECIAL_TOKENS, chat_template
from galenic.corpus.shards import write_meta, write_shard
from galenic.corpus.tokenizer_config import TokenizerConfig
from galenic.runtime import Plan, UserError, atomic_path, human, progress, read_json

WORDS = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""A merge never crosses these pieces: a word with its leading space, punctuation, runs of whitespace."""

BYTES = [f"<0x{value:02X}>" for value in range(256)]


def plan(config: TokenizerConfig) -> Plan:
    """What the verb would do."""
    sources = _sources(config)
    characters = sum(source["characters"] for source in sources.values())
    return Plan(
        reads=config.reads(),
        writes=[config.out],
        facts={
            "documents": human(sum(source["documents"] for source in sources.values())),
            "characters": human(characters),
            "vocabulary": f"{config.vocab_size} entries",
            "learned from": f"{human(min(characters, config.train_characters))} characters",
        },
    )


def _sources(config: TokenizerConfig) -> dict[str, Any]:
    path = Path(config.corpus) / "sources.json"
    if not path.exists():
        raise UserError(f"{config.corpus}: not a corpus folder (no sources.json); run the corpus step first")
    return read_json(path)


def run(config: TokenizerConfig) -> None:
    """Trains the tokenizer, saves it as a Hugging Face folder, writes the token shards."""
    sources = _sources(config)
    documents = _read_documents(Path(config.corpus) / "documents.parquet")
    out = Path(config.out)

    # ---- learn
    texts = training_sample(documents, config.train_characters)
    if not texts:
        raise UserError(f"{config.corpus}: no training documents to learn a tokenizer from")
    tokenizer = train_bpe(
        texts,
        vocab_size=config.vocab_size,
        character_coverage=config.character_coverage,
        max_characters=config.max_characters,
    )
    save_tokenizer(tokenizer, out, config.system_prompt)
    tokenizer.encode_special_tokens = True  # a marker written in a document is text

    # ---- encode
    with atomic_path(out / "tokens") as folder:
        folder.mkdir()
        dtype = "uint16" if config.vocab_size <= 2**16 else "uint32"
        meta: dict[str, Any] = {"dtype": dtype, "vocab_size": tokenizer.get_vocab_size(), "sources": {}}
        total = sum(len(row["text"]) for rows in documents.values() for row in rows)
        with progress(total, "encode", "characters") as bar:
            for source in sorted(sources):
                counts: dict[str, Any] = {"group": sources[source]["group"]}
                for split in ("train", "heldout"):
                    rows = documents.get((source, split), [])
                    encoded = _encode(tokenizer, rows, bar)
                    counts[split] = write_shard(folder, source, split, encoded, dtype)
                meta["sources"][source] = counts
        write_meta(folder, meta)


def _read_documents(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Reads the columns needed, grouped by (source, split), in file order."""
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path, columns=["text", "source", "split", "weight"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the corpus step first") from None
    except Exception as error:
        raise UserError(f"{path}: not a readable documents file ({error})") from None
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        grouped.setdefault((row["source"], row["split"]), []).append(row)
    return grouped


def _encode(tokenizer: Any, rows: list[dict[str, Any]], bar: Any) -> Iterator[tuple[list[int], int, float]]:
    for start in range(0, len(rows), 1000):
        batch = rows[start : start + 1000]
        encodings = tokenizer.encode_batch([row["text"] for row in batch], add_special_tokens=False)
        for row, encoding in zip(batch, encodings, strict=True):
            yield [BOS, *encoding.ids, EOS], len(row["text"].encode()), row["weight"]
        bar.update(sum(len(row["text"]) for row in batch))


def training_sample(documents: dict[tuple[str, str], list[dict[str, Any]]], characters: int) -> list[str]:
    """Draws training text evenly over the sources: small ones whole, large ones thinned at a fixed stride."""
    sizes = {
        source: sum(len(row["text"]) for row in rows)
        for (source, split), rows in sorted(documents.items())
        if split == "train"
    }
    # Water-filling: every source gets an equal share; what small ones leave over goes to the others.
    shares: dict[str, float] = {}
    left, open_sources = float(characters), sorted(sizes, key=lambda source: (sizes[source], source))
    while open_sources:
        share = left / len(open_sources)
        source = open_sources.pop(0)
        shares[source] = min(sizes[source], share)
        left -= shares[source]
    texts = []
    for source in sorted(sizes):
        rows = documents[source, "train"]
        keep = shares[source] / max(sizes[source], 1)
        # Bresenham's stride: row i is taken when floor(i * keep) steps up.
        texts += [row["text"] for i, row in enumerate(rows) if int((i + 1) * keep) > int(i * keep)]
    return texts


def train_bpe(texts: list[str], *, vocab_size: int, character_coverage: float, max_characters: int) -> Any:
    """Learns a byte-fallback BPE tokenizer.

    Args:
        texts: training text.
        vocab_size: entries, special tokens and the 256 bytes included.
        character_coverage: share of the text's characters that get an entry of their own.
        max_characters: at most this many of them.

    Returns:
        A `tokenizers.Tokenizer`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    counts = Counter()
    for text in texts:
        counts.update(text)
    total, covered, alphabet = sum(counts.values()), 0, []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= character_coverage * total or len(alphabet) >= max_characters:
            break
        alphabet.append(character)
        covered += count

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL_TOKENS, *BYTES],
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer marks the 256 bytes as special too; then the text "<0x41>" would be read as a byte.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    return Tokenizer.from_str(json.dumps(state))


def save_tokenizer(tokenizer: Any, folder: Path, system_prompt: str) -> None:
    """Writes a Hugging Face tokenizer folder with the chat template."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(system_prompt),
    )
    wrapped.save_pretrained(folder)

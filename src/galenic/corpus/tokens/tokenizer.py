"""Verb `tokenizer`: documents in, a Hugging Face tokenizer and token shards out.

The report's rules (section 4.1, appendix C): no normalisation, whitespace kept, digits one by one, characters
above a coverage get an entry, the rest is spelled in bytes; a general BPE may be merged with an additional one.

    documents.parquet --measure--> --sample--> BPE [+ BPE --merge-->] tokenizer --encode, unit by unit--> tokens/
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from galenic.corpus.engine import map_units
from galenic.corpus.tokens.chat_format import BOS, EOS, PAD, SPECIAL_TOKENS, chat_template
from galenic.corpus.tokens.integrity import file_facts
from galenic.corpus.tokens.shards import join_shards, write_meta
from galenic.corpus.tokens.tokenizer_config import TokenizerConfig
from galenic.corpus.tokens.tokenizer_merge import Bpe, merge_bpe
from galenic.corpus.tokens.tokenizer_units import SPLITS, Counts, Unit, encode, measure, plan_units, sample
from galenic.runtime import Plan, UserError, human, nearest, progress, read_json, resumable_folder

WORDS = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""A merge never crosses these pieces: a word with its leading space, punctuation, runs of whitespace."""

BYTES = [f"<0x{value:02X}>" for value in range(256)]


def plan(config: TokenizerConfig) -> Plan:
    """What the verb would do."""
    sources = _sources(config)
    characters = sum(source["characters"] for source in sources.values())
    facts = {
        "documents": human(sum(source["documents"] for source in sources.values())),
        "characters": human(characters),
    }
    if config.tokenizer:
        facts["vocabulary"] = f"of {config.tokenizer}"
    else:
        additional = _additional(config, sources)
        facts["vocabulary"] = f"{config.vocab_size} entries"
        if additional:
            facts["vocabulary"] += (
                f", {config.additional_share:.0%} of the merges from {', '.join(additional)}"
            )
        facts["learned from"] = f"{human(min(characters, config.train_characters))} characters"
    return Plan(reads=config.reads(), writes=[config.out], facts=facts)


def _sources(config: TokenizerConfig) -> dict[str, Any]:
    path = Path(config.corpus) / "sources.json"
    if not path.exists():
        raise UserError(f"{config.corpus}: not a corpus folder (no sources.json); run the corpus step first")
    return read_json(path)


def _additional(config: TokenizerConfig, sources: dict[str, Any]) -> list[str]:
    """Returns the sources that the second BPE learns from.

    Raises:
        UserError: a name is neither a group nor a source, or no source is left for the first.
    """
    groups = {source["group"] for source in sources.values()}
    for name in config.additional:
        if name not in groups and name not in sources:
            known = sorted(groups | set(sources))
            raise UserError(
                f"additional: '{name}' is neither a group nor a source{nearest(name, known)}; known: {', '.join(known)}"
            )
    found = [s for s in sorted(sources) if {s, sources[s]["group"]} & set(config.additional)]
    if len(found) == len(sources):
        raise UserError(
            "additional: it names every source, so nothing is left for the general BPE; name fewer"
        )
    return found


def run(config: TokenizerConfig) -> None:
    """Makes the tokenizer, saves it as a Hugging Face folder, writes the token shards; a killed run goes on."""
    sources = _sources(config)
    units = plan_units(Path(config.corpus) / "documents.parquet")
    out = Path(config.out)
    where = {"workers": config.workers, "address": config.address}

    # ---- the tokenizer
    measured = {found["number"]: found["counts"] for found in map_units(measure, units, **where)}
    counts: list[Counts] = [measured[unit["number"]] for unit in units]
    for source in sorted({source for count in counts for source in count} - set(sources)):
        raise UserError(f"{config.corpus}: documents of '{source}', which sources.json does not know")
    if config.tokenizer:
        special, size = _take(config.tokenizer, out)
    else:
        tokenizer = _learn(config, units, counts, _additional(config, sources))
        save_tokenizer(tokenizer, out, config.system_prompt)
        special, size = {"bos": BOS, "eos": EOS, "pad": PAD}, tokenizer.get_vocab_size()

    # ---- the tokens
    dtype = "uint16" if size <= 2**16 else "uint32"
    key = _key(out / "tokenizer.json", units, special)
    with resumable_folder(out / "tokens", key, "parts") as folder:
        parts = [folder.absolute() / "parts" / f"{unit['number']:08d}" for unit in units]
        common = {"tokenizer": str((out / "tokenizer.json").absolute()), "key": key, "dtype": dtype}
        common |= {"begin": special["bos"], "end": special["eos"]}
        common["threads"] = (
            config.workers == 1 and not config.address
        )  # several workers keep to one core each
        pairs = zip(units, parts, strict=True)
        todo: list[Unit] = [unit | common | {"out": str(part)} for unit, part in pairs if not part.exists()]
        total = sum(n for count in counts for splits in count.values() for _, n in splits.values())
        with progress(total, "encode", "characters") as bar:
            for done in map_units(encode, todo, **where):
                bar.update(done["characters"])
        meta: dict[str, Any] = {"dtype": dtype, "vocab_size": size, "special": special, "sources": {}}
        for source in sorted(sources):
            joined = {split: join_shards(parts, folder, source, split, dtype) for split in SPLITS}
            told = {
                key: sources[source][key] for key in ("group", "title", "licence") if key in sources[source]
            }
            meta["sources"][source] = {**told, **joined}
        meta["files"] = file_facts(folder)
        write_meta(folder, meta)


def _key(tokenizer: Path, units: list[Unit], special: dict[str, int]) -> str:
    """Identifies what is encoded with what, so that a run goes on only with parts that are its own."""
    files = sorted({unit["file"] for unit in units})
    stats = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(tokenizer.read_bytes())
    digest.update(json.dumps([stats, units, special]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------- an existing tokenizer


def _take(given: str, out: Path) -> tuple[dict[str, int], int]:
    """Copies an existing tokenizer; returns the ids that begin, end and fill, and how many ids there are.

    Texts begin with its `bos` token, or with `eos` if it has none (as GPT-2's do). Nothing is added to it: a model that
    has a vocabulary cannot take new ids, and conversations are written by its own chat template.

    Raises:
        UserError: there is no readable tokenizer.json, or it does not say which token ends a text.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(given).parent if given.endswith("tokenizer.json") else Path(given)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{given}: no tokenizer.json; give the folder of a Hugging Face tokenizer or model")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise UserError(f"{folder}: not a usable tokenizer ({' '.join(str(error).split())})") from None
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            f"{folder}: does not say which token ends a text; put `eos_token` into its tokenizer_config.json"
        )
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokenizer.save_pretrained(out)
    return {"bos": begin, "eos": end, "pad": pad}, max(tokenizer.get_vocab().values()) + 1


# ---------------------------------------------------------------------------- learning


def _learn(config: TokenizerConfig, units: list[Unit], counts: list[Counts], additional: list[str]) -> Any:
    """Learns a tokenizer from the corpus: one BPE of all sources, or two merged."""

    def texts(chosen: set[str], characters: int) -> list[str]:
        mine = [{s: splits for s, splits in count.items() if s in chosen} for count in counts]
        found = sample(units, mine, characters)
        if not found:
            raise UserError(f"{config.corpus}: no training documents to learn a tokenizer from")
        return found

    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "character_coverage": config.character_coverage,
        "max_characters": config.max_characters,
    }
    everything = {source for count in counts for source in count}
    if not additional:
        return train_bpe(texts(everything, config.train_characters), **settings)
    half = config.train_characters // 2
    first = train_bpe(texts(everything - set(additional), half), **settings)
    second = train_bpe(texts(set(additional), half), **settings)
    return merged(first, second, share=config.additional_share, vocab_size=config.vocab_size)


def merged(first: Any, second: Any, *, share: float, vocab_size: int) -> Any:
    """Merges two tokenizers of `train_bpe`; see `merge_bpe`."""
    from tokenizers import Tokenizer

    state = json.loads(first.to_str())
    fixed = [*SPECIAL_TOKENS, *BYTES]
    both = merge_bpe(_bpe(first), _bpe(second), share=share, pieces=vocab_size - len(fixed))
    if len(fixed) + len(both.characters) > vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size} is too small for {len(both.characters)} characters; "
            "raise it or lower max_characters"
        )
    pieces = [*fixed, *both.characters, *(left + right for left, right in both.merges)]
    state["model"]["vocab"] = {piece: number for number, piece in enumerate(pieces)}
    state["model"]["merges"] = [list(merge) for merge in both.merges]
    return Tokenizer.from_str(json.dumps(state))


def _bpe(tokenizer: Any) -> Bpe:
    model = json.loads(tokenizer.to_str())["model"]
    characters = sorted((p for p in model["vocab"] if len(p) == 1), key=model["vocab"].__getitem__)
    return Bpe(characters, [(left, right) for left, right in model["merges"]])


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

"""The text behind a document's name in the metrics (`hpo:12`), to find bad data.

    python -m galenic.corpus.tokens.lookup RUN/20-tokenizer hpo:12 [--corpus RUN/10-corpus]

Shards keep no ids: the number counts the training documents of a source in the order of the corpus' files, so the
corpus, if it is still there, tells the rest.
"""

import argparse
from pathlib import Path

from galenic.corpus.tokens.shards import read_shard
from galenic.runtime import UserError


def text_of(tokenizer_folder: str | Path, name: str, split: str = "train") -> str:
    """Returns the text of a document, decoded from its tokens.

    Args:
        tokenizer_folder: of the tokenizer step.
        name: `source:number`.
        split: `train` or `heldout`.

    Raises:
        UserError: no such document.
    """
    from transformers import PreTrainedTokenizerFast

    source, number = _parts(name)
    shard = read_shard(tokenizer_folder, source, split)
    if number >= len(shard):
        raise UserError(f"{name}: '{source}' has documents 0 to {len(shard) - 1}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder), local_files_only=True)
    return str(tokenizer.decode(shard.document(number)[1:-1], skip_special_tokens=False))


def id_of(corpus_folder: str | Path, name: str, split: str = "train") -> str:
    """Returns the id that a document has in the corpus the shards were made of.

    Raises:
        UserError: no such document.
    """
    from galenic.corpus.tokens.tokenizer_units import batches, plan_units

    source, number = _parts(name)
    seen = 0
    for unit in plan_units(Path(corpus_folder) / "documents.parquet"):
        for batch in batches(unit, ("id", "source", "split")):
            columns = (batch[column].to_pylist() for column in ("id", "source", "split"))
            mine = [id for id, *place in zip(*columns, strict=True) if place == [source, split]]
            if number < seen + len(mine):
                return str(mine[number - seen])
            seen += len(mine)
    raise UserError(f"{name}: {corpus_folder} has {seen} {split} documents of '{source}'")


def _parts(name: str) -> tuple[str, int]:
    source, _, number = name.rpartition(":")
    if not (source and number.isdecimal()):
        raise UserError(f"'{name}' is not source:number, such as hpo:12")
    return source, int(number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints the text of a training document.")
    parser.add_argument("tokenizer", help="folder of the tokenizer step")
    parser.add_argument("name", help="source:number, as in metrics.jsonl")
    parser.add_argument("--corpus", default="", help="folder of the corpus step, to tell its id too")
    given = parser.parse_args()
    try:
        if given.corpus:
            print(f"# {id_of(given.corpus, given.name)}")
        print(text_of(given.tokenizer, given.name))
    except UserError as error:
        parser.exit(2, f"{error}\n")

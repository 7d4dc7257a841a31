"""What the running Python carries: its library's source text and the language reference behind `help()`."""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from galenic.corpus.readers import Drop
from galenic.corpus.readers.bytes import decode
from galenic.corpus.readers.disease_tables import literal
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document
from galenic.corpus.starter.holdout import stable_key
from galenic.runtime import UserError

# Tests, vendored packages and generated tables are not what one wants to learn programming from.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages", "encodings"}
_SKIPPED |= {"pydoc_data", "__pycache__", "turtledemo", "distutils"}
_LONGEST_TOPIC = 4000
_SHORTEST_CODE, _LONGEST_CODE = 200, 4000


def library_modules(drop: Drop, *, limit: int | None = None, library: str | None = None) -> dict[str, str]:
    """Reads modules of the standard library: dotted name -> source text.

    Args:
        drop: receives files that are not text or do not parse.
        limit: at most this many modules; they are taken in an order that favours no letter.
        library: folder to read instead of the running Python's library.

    Raises:
        UserError: the folder does not exist.
    """
    root = Path(library or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise UserError(f"{root}: no Python library there to read code from")
    paths = {path.relative_to(root).as_posix(): path for path in _files(root)}
    names = sorted(paths, key=lambda name: stable_key("module", name))
    modules: dict[str, str] = {}
    for name in names[:limit]:
        try:
            text = decode(paths[name].read_bytes(), name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old library files hold invalid escapes
                ast.parse(text)
        except (UserError, SyntaxError, ValueError, OSError) as error:
            drop(f"python-code/{name}", "python-code", "malformed record", str(error), "")
            continue
        modules[name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = text
    return modules


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]  # not even looked into
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def code_documents(modules: Mapping[str, str]) -> list[Document]:
    """Returns the top-level functions and classes of parsed modules, one a document."""
    return [document for name, text in sorted(modules.items()) for document in _functions(name, text)]


def _functions(name: str, text: str) -> Iterator[Document]:
    lines = text.splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        body = "\n".join(lines[first - 1 : node.end_lineno])
        if _SHORTEST_CODE <= len(body) <= _LONGEST_CODE:
            yield Document(
                id=f"python-code/{name}:{node.name}:{first}",
                text=f"# {name}\n{body}\n",
                source="python-code",
                licence=SOURCES["python-code"].licence,
                language="code",
                category="python",
                department="",
            )


def topic_documents(drop: Drop, *, file: str | None = None) -> list[Document]:
    """Reads the language reference, long topics cut at paragraphs.

    Args:
        drop: receives topics that are not text.
        file: file to read instead of the running Python's `pydoc_data/topics.py`.

    Raises:
        UserError: the file does not exist or is not a literal table.
    """
    path = Path(file or Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py"))
    try:
        topics = literal(path.read_bytes(), "topics", str(path))
    except FileNotFoundError:
        raise UserError(
            f"{path}: this Python comes without its help topics; install them or another Python"
        ) from None
    documents = []
    for topic, text in sorted(topics.items()):
        if not isinstance(text, str):
            drop(f"python-docs/{topic}", "python-docs", "malformed record", f"{path}: not text", str(text))
            continue
        for part, piece in enumerate(_pieces(re.sub(r"\n[*=~\-^\"]{3,}\n", "\n", text), _LONGEST_TOPIC)):
            documents.append(
                Document(
                    id=f"python-docs/{topic}/{part:02d}",
                    text=piece,
                    source="python-docs",
                    licence=SOURCES["python-docs"].licence,
                    language="en",
                    category="programming",
                    department="",
                )
            )
    return documents


def _pieces(text: str, longest: int) -> Iterator[str]:
    """Yields runs of whole paragraphs of at most `longest` characters (one paragraph may be longer)."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > longest:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece.strip():
        yield piece

"""Short dialogues: YAML `conversations:`, a list of turns each."""

import yaml

from galenic.corpus.readers.bytes import decode
from galenic.corpus.starter.conversations import Dialogue
from galenic.runtime import UserError

TOPICS: tuple[str, ...] = (
    "ai",
    "coding",
    "computers",
    "conversations",
    "emotion",
    "food",
    "greetings",
    "history",
    "literature",
    "science",
    "sports",
    "tech_support",
    "trivia",
)
"""Topics that are read. Left out: gossip, humour, money, movies, politics, the bot's own profile, and `psychology`,
which answers insults."""


def dialogues(data: bytes, name: str, *, language: str, topic: str) -> list[Dialogue]:
    """Reads question-and-answer dialogues.

    Only `conversations` alternates between two speakers; in the other topics what follows the first answer is
    another answer to the same question, and is left out. A dialogue of fewer than two text turns is left out.

    Raises:
        UserError: the file is not YAML with a list `conversations`.
    """
    try:
        tree = yaml.load(decode(data, name), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{name}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    conversations = tree.get("conversations") if isinstance(tree, dict) else None
    if not isinstance(conversations, list):
        raise UserError(f"{name}: expected a list under the key 'conversations'")
    found = []
    for index, turns in enumerate(conversations):
        if not isinstance(turns, list) or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            continue
        length = len(turns) // 2 * 2 if topic == "conversations" else 2
        if len(turns) >= 2:
            key = f"{language}/{topic}/{index:04d}"
            kept = tuple(turn.strip() for turn in turns[:length])
            found.append(Dialogue(id=key, language=language, category=topic, turns=kept))
    return found

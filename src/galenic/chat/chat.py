"""The verb `chat`: talk to one model in the terminal, answers appear as they are written; or on a page (`web.py`).

On a terminal it reads questions at a prompt; from a pipe it reads one question a line and writes answers only.
Ctrl-C stops an answer, Ctrl-D ends the talk; a line that begins with / is a command.
"""

import sys
from pathlib import Path
from typing import Any

from galenic.chat.config import ChatConfig, Sampling
from galenic.chat.endpoint import Endpoint, Failed
from galenic.runtime import Plan, human_bytes, torch_setup, write_jsonl

NOTICE = "Answers come from a small language model. They are not medical advice."
CUT = "[cut off: the answer reached the most tokens it may have; --max_new_tokens sets them]"
HELP = """\
/system TEXT  replaces the system message; alone it shows it
/reset        forgets the conversation
/save FILE    writes the conversation as a line {"messages": [...]}
/help         prints this
/quit         ends the talk, as Ctrl-D does; Ctrl-C stops an answer"""


def plan(config: ChatConfig) -> Plan:
    """Checks that the folder holds a model; an address is not asked.

    Raises:
        UserError: it does not.
    """
    facts = {"notice": NOTICE}
    if config.url is None:
        from galenic.chat.local import weights

        size = sum(file.stat().st_size for file in weights(str(config.model)))
        facts = {"weights": human_bytes(size)} | facts
    return Plan(reads=config.reads(), writes=[], facts=facts)


def run(config: ChatConfig) -> None:
    """Answers questions until they end.

    Raises:
        UserError: the folder holds no model, or one that cannot be talked to; no server at the address.
    """
    if config.web:
        from galenic.chat import web

        web.run(config)
        return
    if config.url is not None:
        speaker = Endpoint(config.url, config.model, config.api_key_env)
    else:
        from galenic.chat.local import Local

        torch_setup(config.seed)
        speaker = Local(str(config.model))
    print(NOTICE, file=sys.stderr, flush=True)
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # input() then edits lines and remembers them

        _note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the talk")
    _Talk(speaker, config.sampling(), config.system).go_on(terminal)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


class _Talk:
    """A conversation and its commands."""

    def __init__(self, speaker: Any, sampling: Sampling, system: str | None) -> None:
        self.speaker, self.sampling, self.system = speaker, sampling, system
        self.saved: set[Path] = set()
        self.reset()

    def reset(self) -> None:
        self.history = [] if self.system is None else [{"role": "system", "content": self.system}]

    def go_on(self, terminal: bool) -> None:
        """Reads questions and commands until they end."""
        while (line := _ask(terminal)) is not None:
            if line.startswith("/"):
                if line == "/quit":
                    return
                self.command(line)
            elif line:
                self.turn(line)

    def turn(self, question: str) -> None:
        """Answers one question and adds both to the history."""
        self.history.append({"role": "user", "content": question})
        try:
            text, finish = self.speaker.answer(self.history, self.sampling, _write, _note)
        except Failed as error:
            self.history.pop()
            _note(f"[{error}]")
            return
        self.history.append({"role": "assistant", "content": text})
        if finish == "length":
            _note(CUT)

    def command(self, line: str) -> None:
        """Does what a line that begins with / says."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/reset" and not rest:
            self.reset()
        elif word == "/help" and not rest:
            _note(HELP)
        elif word == "/system" and not rest:
            _note(f"[system message: {self.system or 'none of yours: the chat format has its own'}]")
        elif word == "/system":
            self.system = rest
            turns = [message for message in self.history if message["role"] != "system"]
            self.history = [{"role": "system", "content": rest}, *turns]
        elif word == "/save" and rest:
            self.save(Path(rest).expanduser())
        else:
            _note(f"[{word} is no command of this form; /help lists them]")

    def save(self, path: Path) -> None:
        """Writes the conversation; a file that this talk did not write is left alone."""
        if not any(message["role"] == "assistant" for message in self.history):
            _note("[nothing to save: nothing was answered yet]")
        elif path.exists() and path.resolve() not in self.saved:
            _note(f"[{path} exists and is left alone; choose another name]")
        else:
            try:
                write_jsonl(path, [{"messages": self.history}])
            except OSError as error:
                _note(f"[{path}: {error.strerror or error}]")
            else:
                self.saved.add(path.resolve())
                _note(f"[saved {len(self.history)} messages as {path}]")


def _ask(terminal: bool) -> str | None:
    """Returns the next line without surrounding space; none at the end of the input."""
    if not terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""

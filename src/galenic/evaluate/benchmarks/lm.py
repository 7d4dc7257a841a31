"""Our scorer and sampler as a model of lm-evaluation-harness, so that any of its tasks runs on them.

lm-eval splits a prompt and an option into tokens as it does for its own `hf` model, so that the numbers are the same.
What differs is the work: the options of a question share their prompt, which is run once.

Needs `galenic[eval]`. Importing this module registers the model as `galenic`:

    from lm_eval import simple_evaluate  # pyrefly: ignore[missing-import]
    simple_evaluate(model=GalenicLM(model, tokenizer), tasks=["medqa_4options"])
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galenic.align.rollouts.sampling import end_tokens, ends_with, sample
from galenic.corpus.tokens.chat_format import BOS
from galenic.corpus.tokens.chat_template import is_ours
from galenic.evaluate import inputs
from galenic.evaluate.multiple_choice import Prompted, option_scores
from galenic.runtime import UserError, nearest

if TYPE_CHECKING:
    from .config import BenchmarksConfig

try:
    from lm_eval import simple_evaluate  # pyrefly: ignore[missing-import]
    from lm_eval.api.metrics import mean  # pyrefly: ignore[missing-import]
    from lm_eval.api.model import TemplateLM  # pyrefly: ignore[missing-import]
    from lm_eval.tasks import TaskManager  # pyrefly: ignore[missing-import]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyrefly: ignore[missing-import]
except ImportError as error:
    raise UserError(f"lm-eval's tasks need lm-eval: pip install 'galenic[eval]' ({error})") from None

Request = tuple[tuple[str, str], list[int], list[int]]


class GalenicLM(TemplateLM):
    """A loaded model, for lm-eval.

    Args:
        model: a Hugging Face causal language model with a cache.
        tokenizer: its own.
        batch_tokens: most tokens of one forward pass of the scorer.
        batch: texts written at a time.
        add_bos: whether texts begin with the tokenizer's first token. Default: for our tokenizer, whose documents
            begin with it; what another one does is left to itself.
        max_new_tokens: of a text whose task does not say.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_tokens: int = 2048,
        batch: int = 16,
        add_bos: bool | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.batch, self.max_new_tokens = batch_tokens, batch, max_new_tokens
        self.max_length = int(model.config.max_position_embeddings)
        ours = is_ours(tokenizer)
        self._first = [BOS] if ours and add_bos is not False else []
        self._special: dict[str, bool] = {} if ours or add_bos is None else {"add_special_tokens": add_bos}
        self._encoded = lru_cache(2)(self._encode)  # a context is asked for again with each of its options

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a prompt."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenizes a text; markers in it are taken for markers, as a chat template writes them."""
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return list(self._encoded(string))

    def _encode(self, string: str) -> list[int]:
        begins = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        if begins:
            return self.tokenizer.encode(string, add_special_tokens=False)
        return self._first + self.tokenizer.encode(string, **self._special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Writes a conversation in the model's chat format."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the chat template."""
        return self.tokenizer.chat_template or ""

    # ------------------------------------------------------------------------ likelihood

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Scores continuations; those of one context are run behind it together.

        A request that is too long loses its beginning, as with `hf`: the last `max_length` + 1 tokens stay.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(number)
        prompts, members = [], []
        for context, numbers in groups.items():
            longest = max(len(requests[number][2]) for number in numbers)
            fits = len(context) + longest <= self.max_length + 1
            for part in [numbers] if fits else [[number] for number in numbers]:
                rows = [(list(context) + requests[n][2])[-(self.max_length + 1) :] for n in part]
                prompts.append(Prompted.of(rows, [len(requests[n][2]) for n in part]))
                members.append(part)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        scores = option_scores(self.model, prompts, batch_tokens=self.batch_tokens)
        for part, values in zip(members, scores, strict=True):
            for number, value in zip(part, values, strict=True):
                found[number] = value
                self.cache_hook.add_partial("loglikelihood", requests[number][0], value)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts in windows of the model's length, each token once, as `hf` does."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            made = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in made]
            windows += [(("", ""), list(context), list(rest)) for context, rest in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # ------------------------------------------------------------------------ texts

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Writes the continuations of prompts, up to a stop string, which is left out.

        Raises:
            UserError: a task leaves no room for its prompts.
        """
        found = [""] * len(requests)
        ways: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            ways.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        for numbers in ways.values():
            for number, text in zip(numbers, self._write(requests, numbers), strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _write(self, requests: Any, numbers: list[int]) -> list[str]:
        settings = requests[numbers[0]].args[1]
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        most = int(settings.get("max_gen_toks", self.max_new_tokens))
        room = self.max_length - most
        if room < 1:
            raise UserError(
                f"a task asks for {most} new tokens (max_gen_toks); the model reads {self.max_length} in all"
            )
        sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
        stops = [ends_with(self.tokenizer, text) for text in until]
        rollouts = sample(
            self.model,
            [self.tok_encode(requests[number].args[0])[-room:] for number in numbers],
            keys=[(number,) for number in numbers],
            max_new_tokens=most,
            end=self._ends(),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            stop=(lambda ids: any(stop(ids) for stop in stops)) if stops else None,
            batch=self.batch,
        )
        texts = [self.tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout in rollouts]
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    def _ends(self) -> set[int]:
        try:
            return set(end_tokens(self.tokenizer, self.model))
        except UserError:  # no chat template: texts end where documents do
            return {self.eot_token_id}


# ---------------------------------------------------------------------------- tasks


def run_tasks(
    config: "BenchmarksConfig", model: Any, tokenizer: Any
) -> Mapping[str, tuple[str, list[dict[str, Any]]]]:
    """Runs lm-eval's tasks on a model.

    Returns:
        Task -> (its first metric, one line an item, as `benchmarks.scored` makes them).

    Raises:
        UserError: a task is unknown, cannot load its data, or does not score its items one by one.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if config.task_folder is not None:
        inputs.folder(config.task_folder, "benchmarks.task_folder")
    manager = TaskManager(include_path=config.task_folder)
    for name in config.tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise UserError(
                f"benchmarks.tasks: lm-eval has no task '{name}'{nearest(name, manager.all_tasks)}"
            )
    try:
        tasks = manager.load(list(config.tasks))["tasks"]
    except UserError:
        raise
    except Exception as error:  # of many kinds: no network, no such data set
        said = " ".join(str(error).split())[:300]
        raise UserError(f"benchmarks.tasks: {', '.join(config.tasks)} cannot be loaded ({said})") from None
    metrics = {name: _metric(name, task) for name, task in tasks.items()}
    chosen = {}
    for name, task in tasks.items():
        count = len(task.eval_docs)
        if not count:
            raise UserError(f"benchmarks.tasks: {name} has no items")
        places = list(range(count))
        chosen[name] = inputs.sample(places, list(map(str, places)), config.samples, config.seed)
    results = simple_evaluate(
        model=GalenicLM(model, tokenizer),
        tasks=list(tasks.values()),
        num_fewshot=config.fewshot,
        samples=chosen,
        task_manager=manager,
        apply_chat_template=config.prompt == "chat",
        system_instruction=config.system,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    return {name: (metrics[name], _lines(name, metrics[name], results["samples"][name])) for name in tasks}


def _metric(name: str, task: Any) -> str:
    """Returns a task's first metric.

    Raises:
        UserError: it is no mean over items, so no interval could be given.
    """
    ways = task.aggregation()
    first = next(iter(ways))
    if ways[first] is not mean:
        raise UserError(
            f"benchmarks.tasks: {name} has no score for each item (its first metric, {first}, is not their mean); "
            "such a number has no interval here"
        )
    return first


def _lines(name: str, metric: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    first = samples[0].get("filter", "none")
    lines = []
    for sample_ in samples:
        if sample_.get("filter", "none") != first:
            continue
        right = float(sample_[metric])
        if not 0 <= right <= 1:
            raise UserError(
                f"benchmarks.tasks: {name} scores {right:g} by {metric}, which is not between 0 and 1"
            )
        lines.append(
            {
                "kind": name,
                "id": str(sample_["doc_id"]),
                "right": right,
                "answer": str(sample_["target"]),
                "said": sample_["filtered_resps"],
            }
        )
    return sorted(lines, key=lambda line: int(line["id"]))

"""What the tests of PPO share: answers, tasks and a reward; and what each process of several runs."""

from align_helpers import WORDS
from galenic.align.rollouts.experience import Answer

TASKS = [{"prompt": f"What follows {word}?", "answer": "a"} for word in WORDS[:8]]


def make_answer(prompt=(5, 6), length=2, **changes):
    values = {
        "question": "q",
        "ids": [*prompt, *range(10, 10 + length)],
        "prompt": len(prompt),
        "ended": True,
        "reward": 1.0,
        "log_probs": [-1.0] * length,
        "log_ratios": [0.0] * length,
        "values": [0.0] * length,
        "stale": (0.0, 0),
    }
    return Answer(**{**values, **changes})


class Letters:
    """A reward that each token changes a little: the share of early letters."""

    def __init__(self, *_, **__):
        pass

    def ready(self, tasks):
        pass

    def readable(self, tasks, texts):
        return [True] * len(texts)

    def __call__(self, tasks, texts, ended):
        assert len(tasks) == len(texts) == len(ended)
        return [sum(letter in "abcdefgh" for letter in text) / max(1, len(text)) for text in texts]


def main(words):
    """The command line with this reward."""
    from galenic import cli
    from galenic.align.rewards import rewards

    rewards.Rewards = Letters
    return cli.main(words)

"""How rule and reward model are combined, and what is refused."""

import math

import pytest

from galenic.align.config import RewardsConfig
from galenic.align.data.tasks import Task, task_of
from galenic.align.rewards import Rewards
from galenic.runtime import UserError


class Scores:
    """A reward model that scores an answer by its length."""

    def __init__(self, value=None):
        self.value, self.asked = value, []

    def score(self, conversations):
        self.asked.append(conversations)
        return [len(c[-1]["content"]) if self.value is None else self.value for c in conversations]

    def refusal(self, messages):
        return "it holds <|end|>" if any("<|end|>" in message["content"] for message in messages) else ""


def task(name="t", **row):
    return task_of({"prompt": "Which?", "id": name, **row}, name)


def test_a_rule_where_there_is_one_else_the_model():
    model = Scores()
    rewards = Rewards(RewardsConfig(), model=model)
    tasks = [task(answer="aspirin"), task(), task(answer="aspirin")]
    assert rewards(tasks, ["aspirin", "abc", "other"], [True] * 3) == [1.0, 3.0, 0.0]
    assert model.asked == [[[{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "abc"}]]]


def test_weights_by_domain():
    config = RewardsConfig(
        weights={"math": {"rule": 2.0}, "care": {"rule": 1.0, "model": 0.5}, "*": {"model": 0.1, "rule": 0}}
    )
    rewards = Rewards(config, model=Scores())
    tasks = [task(answer="aspirin", domain=domain) for domain in ("math", "care", "else")]
    rewards.ready(tasks)
    assert rewards(tasks, ["aspirin"] * 3, [True] * 3) == pytest.approx([2.0, 1 + 3.5, 0.7])
    assert rewards(tasks, ["no"] * 3, [True] * 3) == pytest.approx([0.0, 1.0, 0.2])


def test_an_answer_that_did_not_end_is_cut_off():
    model = Scores()
    rewards = Rewards(RewardsConfig(cut_off=-1.0), model=model)
    assert rewards([task(answer="a b"), task()], ["a b", "x"], [False, False]) == [-1.0, -1.0]
    assert not model.asked, "nothing is scored that does not count"


def test_an_answer_that_the_reward_model_cannot_be_shown_is_cut_off_too():
    model = Scores()
    rewards = Rewards(RewardsConfig(cut_off=-1.0, weights={"both": {"rule": 1, "model": 1}}), model=model)
    tasks = [task(), task(answer="a"), task(answer="a<|end|>"), task(answer="a", domain="both"), task()]
    texts = ["b<|end|>", "a", "a<|end|>", "a<|end|>", "bcd"]
    assert rewards(tasks, texts, [True] * 5) == [-1.0, 1.0, 1.0, -1.0, 3.0]
    assert rewards.readable(tasks, texts) == [False, True, True, False, True], "a rule alone reads anything"
    assert [c[-1]["content"] for asked in model.asked for c in asked] == ["bcd"]
    with pytest.raises(
        UserError, match=r"task t: cannot be shown to the reward model \(it holds <\|end\|>\)"
    ):
        rewards.ready([task(), task(prompt="Is <|end|> a word?")])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_names_its_task(value):
    rewards = Rewards(RewardsConfig(model="there"), model=Scores(value))
    with pytest.raises(UserError, match=r"task third: the model rewards .*there"):
        rewards([task(answer="a"), task(answer="b"), task("third")], ["a", "b", "c"], [True] * 3)


def test_tasks_that_cannot_be_rewarded_are_refused_before_the_run():
    with pytest.raises(UserError, match=r"task t has no rule .* rewards\.model"):
        Rewards(RewardsConfig()).ready([task()])
    with pytest.raises(UserError, match="counts its rule"):
        Rewards(RewardsConfig(weights={"*": {"rule": 1.0}}), model=Scores()).ready([task()])
    with pytest.raises(UserError, match="nothing counts in domain 'math'"):
        Rewards(RewardsConfig(weights={"math": {"rule": 0.0}})).ready([task(domain="math", answer="a")])
    with pytest.raises(UserError, match="does not pass its rule 'numeric'"):
        Rewards(RewardsConfig()).ready([task(answer="many", rule="numeric")])
    with pytest.raises(UserError, match=r"rewards\.model: is named, but no task's reward looks at it"):
        Rewards(RewardsConfig(model="there")).ready([task(answer="a")])


def test_code_among_other_tasks():
    rewards = Rewards(RewardsConfig(code_seconds=1))
    tasks = [task(tests="assert f(2) == 4"), task(answer="a"), task(tests="assert f(2) == 4")]
    rewards.ready(tasks)
    texts = ["```python\ndef f(x):\n    return x * x\n```", "a", "def f(x): return x"]
    assert rewards(tasks, texts, [True] * 3) == [1.0, 1.0, 0.0]


def test_options_as_they_are_shown():
    asked = Task(
        id="t",
        messages=[],
        answer="ibuprofen",
        options=("aspirin", "ibuprofen"),
        rule="option",
        domain="drugs",
    )
    rewards = Rewards(RewardsConfig())
    assert rewards([asked] * 3, ["Answer: ibuprofen", "Answer: B", "A"], [True] * 3) == [1.0, 1.0, 0.0]

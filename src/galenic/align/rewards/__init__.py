"""What an answer is worth: rules where the right answer is known, a model where it is not.

    task + answer --rules.check--> 0 or 1   --+
                  --reward model-> score    --+--weights of the task's domain--> reward --> ppo
                  --judge--------> 0 ... 1  --+

`rules.py` compares texts, options, diagnoses and numbers (`units.py`); code is run against its tests in a process that
can touch nothing (`sandbox.py`, `jail.py`); a judge is a model behind an endpoint (`judge.py`). Baichuan-M1 report,
section 5.2.1. No torch here but in the reward model.
"""

from galenic.align.rewards.rewards import Rewards
from galenic.align.rewards.rules import check
from galenic.align.rewards.sandbox import Verdict, run_tests

__all__ = ["Rewards", "Verdict", "check", "run_tests"]

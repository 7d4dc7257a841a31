"""A worker of a cluster is killed in its unit: python ray_killed.py ADDRESS prints what the engine says."""

import os
import signal
import sys

from galenic.corpus.engine import map_units
from galenic.runtime import UserError


def work(unit):
    if unit["number"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


if __name__ == "__main__":
    try:
        list(map_units(work, [{"number": n} for n in range(4)], workers=2, address=sys.argv[1]))
    except UserError as error:
        print(error)

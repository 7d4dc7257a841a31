"""A worker of a cluster is killed in its unit, once; prints the units that were done.

python ray_killed.py ADDRESS FOLDER
"""

import os
import signal
import sys
from pathlib import Path

from galenic.corpus.engine import map_units


def work(unit):
    mark = Path(unit["folder"], "killed")
    if unit["number"] == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


if __name__ == "__main__":
    units = [{"number": n, "folder": sys.argv[2]} for n in range(4)]
    print(sorted(unit["number"] for unit in map_units(work, units, workers=2, address=sys.argv[1])))

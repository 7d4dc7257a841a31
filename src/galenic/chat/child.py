"""`transformers serve` as a child that never outlives its parent: `python -m galenic.chat.child FOLDER [options]`.

The parent holds the other end of our standard input. However it dies, the system closes that end, and we leave.
"""

import os
import sys
import threading


def main(arguments: list[str]) -> None:
    """Serves until the input ends; see `galenic.model.serve`."""
    threading.Thread(target=_leave_at_the_end, daemon=True).start()
    from galenic.model.serve import main as serve

    serve(arguments)


def _leave_at_the_end() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

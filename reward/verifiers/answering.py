"""`python -m reward.verifiers.answering MODULE`: the process behind `reward.verifiers.aside`, which starts it.

A line of JSON in, [seconds, question]; a line out: {"answer": …}, {"problem": …} or {"stopped": true}.
"""

import faulthandler
import importlib
import json
import logging
import os
import resource
import sys

MEMORY = 4 * 2**30  # bytes of address space; sympy would take all there are for 10^{10^{10}}


def main() -> None:
    """Answer questions until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    module = importlib.import_module(f"reward.verifiers.{sys.argv[1]}")
    module.prepare()
    nowhere = open(os.devnull, "w")  # noqa: SIM115  # as long as the process
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, question = json.loads(line)
        # Who asks kills this process in time; if he is gone himself, it ends by itself.
        faulthandler.dump_traceback_later(2 * seconds + 1, exit=True, file=nowhere)
        try:
            found = {"answer": module.reply(**question)}
        except (MemoryError, RecursionError):
            found = {"stopped": True}
        except Exception as error:
            found = {"problem": f"{type(error).__name__}: {error}"}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

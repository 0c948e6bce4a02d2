"""`python -m align +experiment=NAME [overrides]`: train, evaluate, compare, report."""

import signal
from typing import Any

from conf.entry import entry
from conf.schema import Align
from reward import network


@entry("align", Align)
def main(config: Align, overrides: list[str]) -> float | None:
    """Run one experiment."""
    if config.offline:
        network.close()
    from align.run import run

    signal.signal(signal.SIGTERM, _as_interrupt)
    return run(config, overrides)


def _as_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

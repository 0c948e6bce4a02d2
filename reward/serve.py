"""`python -m reward.serve model.path=…`: a reward model behind HTTP, for programs on this machine or on others."""

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.entry import UserError, entry
from conf.schema import Serving
from reward.chat import key_of

if TYPE_CHECKING:
    from reward.model import RewardModel

_log = logging.getLogger(__name__)
_GRACE = 5.0  # seconds that the last batch may outlast the last request
_LOCAL = ("127.0.0.1", "::1", "localhost")


def check_serving(config: Serving) -> None:
    """Check what can be checked without loading anything.

    Raises:
        UserError: naming the key.
    """
    wrong = []
    for name in ("max_body_bytes", "max_rows", "max_queue"):
        if (count := getattr(config, name)) < 1:
            wrong.append(f"{name}={count} must be at least 1")
    if config.model.batch_tokens < 1:
        wrong.append(f"model.batch_tokens={config.model.batch_tokens} must be at least 1")
    if not 0 < config.timeout < 1e6:
        wrong.append(f"timeout={config.timeout:g} must be a number of seconds above 0")
    if not 0 <= config.max_wait_ms < 1e6:
        wrong.append(
            f"max_wait_ms={config.max_wait_ms:g} must be a number of milliseconds, 0 or more"
        )
    if not 0 <= config.port <= 65535:
        wrong.append(f"port={config.port} must lie between 0 (any free one) and 65535")
    if config.max_queue < config.max_rows:
        wrong.append(
            f"max_queue={config.max_queue} has no room for one request of max_rows={config.max_rows}"
        )
    if config.model.path.startswith(("http://", "https://")):
        wrong.append("model.path is a server itself: give the folder or hub id that it has")
    if wrong:
        raise UserError("\n       ".join(wrong))


def serve(config: Serving) -> None:
    """Load the model and answer requests until SIGTERM or SIGINT; what is in flight then is finished.

    Raises:
        UserError: when a limit makes no sense, the address cannot be used, or there is no such model.
    """
    check_serving(config)
    key = key_of(config.api_key_env, "api_key_env")
    listener = _listen(config.host, config.port)

    import uvicorn

    from reward.server.app import make_app
    from reward.server.batcher import Batcher
    from reward.server.meters import Meters

    identity: dict[str, Any] = {}

    def load() -> "RewardModel":
        model = _load(config)
        identity.update(_identity(config, model))
        _log.info("ready: %s, weights %s", identity["name"], identity["weights"])
        return model

    def stop_unless_loaded() -> None:
        if not identity:
            server.should_exit = True

    meters = Meters()
    batcher = Batcher(
        load,
        batch_tokens=config.model.batch_tokens,
        max_wait=config.max_wait_ms / 1000,
        max_queue=config.max_queue,
        meters=meters,
        on_end=stop_unless_loaded,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(config, key, batcher, meters, lambda: identity),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(config.timeout) + 1,
        )
    )

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # uvicorn takes them, and gives them back afterwards
    host, port = listener.getsockname()[:2]
    _log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    if config.host not in _LOCAL and not key:
        _log.warning("anyone who reaches %s may use it: set api_key_env", config.host)
    batcher.start()
    server.run(sockets=[listener])
    is_stopped = batcher.close(_GRACE)
    if batcher.error is not None and not identity:
        raise batcher.error
    _log.info("stopped")
    if not is_stopped:  # the interpreter would wait for, or crash on, a thread inside the model
        _leave()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        advice = "choose another port, or 0 for any free one"
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror}; {advice}"
        ) from error


def _load(config: Serving) -> "RewardModel":
    from transformers.utils import logging as transformers_logging

    from reward.model import RewardModel

    transformers_logging.set_verbosity_error()  # a row that is too long is no news
    transformers_logging.disable_progress_bar()
    scorer = config.model
    return RewardModel.load(
        scorer.path,
        revision=scorer.revision,
        dtype=scorer.dtype.value,
        max_length=scorer.max_length,
    )


def _identity(config: Serving, model: "RewardModel") -> dict[str, Any]:
    """Which model it is, without where it is kept."""
    folder = Path(os.path.expanduser(config.model.path))
    return {
        "name": folder.resolve().name if folder.is_dir() else config.model.path,
        "weights": model.identity,
        "dtype": config.model.dtype.value,
        "max_length": model.max_length,
    }


def _leave() -> None:
    import os

    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


@entry("serve", Serving)
def main(config: Serving, overrides: list[str]) -> float | None:
    """Serve until a signal."""
    del overrides
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, stream=sys.stderr)
    logging.getLogger("reward").setLevel(logging.INFO)
    _log.setLevel(logging.INFO)  # as a program its name is __main__
    serve(config)
    return None


if __name__ == "__main__":
    main()

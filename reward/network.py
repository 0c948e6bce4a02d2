"""`offline=true`: no connection leaves this machine, in this process and in the workers that it starts.

Two walls. The switches of the libraries, so that they look into their caches instead of trying; and an audit hook on
sockets (PEP 578), so that whatever tries all the same fails at once, by name, instead of after a minute of retries.
"""

import ipaddress
import os
import socket
import ssl
import sys
import urllib.error
import urllib.request
from types import FrameType
from typing import Any

from conf.entry import UserError

# Read by the libraries when they are imported: set before.
SWITCHES = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
}
_INHERITED = "ALIGN_OFFLINE"  # tells the processes started from this one

# Modules that connect on behalf of others; the one that asked them is named.
_PLUMBING = {
    "aiohttp", "anyio", "asyncio", "fsspec", "h11", "http", "httpcore", "httpx", "requests", "reward", "socket", "ssl",
    "urllib", "urllib3",
}  # fmt: skip
_IN_USE = False


def close() -> None:
    """Allow connections to this machine only, from now on and for good.

    Raises in the place of a connection or a look-up of a name:
        UserError: naming who tried, what, and the fix.
    """
    global _IN_USE
    if os.environ.get("WANDB_MODE") == "disabled":
        os.environ.update(SWITCHES | {"WANDB_MODE": "disabled"})
    else:
        os.environ.update(SWITCHES)
    os.environ[_INHERITED] = "1"
    for name in ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy"):
        for variable in (name, name.upper()):  # one on this machine would carry requests out
            os.environ.pop(variable, None)
    if not _IN_USE:
        _IN_USE = True
        sys.addaudithook(_refuse)


def inherit() -> None:
    """In a worker: as the process that started it."""
    if os.environ.get(_INHERITED):
        close()


def is_closed() -> bool:
    """Whether this process may connect to this machine only."""
    return _IN_USE


def hub() -> str:
    """The address of the model hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_trouble(seconds: float = 5.0) -> str | None:
    """Why the hub does not answer, asked once; None when anything answers, with whatever status.

    The hub's clients ask again and again, for most of a minute, before they say it.
    """
    try:
        urllib.request.urlopen(
            urllib.request.Request(hub(), method="HEAD"), timeout=seconds
        ).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # The clients bring certificates of their own.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook. Called for every event of the interpreter, so it leaves the others at once."""
    if not event.startswith("socket."):
        return
    host = _target(event, arguments)
    if host is None or _is_here(host):
        return
    raise UserError(
        f"offline=true, but {_asker(sys._getframe(1))} tried to reach {host}. Bring what is missing into the local "
        "caches first, where there is a network: python -m evals.prefetch with the same model and suite"
    )


def _target(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The host that a socket operation is about; None for all that stays on this machine by its kind."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        connection, address = arguments[0], arguments[1]
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or not address:
            return None
        return str(address[0])
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
        return host.decode() if isinstance(host, bytes) else host
    if event == "socket.getnameinfo":
        return str(arguments[0][0])
    return None


def _is_here(host: str) -> bool:
    if host in ("", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _asker(frame: FrameType | None) -> str:
    """The module that wanted the connection, below those that make connections for others."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.split(".")[0] not in _PLUMBING:
            return name
        frame = frame.f_back
    return "something"

"""Questions to a chat model behind an OpenAI-compatible endpoint, with patience for a busy one.

What the endpoint must know: `POST {url}/v1/chat/completions` with `model` and `messages`, as in
https://platform.openai.com/docs/api-reference/chat. The key is sent and never shown.
"""

import asyncio
import os
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conf.entry import UserError
from reward.turns import Message

if TYPE_CHECKING:
    import httpx

_PATH = "/chat/completions"
_LONGEST_PAUSE = 60.0  # seconds
_CHANCE = random.SystemRandom()  # the generator of `random` is left as its user has seeded it
_SHOWN = 200  # characters of what a server says
# Statuses that no other request would escape, with what to do about them.
_HOPELESS = {
    401: "it does not accept the key: put it in a variable and name that with --api-key-env",
    403: "the key may not use this model: check --model, and the key in --api-key-env's variable",
    404: "check --endpoint (up to /v1) and --model",
}


class NoAnswer(Exception):
    """The endpoint did not answer this question; it may answer another one."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    Args:
        url: up to `/v1`, which may be left out.
        model: the model's name there.
        key: the API key, if the endpoint asks for one.
        timeout: seconds to wait for a connection, and for each part of a reply.
        retries: further attempts after 429, 5xx, a failed connection or a timeout.
        pause: seconds before the first of them, doubled each time; `Retry-After` may ask for more.
        is_json_asked: whether the request sets `response_format`, which some servers do not know.
        temperature: of the reply, None for the server's own.
        on_retry: called before each further attempt.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 5
    pause: float = 1.0
    is_json_asked: bool = True
    temperature: float | None = None
    on_retry: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """The whole address of the chat completions."""
        base = self.url.rstrip("/").removesuffix(_PATH)
        return base + (_PATH if re.search(r"/v\d+\w*$", base) else f"/v1{_PATH}")

    def client(self) -> "httpx.AsyncClient":
        """A client with its headers and timeouts."""
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.AsyncClient(headers=headers, timeout=self.timeout)

    async def ask(self, client: "httpx.AsyncClient", messages: list[Message]) -> str:
        """The text of the model's reply; empty if the reply holds none.

        Raises:
            NoAnswer: when every attempt failed, or the endpoint refused this request.
            UserError: when it would refuse any request.
        """
        import httpx

        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.is_json_asked:
            body["response_format"] = {"type": "json_object"}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        for attempt in range(self.retries + 1):
            wanted = 0.0
            try:
                reply = await client.post(self.address, json=body)
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            else:
                if reply.is_success:
                    return _content(reply)
                reason = self._reason(reply)
                if reply.status_code in _HOPELESS:
                    advice = _HOPELESS[reply.status_code]
                    raise UserError(f"the endpoint {self._shown()} answered {reason}; {advice}")
                if reply.status_code != 429 and reply.status_code < 500:
                    raise NoAnswer(reason)
                wanted = retry_after(reply.headers)
            if attempt < self.retries:
                if self.on_retry:
                    self.on_retry()
                await asyncio.sleep(seconds_before(attempt, self.pause, wanted))
        raise NoAnswer(f"{reason} (attempts: {self.retries + 1})")

    def _reason(self, reply: "httpx.Response") -> str:
        """Status and the server's words, in which it may repeat the key."""
        text = " ".join(reply.text.split())
        text = text.replace(self.key, "[key]") if self.key else text
        return f"{reply.status_code}: {text[:_SHOWN]}" if text else str(reply.status_code)

    def _shown(self) -> str:
        """The address without a password in it."""
        return re.sub(r"//[^/@]*@", "//", self.address)


def _content(reply: "httpx.Response") -> str:
    try:
        content = reply.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):  # a proxy's page, or an error sent with 200
        return ""
    return content if isinstance(content, str) else ""


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait. It may also name a date, which is left to the pause."""
    value = headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else 0.0


def seconds_before(attempt: int, pause: float, wanted: float) -> float:
    """Seconds before a further attempt: `pause`, doubled each time, give or take a half; at least what is `wanted`."""
    doubled: float = pause * 2**attempt
    return min(_LONGEST_PAUSE, max(doubled * _CHANCE.uniform(0.5, 1.5), wanted))


def key_of(variable: str | None, option: str = "--api-key-env") -> str | None:
    """The API key in an environment variable; None if no variable is named.

    Args:
        variable: the variable's name.
        option: what names it, for messages.

    Raises:
        UserError: if there is none, or it cannot be a key. The message never holds it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{option} {variable}: the environment has no such variable, or it is empty"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{option} {variable}: its value has spaces or characters no key has")
    return key


def check_url(url: str) -> str:
    """The address of an endpoint, if it is one.

    Raises:
        UserError: with what it should look like.
    """
    import httpx

    try:
        parts = httpx.URL(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.host)
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise UserError(
            f"--endpoint {url!r} must be an address such as http://127.0.0.1:8000/v1 or "
            "https://api.openai.com/v1"
        )
    return url

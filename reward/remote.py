"""A reward model on another machine, behind `python -m reward.serve`, with the interface of one on this."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import orjson

from conf.entry import UserError
from reward.chat import retry_after, seconds_before
from reward.turns import Message

API_KEY = "ALIGN_REWARD_API_KEY"  # environment variable from which commands read the key
_SPARE = 30.0  # seconds beyond its own limit in which a server says that it had too little time
_SHOWN = 200  # characters of what a server says
_BUSY = {408, 429, 502, 503}  # it may answer the same request later
_TOO_SLOW = 504  # it may answer a smaller one
_FRAME = len(b'{"rows":[]}')


class RemoteModel:
    """A reward model behind HTTP.

    `identity` names its weights; `model` is what the server says of it; `max_length` is in tokens.

    Args:
        url: `http(s)://HOST:PORT` of the server.
        key: the API key, if it asks for one.
        expected: the identity that it must have; None for the one that it has now. A server that is started again with
            other weights is refused either way.
        timeout: seconds to wait for a connection and for `/info`. For scores it waits as long as the server may take.
        retries: further attempts after 503 or a lost connection.
        pause: seconds before the first of them, doubled each time; `Retry-After` may ask for more.
        rows: of a request, as far as the server allows.
        connections: requests under way at the same time, so that the server never waits for the next.

    Raises:
        UserError: when there is no such server, or it has another model.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        expected: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        pause: float = 1.0,
        rows: int = 64,
        connections: int = 4,
    ) -> None:
        self._base = _checked(url)
        self._key = key
        self._retries = retries
        self._pause = pause
        self._connections = connections
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout)
        try:
            self._meet(rows, expected)
        except BaseException:
            self.close()
            raise

    def _meet(self, rows: int, expected: str | None) -> None:
        """Learn which model it is, and what it takes."""
        about = self._answer("GET", "/info", None)
        try:
            limits, self.model = about["limits"], dict(about["model"])
            self._rows = min(rows, int(limits["max_rows"]))
            self._bytes = int(limits["max_body_bytes"])
            patience = float(limits["timeout"]) + _SPARE
            self.identity = str(self.model["weights"])
            self.max_length: int | None = self.model["max_length"]
        except (LookupError, TypeError, ValueError) as error:
            raise self._rubbish("/info says no model and limits") from error
        self._client.timeout = httpx.Timeout(self._client.timeout.connect, read=patience)
        if expected is not None and self.identity != expected:
            raise UserError(f"{self._shown} has the weights {self.identity}, expected {expected}")

    def score(
        self,
        prompts: Sequence[list[Message]],
        completions: Sequence[list[Message]],
        tools: Sequence[list[Any] | None] | None = None,
    ) -> list[float]:
        """Rewards as `reward.model.RewardModel.score` gives them: NaN for a conversation that is too long.

        Raises:
            UserError: when the server cannot be reached, refuses a row, or has another model by now.
        """
        offered = tools or [None] * len(prompts)
        rows = zip(prompts, completions, offered, strict=True)
        bodies = [_encoded(place, *row) for place, row in enumerate(rows)]
        scores = [math.nan] * len(bodies)
        chunks = list(self._chunks(bodies))
        with ThreadPoolExecutor(self._connections) as pool:
            try:
                for places, found in zip(
                    chunks, pool.map(lambda chunk: self._ask(bodies, chunk), chunks), strict=True
                ):
                    for place, score in zip(places, found, strict=True):
                        scores[place] = score
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return scores

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _chunks(self, bodies: list[bytes]) -> Iterator[list[int]]:
        """Places of the rows of each request. Rows of one length are together, which saves padding."""
        chunk: list[int] = []
        size = _FRAME
        for place in sorted(range(len(bodies)), key=lambda place: -len(bodies[place])):
            length = len(bodies[place]) + 1  # with its comma
            if _FRAME + length > self._bytes:
                raise UserError(
                    f"row {place + 1} has {length} bytes, and {self._shown} takes {self._bytes}: "
                    "start it with a larger max_body_bytes, or leave the row out"
                )
            if len(chunk) == self._rows or size + length > self._bytes:
                yield chunk
                chunk, size = [], _FRAME
            chunk.append(place)
            size += length
        if chunk:
            yield chunk

    def _ask(self, bodies: list[bytes], places: list[int]) -> list[float]:
        """The scores of the rows of one request; in halves if they take the server too long."""
        body = b'{"rows":[' + b",".join(bodies[place] for place in places) + b"]}"
        try:
            reply = self._answer("POST", "/score", body)
        except _TooSlow as error:
            if len(places) == 1:
                raise UserError(
                    f"{self._shown} had no score for row {places[0] + 1} in time ({error}): "
                    "it is overloaded, or its timeout is too short"
                ) from error
            half = len(places) // 2
            return self._ask(bodies, places[:half]) + self._ask(bodies, places[half:])
        except _Refused as error:
            reason = re.sub(
                r"rows\[(\d+)\]",
                lambda found: f"row {places[int(found[1])] + 1}",
                str(error),
                count=1,
            )
            raise UserError(f"{self._shown} refused: {reason}") from error
        return self._scores(reply, len(places))

    def _scores(self, reply: dict[str, Any], count: int) -> list[float]:
        model, scores = reply.get("model"), reply.get("scores")
        if not isinstance(model, dict) or not isinstance(scores, list) or len(scores) != count:
            raise self._rubbish(f"its answer does not hold {count} scores")
        if model.get("weights") != self.identity or model.get("max_length") != self.max_length:
            raise UserError(
                f"{self._shown} has another model by now: {model.get('weights')}, max_length "
                f"{model.get('max_length')}; it was {self.identity}, max_length {self.max_length}"
            )
        if not all(score is None or type(score) in (int, float) for score in scores):
            raise self._rubbish("not every score is a number or null")
        return [math.nan if score is None else float(score) for score in scores]

    def _answer(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        """The JSON object of a reply, after as many attempts as it takes.

        Raises:
            _Refused: when the server will not score these rows.
            _TooSlow: when it had no time for so many.
            UserError: when no request would have an answer.
        """
        headers = {"Content-Type": "application/json"}
        for attempt in range(self._retries + 1):
            wanted = 0.0
            try:
                reply = self._client.request(
                    method, self._base + path, content=body, headers=headers
                )
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}".removesuffix(": ")
                if body is not None and isinstance(error, httpx.ReadTimeout):
                    raise _TooSlow(reason) from error
                if body is None and isinstance(error, httpx.ConnectError):
                    break  # a wrong address is the likelier reason at the first contact
            else:
                if reply.status_code not in _BUSY:
                    return self._object(reply)
                reason = self._reason(reply)
                wanted = retry_after(reply.headers)
            if attempt < self._retries:
                time.sleep(seconds_before(attempt, self._pause, wanted))
        raise UserError(
            f"the reward model at {self._shown} cannot be reached: {reason} (attempts: {attempt + 1}); "
            "is `python -m reward.serve` running there?"
        )

    def _object(self, reply: httpx.Response) -> dict[str, Any]:
        status, reason = reply.status_code, self._reason(reply)
        if status == 401:
            raise UserError(
                f"{self._shown} does not accept the key: give the one that it was started with (a command reads it "
                f"from the environment variable {API_KEY})"
            )
        if status == _TOO_SLOW:
            raise _TooSlow(reason)
        if status in (400, 413, 422, 500):
            raise _Refused(reason)
        try:
            found = reply.json()
        except ValueError:
            found = None
        if status != 200 or not isinstance(found, dict):
            raise self._rubbish(f"it answered {status}: {reason}")
        return found

    def _reason(self, reply: httpx.Response) -> str:
        """The server's words, in which it may repeat the key."""
        try:
            text = str(reply.json()["error"])
        except (ValueError, LookupError, TypeError):
            text = reply.text
        text = " ".join(text.split())
        return (text.replace(self._key, "[key]") if self._key else text)[:_SHOWN]

    def _rubbish(self, why: str) -> UserError:
        return UserError(f"{self._shown} does not answer as `python -m reward.serve` does: {why}")

    @property
    def _shown(self) -> str:
        """The address without a password in it."""
        return re.sub(r"//[^/@]*@", "//", self._base)


class _Refused(Exception):
    """The server will not, or cannot, score these rows."""


class _TooSlow(Exception):
    """The server ran out of time."""


def _checked(url: str) -> str:
    try:
        parts = httpx.URL(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.host)
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise UserError(f"{url!r} must be an address such as http://127.0.0.1:8700")
    return url.rstrip("/")


def _encoded(
    place: int, prompt: list[Message], completion: list[Message], tools: list[Any] | None
) -> bytes:
    row = {"prompt": prompt, "completion": completion} | ({"tools": tools} if tools else {})
    try:
        return orjson.dumps(row)
    except (TypeError, ValueError) as error:  # half a surrogate pair, or no value of JSON's
        raise UserError(f"row {place + 1} cannot be sent as JSON: {error}") from error

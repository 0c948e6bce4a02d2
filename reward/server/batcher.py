"""Rows of many requests, scored together by the one thread that owns the model."""

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Protocol

from jinja2 import TemplateError

from reward.server.meters import Meters
from reward.server.rows import Row
from reward.turns import Message

_log = logging.getLogger(__name__)


class Model(Protocol):
    """What is asked of a reward model; `reward.model.RewardModel` has it."""

    max_length: int | None

    def tokenize(
        self, prompt: list[Message], completion: list[Message], tools: list[object] | None = None
    ) -> list[int]: ...

    def score_tokens(self, rows: list[list[int]]) -> list[float]: ...


class Full(Exception):
    """There is no room for these rows now."""


class NotReady(Exception):
    """The model is loading, has failed, or is being put away."""


class RowError(Exception):
    """A row that has no score; the text is the reason, for its author.

    Args:
        place: the row's number in its request, from 0.
        reason: without file names or text of other rows.
        is_senders: whether another row would have had a score.
    """

    def __init__(self, place: int, reason: str, is_senders: bool) -> None:
        super().__init__(f"rows[{place}]: {reason}")
        self.is_senders = is_senders


@dataclass(eq=False)
class _Request:
    scores: list[float]
    left: int  # rows without a score
    future: Future[list[float]] = field(default_factory=Future)

    def settle(self, place: int, score: float) -> None:
        self.scores[place] = score
        self.left -= 1
        if not self.left:
            with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
                self.future.set_result(self.scores)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(eq=False)
class _Item:
    row: Row
    place: int
    request: _Request
    since: float  # time.monotonic()
    ids: list[int] | None = None


class Batcher:
    """A queue in the order of arrival, and the thread that empties it.

    Args:
        load: makes the model, on the thread; what it raises is kept in `error`.
        batch_tokens: of a batch, padding among them; a longer row is scored alone.
        max_wait: seconds that a row waits for others when the model is idle.
        max_queue: rows that may wait.
        meters: what is counted.
        on_end: called on the thread when it ends, whatever the reason.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        batch_tokens: int,
        max_wait: float,
        max_queue: int,
        meters: Meters,
        on_end: Callable[[], None],
    ) -> None:
        self._load = load
        self._batch_tokens = batch_tokens
        self._max_wait = max_wait
        self._max_queue = max_queue
        self._meters = meters
        self._on_end = on_end
        self._queue: deque[_Item] = deque()
        self._open: dict[
            Future[list[float]], _Request
        ] = {}  # queued, or in the batch that is scored
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self.state = "loading"  # then ready, then stopped or failed
        self.error: BaseException | None = None
        meters.queue.set_function(lambda: len(self._queue))

    def start(self) -> None:
        """Start loading the model."""
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Take no more rows, finish those that wait; False if that takes longer than `timeout` seconds."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def submit(self, rows: Sequence[Row]) -> Future[list[float]]:
        """Queue the rows of a request.

        Returns:
            Their scores, NaN for a row that is too long; cancel it, and those that wait leave the queue. It raises
            `RowError` when a row has no score.

        Raises:
            Full: when fewer than that many places are free.
            NotReady: when there is no model.
        """
        request = _Request([math.nan] * len(rows), len(rows))
        now = time.monotonic()
        items = [_Item(row, place, request, now) for place, row in enumerate(rows)]
        items.sort(key=lambda item: -item.row.size)  # neighbours in a batch need little padding
        with self._changed:
            if self.state != "ready" or self._is_closing:
                raise NotReady("stopping" if self._is_closing else self.state)
            if len(self._queue) + len(rows) > self._max_queue:
                raise Full
            self._open[request.future] = request
            self._queue.extend(items)
            self._changed.notify()
        request.future.add_done_callback(self._forget)
        return request.future

    def _forget(self, future: Future[list[float]]) -> None:
        """Let go of a request; the rows of one that was given up leave the queue."""
        with self._changed:
            self._open.pop(future, None)
            if not future.cancelled() and not future.exception():
                return
            kept = [item for item in self._queue if item.request.future is not future]
            self._meters.rows.labels("dropped").inc(len(self._queue) - len(kept))
            self._queue = deque(kept)

    def _run(self) -> None:
        try:
            model = self._load()
            self.state = "ready"
            while self._has_rows():
                self._score(model, self._take(model))
            self.state = "stopped"
        except BaseException as error:
            if self.state == "ready":
                _log.critical("the scoring thread has ended: %s", _place_of(error))
            self.error = error
            self.state = "failed"
        finally:
            with self._changed:
                left = list(self._open.values())
            for request in left:
                request.fail(NotReady(self.state))
            self._on_end()

    def _has_rows(self) -> bool:
        """Wait for rows; False when none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closing)
            return bool(self._queue)

    def _take(self, model: Model) -> list[_Item]:
        """The next batch: the rows that have waited longest, as many as fit."""
        batch: list[_Item] = []
        width = 0
        while item := self._next(batch[0].since + self._max_wait if batch else None):
            ids = self._tokens(model, item)
            if ids is None:
                continue
            wider = max(width, len(ids))
            if batch and wider * (len(batch) + 1) > self._batch_tokens:
                with self._changed:
                    if not item.request.future.done():
                        self._queue.appendleft(item)
                break
            batch.append(item)
            width = wider
        return batch

    def _next(self, until: float | None) -> _Item | None:
        """The row at the head; None when the queue is empty at `until`, or at once if that is None."""
        with self._changed:
            left = 0.0 if until is None else max(0.0, until - time.monotonic())
            self._changed.wait_for(lambda: self._queue or self._is_closing, left)
            return self._queue.popleft() if self._queue else None

    def _tokens(self, model: Model, item: _Item) -> list[int] | None:
        """The row's token ids; None if that settles it: it is too long, or cannot be read."""
        if item.request.future.done():
            self._meters.rows.labels("dropped").inc()
            return None
        if item.ids is None:
            row = item.row
            try:
                item.ids = model.tokenize(row.prompt, row.completion, row.tools)
            except Exception as error:
                self._refuse(item, error)
                return None
            if len(item.ids) > (model.max_length or math.inf):
                self._meters.rows.labels("too_long").inc()
                item.request.settle(item.place, math.nan)
                return None
        return item.ids

    def _refuse(self, item: _Item, error: Exception) -> None:
        self._meters.rows.labels("failed").inc()
        reason = error if isinstance(error, TemplateError) else error.__cause__
        said = (
            f" ({' '.join(str(reason).split())[:200]})" if isinstance(reason, TemplateError) else ""
        )
        item.request.fail(
            RowError(item.place, f"the model's chat template refuses it{said}", is_senders=True)
        )

    def _score(self, model: Model, batch: list[_Item]) -> None:
        """Score a batch; if the model fails, its halves, so that one row fails its own request only."""
        batch = [item for item in batch if not item.request.future.done()]
        if not batch:
            return
        rows = [item.ids or [] for item in batch]
        try:
            scores = model.score_tokens(rows)
        except Exception as error:
            self._meters.errors.inc()
            if len(batch) == 1:
                # The text of an error may hold some of the row: the log gets its kind and where it arose.
                _log.error("the model failed on a row: %s", _place_of(error))
                self._fail(batch[0], f"the model failed on it ({type(error).__name__})")
                return
        else:
            self._meters.batch_tokens.observe(len(batch) * max(map(len, rows)))
            for item, score in zip(batch, scores, strict=True):
                if math.isfinite(score):  # a NaN would read as a row that is too long
                    self._meters.rows.labels("scored").inc()
                    item.request.settle(item.place, score)
                else:
                    self._fail(item, "its score is not a finite number")
            return
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._score(model, half)

    def _fail(self, item: _Item, reason: str) -> None:
        self._meters.rows.labels("failed").inc()
        item.request.fail(RowError(item.place, reason, is_senders=False))


def _place_of(error: BaseException) -> str:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    return f"{type(error).__name__} in {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"

"""Rewards by a Python function of the user's own, with the signature of TRL's reward functions.

A configuration travels further than the trust in it. So it cannot name any module to import, only one that whoever
runs the program has named in the environment variable ALIGN_REWARD_MODULES.
"""

import asyncio
import concurrent.futures
import contextlib
import importlib
import inspect
import math
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from conf.entry import UserError
from reward.answers import Answer
from reward.turns import make_turn

MODULES = "ALIGN_REWARD_MODULES"
SECONDS = (
    60.0  # for the answers of one call, of an asynchronous function without a limit of its own
)
_GRACE = 5.0  # seconds beyond that, in which a function that was cancelled can end


class Function:
    """A function, as a `Scoring`. Use `load`."""

    def __init__(self, name: str, function: Callable[..., Any], timeout: float | None) -> None:
        self._name = name
        self._function = function
        self._timeout = SECONDS if timeout is None else timeout
        self._is_timed = timeout is not None
        call = getattr(function, "__call__", None)  # noqa: B004  # of an object with such a method
        self.is_async = any(map(inspect.iscoroutinefunction, (function, call)))
        self.loop: asyncio.AbstractEventLoop | None = None  # where an asynchronous one runs

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The function's value for each answer; None becomes NaN.

        Raises:
            UserError: naming the function, when it fails or returns something else.
        """
        return self.begin(answers)()

    def begin(self, answers: Sequence[Answer]) -> Callable[[], list[float]]:
        """Start an asynchronous function; what is returned waits for its values. A synchronous one runs then."""
        columns = columns_of(answers)
        wanted = _accepted(self._function, columns, self._name)
        if not self.is_async:
            call = self._timed if self._is_timed else self._called
            return lambda: self._values(self._result(lambda: call(**wanted)), answers)
        if self.loop is None:
            raise RuntimeError(f"{self._name} is asynchronous: open it by reward.rewards")
        future = asyncio.run_coroutine_threadsafe(self._awaited(wanted), self.loop)
        return lambda: self._values(self._result(lambda: self._waited(future)), answers)

    def _called(self, /, **wanted: Any) -> Any:
        return _drawn(self._function(**wanted))

    def _timed(self, /, **wanted: Any) -> Any:
        """What a plain function returns within its time; one that takes longer is left behind in its thread."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(self._called(**wanted))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name=self._name, daemon=True).start()
        if not concurrent.futures.wait([future], self._timeout).done:
            raise self._too_long()
        return future.result()

    def _too_long(self) -> UserError:
        return UserError(
            f"reward function {self._name} took longer than {self._timeout:g} s; give it a larger `timeout`"
        )

    async def _awaited(self, wanted: dict[str, Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout) as limit:
                return _drawn(await self._function(**wanted))
        except TimeoutError as error:
            if not limit.expired():  # one of its own
                raise
            raise self._too_long() from error

    def _waited(self, future: "concurrent.futures.Future[Any]") -> Any:
        concurrent.futures.wait([future], self._timeout + _GRACE)
        if not future.done():
            raise UserError(
                f"reward function {self._name} does not let go after {self._timeout:g} s: it is asynchronous, but "
                "blocks; make it a plain function, or await what takes long"
            )
        return future.result()

    def _result(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"reward function {self._name} failed in {last.filename}:{last.lineno}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _values(self, result: Any, answers: Sequence[Answer]) -> list[float]:
        try:
            values = [*result]
        except TypeError as error:
            kind = type(result).__name__
            raise UserError(
                f"reward function {self._name} returned {kind}, expected a list of numbers"
            ) from error
        if len(values) != len(answers):
            raise UserError(
                f"reward function {self._name} returned {len(values)} values for {len(answers)} completions"
            )
        return [self._number(value) for value in values]

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        try:
            number = math.inf if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.inf
        if math.isinf(number):
            raise UserError(
                f"reward function {self._name} returned {value!r}, expected a finite number, or None for a gap"
            )
        return number


def check(name: Any, where: str) -> None:
    """Check that a function may be imported, without importing it.

    Raises:
        UserError: when it is not "module:function", or its module was not allowed.
    """
    module, _, function = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(
            f"{where}={name!r} must be a module and a function in it: package.module:function"
        )
    allowed = [item.strip() for item in os.environ.get(MODULES, "").split(",")]
    if module not in allowed:
        raise UserError(
            f"{where}={name!r}: a configuration cannot import code by itself. If you trust the module {module!r}, "
            f"run the same command with {MODULES}={module} before it"
        )


def load(name: str, timeout: float | None, where: str) -> Function:
    """Import a function, and check that it can be called.

    Args:
        name: "module:function".
        timeout: seconds for the answers of one call; None: `SECONDS` for an asynchronous function, else no limit.
        where: its place in the configuration, for messages.

    Raises:
        UserError: when it may not be imported, is not there, or asks for what a reward does not have.
    """
    check(name, where)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"{where}={name!r}: {module} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise UserError(f"{where}={name!r}: {module} has no function {attribute!r}")
    return Function(name, found, timeout)


def columns_of(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """What a reward function of TRL is called with, for conversations: a list of as many items for each name.

    `references` has the right answers of each; `reference` and `answer`, which TRL's users call it too, the first one.
    A column of the prompts' rows that only some have is None for the others.
    """
    first = [answer.references[0] if answer.references else None for answer in answers]
    names = dict.fromkeys(name for answer in answers for name in answer.facts)
    return {
        "reference": first,
        "answer": first,
        **{name: [answer.facts.get(name) for answer in answers] for name in names},
        "prompts": [answer.prompt for answer in answers],
        "completions": [[make_turn("assistant", answer.text)] for answer in answers],
        "references": [list(answer.references) for answer in answers],
    }


def _accepted(
    function: Callable[..., Any], columns: dict[str, list[Any]], name: str
) -> dict[str, Any]:
    """The columns that the function takes; TRL's two callbacks for logging, which do nothing here.

    Raises:
        UserError: when it asks for a column that the prompts' rows do not have.
    """
    have: dict[str, Any] = {"log_extra": _ignore, "log_metric": _ignore, **columns}
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of some built in C
        return have
    takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters)
    named = [
        item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    ]
    if missing := [
        item.name for item in named if item.default is item.empty and item.name not in have
    ]:
        raise UserError(
            f"reward function {name} asks for {', '.join(missing)}, and the prompts' rows have only "
            f"{', '.join(columns)}"
        )
    return (
        have if takes_all else {item.name: have[item.name] for item in named if item.name in have}
    )


def _drawn(result: Any) -> Any:
    """A result with the values of a generator drawn, so that they count as the call: its time, and its failures."""
    return [*result] if isinstance(result, Iterator) else result


def _ignore(*_: Any, **__: Any) -> None:
    """In the place of a callback that logs."""


@contextlib.contextmanager
def awaiting(functions: Iterable[Function]) -> Iterator[None]:
    """An event loop for asynchronous functions, in a thread: one for all calls, as clients with connections need."""
    asynchronous = [function for function in functions if function.is_async]
    if not asynchronous:
        yield
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="reward functions", daemon=True)
    thread.start()
    for function in asynchronous:
        function.loop = loop
    try:
        yield
    finally:
        ending = asyncio.run_coroutine_threadsafe(_cancelled(), loop)
        with contextlib.suppress(concurrent.futures.TimeoutError):  # one that blocks is left behind
            ending.result(_GRACE)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


async def _cancelled() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

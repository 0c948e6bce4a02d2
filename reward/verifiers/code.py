"""Answers that are programs, judged by unit tests in the sandbox. See docs/sandbox.md."""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from conf.entry import UserError
from reward import sandbox
from reward.answers import Answer
from reward.sandbox import Limits
from reward.workers import cores

_FENCE = re.compile(  # possessive: a line that ends in the text's end would take its length squared
    r"^([ \t]*)```[ \t]*+(\w*+)[^\n]*+\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL
)
_PYTHON = {"python", "python3", "py"}
_LONGEST = 1e6  # seconds; poll() takes no more than twice as many


@dataclass(frozen=True)
class Trial:
    """What a row says of how its answers are tested: by programs, or by inputs and what must be printed for them."""

    tests: list[str] = field(default_factory=list)
    prelude: str = ""  # code of the row's that tests may use
    entry: str | None = None  # the function for HumanEval's `check(candidate)`
    pairs: list[tuple[str, str]] = field(default_factory=list)  # standard input, output


def code(
    answers: Sequence[Answer],
    *,
    prefix: str | None = None,
    partial: bool = False,
    timeout: float = 10.0,
    memory: int = 1024,
    processes: int | None = None,
) -> list[float]:
    """1 where the answer's program passes every test of its row, else 0; NaN for a row without tests.

    Args:
        answers: their code is the last ```python block, else the last block, else the whole text.
        prefix: the column whose text goes before the code, such as `prompt` for HumanEval's completions.
        partial: give the share of tests that pass.
        timeout: seconds of wall clock for each test.
        memory: MiB of address space for each process.
        processes: answers that are judged at a time; one for each core unless given.

    Raises:
        UserError: when a limit makes no sense, or running code is not allowed, or cannot be contained.
    """
    _check_limits(timeout, memory, processes)
    sandbox.check("the verifier code")
    limits = Limits(seconds=timeout, memory=memory)

    def score(answer: Answer) -> float:
        facts = dict(answer.facts)
        if answer.prompt:  # whose column is no fact
            facts.setdefault("prompt", answer.prompt[-1].get("content"))
        trial = trial_of(facts)
        if not trial.tests and not trial.pairs:
            return math.nan
        verdicts = _verdicts(_prefix(facts, prefix) + code_of(answer.text), trial, limits, partial)
        if None in verdicts:
            return math.nan
        share = verdicts.count(True) / len(verdicts)
        return share if partial else float(share == 1)

    with ThreadPoolExecutor(processes or cores()) as pool:
        return list(pool.map(score, answers))


def _check_limits(timeout: float, memory: int, processes: int | None) -> None:
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not (is_number and 0 < timeout < _LONGEST):
        raise UserError(
            f"code: timeout={timeout!r} must be a number of seconds, above 0 and below {_LONGEST:g}"
        )
    counts = {"memory": memory} | ({} if processes is None else {"processes": processes})
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"code: {name}={value!r} must be a whole number, 1 or more")


def code_of(text: str) -> str:
    """The program in an answer."""
    blocks: list[tuple[str, str]] = [
        (
            language.lower(),
            re.sub(rf"(?m)^[ \t]{{0,{len(indent)}}}", "", block),
        )  # as in a list's item
        for indent, language, block in _FENCE.findall(text)
    ]
    marked = [block for language, block in blocks if language in _PYTHON]
    return (marked or [block for _, block in blocks] or [text])[-1]


def trial_of(facts: Mapping[str, Any]) -> Trial:
    """Find the tests in a row's columns.

    `tests` or MBPP's `test_list` (a program, or a list of programs), HumanEval's `test` with `entry_point`, `inputs`
    and `outputs`, or these two in one `input_output` as in APPS and TACO, whose `fn_name` makes them calls.
    A text where a list is expected is a list of one.
    """
    if found := facts.get("tests") or facts.get("test_list"):
        setup = facts.get("test_setup_code") or "\n".join(
            map(str, _listed(facts.get("test_imports")))
        )
        return Trial([str(test) for test in _listed(found)], setup)
    entry = facts.get("entry_point")
    if facts.get("test") and entry:
        return Trial([str(facts["test"])], _prelude(facts.get("prompt")), str(entry))
    both = facts.get("input_output") or facts
    try:
        both = json.loads(both) if isinstance(both, str) else both
        pairs = list(zip(_listed(both.get("inputs")), _listed(both.get("outputs")), strict=True))
    except (ValueError, AttributeError):
        return Trial()  # as TACO's rows without tests
    if name := both.get("fn_name"):
        return Trial([_call(str(name), given, wanted) for given, wanted in pairs])
    return Trial(pairs=[(_lines(given), _lines(wanted)) for given, wanted in pairs])


def _listed(value: object) -> list[Any]:
    """The items of a column; none where it is no list."""
    if isinstance(value, str):
        return [value] if value else []
    return list(value) if isinstance(value, list | tuple) else []


def _verdicts(source: str, trial: Trial, limits: Limits, is_partial: bool) -> list[bool | None]:
    """A verdict for each test; those after the first failure are left out unless each counts."""
    verdicts: list[bool | None] = []
    for given, wanted in trial.pairs:
        run = sandbox.run(source, given, limits)
        printed = run.output.decode("utf-8", "replace")
        verdicts.append(run.code == 0 and _words(printed) == _words(wanted))
        if not is_partial and not verdicts[-1]:
            break
    while len(verdicts) < len(trial.tests):
        left = trial.tests[len(verdicts) :]
        verdicts += sandbox.judge(
            source, left, prelude=trial.prelude, entry=trial.entry, limits=limits
        )
        if len(verdicts) < len(trial.tests):
            verdicts.append(False)  # it took too long, or ended the process
        if not is_partial and False in verdicts:
            return [False]
    return verdicts


def _prefix(facts: Mapping[str, Any], column: str | None) -> str:
    if column is None:
        return ""
    if not isinstance(text := facts.get(column), str):
        raise UserError(
            f"the verifier code: prefix={column}, but a row has no text of that name. It has:"
            f" {', '.join(facts) or 'no further columns'}"
        )
    return text


def _prelude(prompt: object) -> str:
    """HumanEval's prompt where it is a program by itself: its helper functions are the tests' own."""
    try:
        ast.parse(prompt if isinstance(prompt, str) else "")
    except (SyntaxError, ValueError):
        return ""
    return prompt if isinstance(prompt, str) else ""


def _call(name: str, given: object, wanted: object) -> str:
    """A test of one call. JSON has no tuples, so a tuple in the result counts as a list."""
    args = given if isinstance(given, list) else [given]
    return (
        "def plain(value):\n"
        "    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value\n"
        f"wanted = {wanted!r}\n"
        f"found = plain(Solution().{name}(*{args!r}) if is_class else {name}(*{args!r}))\n"
        "assert found == wanted or [found] == wanted\n"
    ).replace("is_class", "'Solution' in globals()")


def _lines(value: object) -> str:
    """APPS holds an input as text, or as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _words(text: str) -> list[list[str]]:
    """Lines of words: spaces within and around them do not count, nor empty lines at the end."""
    return [line.split() for line in text.strip().splitlines()]

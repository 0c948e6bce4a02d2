"""Answers that are programs: HumanEval's own solutions, what is wrong with them, and every form of tests."""

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Reward, Term
from reward import sandbox
from reward.answers import Answer
from reward.rewards import check_reward, open_reward
from reward.verifiers.code import code, code_of

_BWRAP = shutil.which("bwrap")
_MISSING = sandbox._problem(_BWRAP) if _BWRAP else "bubblewrap is not installed"
contained = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))


@pytest.fixture(autouse=True)
def _allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.SWITCH, "1")


@pytest.fixture(scope="module")
def humaneval(shared_data: Path) -> list[dict[str, Any]]:
    """Every ninth problem, and 32, whose tests use a helper of the prompt."""
    with gzip.open(shared_data / "eval/humaneval.test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows[::9] + [row for row in rows if row["task_id"] == "HumanEval/32"]


def score(text: str, facts: dict[str, Any], **options: Any) -> float:
    return code([Answer([], text, facts=facts)], **options)[0]


@contained
class TestHumanEval:
    def test_solutions_pass(self, humaneval: list[dict[str, Any]]) -> None:
        answers = [Answer([], row["canonical_solution"], facts=row) for row in humaneval]
        assert code(answers, prefix="prompt") == [1.0] * len(humaneval)

    def test_the_prompt_of_a_row_is_what_was_asked(self, humaneval: list[dict[str, Any]]) -> None:
        """As rows come from a data version: the column is the prompt, and no fact."""
        for row in humaneval:
            facts = {name: value for name, value in row.items() if name != "prompt"}
            asked = [{"role": "user", "content": row["prompt"]}]
            found = code([Answer(asked, row["canonical_solution"], facts=facts)], prefix="prompt")
            assert found == [1.0]

    def test_wrong_ones_fail(self, humaneval: list[dict[str, Any]]) -> None:
        """The solution's results wrapped in a tuple, and with a function that does nothing."""
        answers = []
        for row in humaneval:
            name, solution = row["entry_point"], row["prompt"] + row["canonical_solution"]
            wrapped = (
                f"{solution}\n_right = {name}\ndef {name}(*args):\n    return (_right(*args),)\n"
            )
            answers += [Answer([], wrapped, facts=row), Answer([], row["prompt"], facts=row)]
        assert code(answers) == [0.0] * len(answers)

    def test_a_whole_function_in_a_fence(self, humaneval: list[dict[str, Any]]) -> None:
        row = humaneval[0]
        text = f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}```\nIt loops."
        assert score(text, row) == score(text, row, prefix="prompt") == 1.0


@contained
class TestForms:
    TESTS = ("assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9", "assert f(4) == 16")

    def test_asserts(self) -> None:
        facts = {"tests": list(self.TESTS)}
        assert score("def f(x): return x * x", facts) == 1.0
        assert score("def f(x): return x * x", {"tests": "\n".join(self.TESTS)}) == 1.0
        assert score("def f(x): return 1", facts) == 0.0
        assert score("def f(x): return x ** 2 if x != 3 else 0", facts, partial=True) == 0.75

    @pytest.mark.parametrize("end", ["__import__('os')._exit(0)", "__import__('time').sleep(9)"])
    def test_tests_after_an_end_count(self, end: str) -> None:
        text = f"def f(x): return x * x if x != 2 else {end}"
        facts = {"tests": list(self.TESTS)}
        assert score(text, facts, partial=True, timeout=1) == 0.75
        assert score(text, facts, timeout=1) == 0.0

    def test_mbpp(self) -> None:
        facts = {"test_list": ["assert f(4) == math.sqrt(16)"], "test_setup_code": "import math"}
        assert score("def f(x): return x", facts) == 1.0

    def test_inputs_and_outputs(self) -> None:
        facts = {"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", "7 "]}
        add = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
        assert score(add, facts) == 1.0
        assert score("print(3)", facts) == 0.0
        assert score("print(3)", facts, partial=True) == 0.5
        assert score(add + "\n1/0", facts) == 0.0
        main = "def main(): print(sum(map(int, open(0).read().split())))\nif __name__ == '__main__':\n main()\n exit()"
        assert score(main, facts) == 1.0

    def test_a_text_is_a_list_of_one(self) -> None:
        double = "print(2 * int(input()))"
        assert score(double, {"inputs": "12", "outputs": "24"}) == 1.0
        assert score(double, {"inputs": "12", "outputs": "44"}) == 0.0
        facts = {"test_list": ["assert f(4) == math.sqrt(16)"], "test_imports": "import math"}
        assert score("def f(x): return x", facts) == 1.0

    def test_apps(self) -> None:
        pairs = json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]})
        assert score("print(2 * int(input()))", {"input_output": pairs}) == 1.0
        calls = json.dumps(
            {"fn_name": "pair", "inputs": [[1, 2], [[3], 4]], "outputs": [[[1, 2]], [[[3], 4]]]}
        )
        function = "def pair(a, b): return (a, b)"
        method = "class Solution:\n    def pair(self, a, b): return [a, b]"
        for text, right in ((function, 1.0), (method, 1.0), (function.replace("(a,", "(b,", 2), 0)):
            assert score(text, {"input_output": calls}) == right, text

    @pytest.mark.parametrize(
        "facts",
        [{}, {"tests": []}, {"tests": None}, {"test": "def check(c): pass"}, {"input_output": ""},
         {"input_output": "{}"}, {"input_output": "nonsense"}, {"inputs": [], "outputs": []},
         {"tests": ["assert True"]}, {"inputs": ["1"], "outputs": []}, {"tests": 3}, {"inputs": 5},
         {"inputs": 5, "outputs": 5}, {"inputs": "", "outputs": ""}, {"input_output": 5}],
    )  # fmt: skip
    def test_a_row_without_tests_says_nothing(self, facts: dict[str, Any]) -> None:
        assert math.isnan(score("def f(x): return 1", facts))

    @pytest.mark.parametrize(
        "text",
        ["", "\0", "\ud800", "```python\n", "I cannot do that.", "x" * 1_000_000, "def f(x):" * 9],
    )
    def test_hostile_answers_are_wrong(self, text: str) -> None:
        assert score(text, {"tests": ["assert f(1) == 1"]}) == 0.0
        assert score(text + "\n1/0", {"inputs": [text[:9]], "outputs": ["1"]}) == 0.0

    def test_many_keep_their_order(self) -> None:
        texts = [f"def f(x): return {n % 2}" for n in range(12)]
        answers = [Answer([], text, facts={"tests": ["assert f(0) == 1"]}) for text in texts]
        assert code(answers, processes=3) == [0.0, 1.0] * 6

    def test_as_a_reward(self) -> None:
        reward = Reward(terms={"tests": Term(kind="code", weight=2.0, args={"partial": True})})
        check_reward(reward, "reward")
        with open_reward(reward) as worth:
            answer = Answer([], "def f(x): return 1", facts={"tests": list(self.TESTS)})
            assert worth([answer]).total == [0.5]

    def test_a_column_that_is_not_there(self) -> None:
        with pytest.raises(UserError, match=r"prefix=promt.* It has: tests"):
            score("pass", {"tests": ["assert f() == 1"]}, prefix="promt")


def test_it_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sandbox.SWITCH)
    reward = Reward(terms={"tests": Term(kind="code")})
    with pytest.raises(
        UserError,
        match=r"terms\.tests\.args: the verifier code runs programs .* set HF_ALLOW_CODE_EVAL=1",
    ):
        check_reward(reward, "reward")
    with pytest.raises(UserError, match="HF_ALLOW_CODE_EVAL"):
        score("pass", {"tests": ["assert True"]})


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("    return 1\n", "    return 1\n"),
        ("a\n```python\nx = 1\n```\nb\n```python\nx = 2\n```\nc", "x = 2\n"),
        ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py title=a\nx = 1", "x = 1"),
        ("```Python3\r\nx = '```'\n```", "x = '```'\n"),
        ("  ```python\n  x = 1\n  ```", "x = 1\n"),
        ("```python\n    return 1\n```", "    return 1\n"),
        ("```bash\npip install\n```", "pip install\n"),
    ],
)
def test_the_program_in_an_answer(text: str, program: str) -> None:
    assert code_of(text) == program


@pytest.mark.parametrize("character", ["a", " "])
def test_a_fence_without_an_end_takes_no_time(character: str) -> None:
    """Its length squared would be a quarter of an hour."""
    text = "```" + character * 1_000_000
    assert code_of(text) == text

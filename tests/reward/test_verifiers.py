"""Verifiers against the libraries that they call, hand values, and text that means harm."""

import contextlib
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.entry import UserError
from reward import verify
from reward.answers import Answer
from reward.verifiers import aside, words
from reward.verifiers.instructions import ifeval
from reward.verifiers.maths import equivalent
from reward.verifiers.shaping import ended, layout, length
from reward.verifiers.structured import json_exact, json_schema, json_valid
from reward.verifiers.words import exact, regex


@pytest.fixture
def hasty() -> Iterator[None]:
    """A second for each question."""
    usual, aside.SECONDS = aside.SECONDS, 1.0
    yield
    aside.SECONDS = usual


def said(text: str, *references: str, **facts: Any) -> Answer:
    return Answer([], text, references, facts)


def is_nan(values: list[float]) -> list[bool]:
    return list(map(math.isnan, values))


# Answer, reference: where nothing but math-verify itself is asked, ours is its verdict.
TRICKY = [
    ("5 kg", "5"),
    ("The train travels 120 km/h.", "120"),
    (r"$12\text{ cm}^2$", "12"),
    (r"$\frac{3}{4}$", "0.75"),
    (r"$\dfrac{3}{4}$", r"$\frac34$"),
    (r"\boxed{-\frac{1}{3}}", r"$-1/3$"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("12,345", "12345"),
    ("$1,234.50$", "1234.5"),
    ("1.234,5", "1234.5"),
    ("So the answer is 42. I hope that this helps!", "42"),
    (r"First \boxed{7}, no: \boxed{8}", "8"),
    ("٤٢", "42"),
    ("４２", "42"),
    ("½", "0.5"),
    (r"$\pi$", "3.14159"),
    (r"$x \in [0, 1)$", "$[0,1)$"),
    (r"$\{1,2,3\}$", r"$\{3,2,1\}$"),
    (r"$(1, 2)$", "$(2, 1)$"),
    (r"$2x + 1$", "$1 + 2x$"),
    (r"$x = 3$", "$3$"),
    (r"$10^3$", "1000"),
    ("1e3", "1000"),
    ("-0", "0"),
    ("three", "3"),
    (r"$\sqrt{2}/2$", r"$\frac{1}{\sqrt{2}}$"),
    (r"$\begin{pmatrix}1\\2\end{pmatrix}$", r"$\begin{pmatrix}1\\2\end{pmatrix}$"),
    ("3.0000000001", "3"),
    ("", "3"),
    ("#", "3"),
]


def test_mathematics_is_that_of_math_verify() -> None:
    from math_verify import parse, verify

    expected = [float(verify(parse(right), parse(text))) for text, right in TRICKY]
    assert 8 < sum(expected) < len(TRICKY) - 8
    assert equivalent([said(*case) for case in TRICKY]) == expected


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        (r"$\boxed{7, 5, 3}$", "3, 5, 7", 1),
        (r"\boxed{7}", "3, 5, 7", 0),
        ("1, 2, 7", "3, 5, 7", 0),
        (r"$\boxed{1,-2}$", "1,-2", 1),
        (r"\boxed{3\frac{1}{2}}", "3 1/2", 1),
        (r"\boxed{1}", "3 1/2", 0),
        ("1,234,567", "1234567", 1),
        (r"$10^{-5}$", "0.00001", 1),
    ],
)
def test_several_numbers_and_mixed_ones_are_read_whole(
    answer: str, right: str, expected: float
) -> None:
    assert equivalent([said(answer, right)]) == [expected]


def test_an_escaped_percent_sign_is_one() -> None:
    assert equivalent([said(r"$50\%$", "$0.5$"), said(r"$50\%$", "50%")]) == [1, 1]


def test_the_process_is_kept_and_ends_with_its_owner() -> None:
    code = (
        "from reward.answers import Answer\n"
        "from reward.verifiers import words\n"
        "ask = lambda: words.regex([Answer([], 'a')], pattern='a')\n"
        "ask()\n"
        "first = words._ASIDE._process.pid\n"
        "ask()\n"
        "print(first, words._ASIDE._process.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first == second
    assert not Path(f"/proc/{first}").exists()


def test_a_forked_process_asks_one_of_its_own() -> None:
    assert regex([said("a")], pattern="a") == [1]
    if (child := os.fork()) == 0:
        os._exit(0 if regex([said("b"), said("a")], pattern="a") == [0, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert regex([said("a")], pattern="a") == [1]


def test_a_process_that_died_while_nobody_asked_is_started_again() -> None:
    assert regex([said("a")], pattern="a") == [1]
    before, process = aside.stopped.total(), words._ASIDE._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert regex([said("a")], pattern="a") == [1]
    assert aside.stopped.total() == before


@pytest.mark.usefixtures("hasty")
def test_a_pattern_that_backtracks_for_ever_is_stopped_and_counted() -> None:
    before, start = aside.stopped["words"], time.monotonic()
    bomb, fine = said("a" * 5000 + "!"), said("aaa")
    assert regex([bomb, fine], pattern="(a|a)*", full=True) == [0, 1]
    assert aside.stopped["words"] == before + 1
    assert time.monotonic() - start < 60
    schema = {"type": "string", "pattern": "^(a|a)*$"}
    answers = [said(json.dumps("a" * 5000 + "!")), said('"aaa"')]
    assert json_schema(answers, schema=schema) == [0, 1]


@pytest.mark.parametrize("depth", [1, 150, 300, 900, 5000])
def test_an_answer_cannot_choose_not_to_count(depth: int) -> None:
    nested = {"type": "array", "items": {"$ref": "#"}}
    expected = float(depth < 200)
    assert json_schema([said("[" * depth + "]" * depth)], schema=nested) == [expected]
    assert json_schema([said("[" * depth + "]" * depth, schema=nested)]) == [expected]


def test_whose_fault_it_is_that_an_answer_cannot_be_checked() -> None:
    answers = [said("1" + "0" * 400), said("1e999"), said("0.2")]
    assert json_schema(answers, schema={"multipleOf": 0.1}) == [0, 0, 1]
    circle, pattern = {"$ref": "#"}, {"pattern": "("}
    schemas = [said("1", schema=circle), said('"a"', schema=pattern)]
    assert is_nan(json_schema(schemas)) == [True, True]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("It is 42.", {"pattern": r"\d+"}, 1),
        ("It is 42.", {"pattern": r"\d+", "full": True}, 0),
        ("42", {"pattern": r"\d+", "full": True}, 1),
        ("42\n", {"pattern": r"\d+", "full": True}, 0),
        ("YES", {"pattern": "yes"}, 0),
        ("YES", {"pattern": "yes", "ignore_case": True}, 1),
        ("", {"pattern": ""}, 1),
    ],
)
def test_patterns(text: str, options: dict[str, Any], expected: float) -> None:
    assert regex([said(text)], **options) == [expected]


SCHEMAS: list[Any] = [
    {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
    {"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True},
    {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"},
    {"enum": [1, "one", None]},
    {"prefixItems": [{"const": 1}, {"const": 2}], "items": False},
    {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"const": 1}]},
    True,
    False,
]  # fmt: skip
VALUES: list[Any] = [
    {"name": "a"}, {"name": 1}, {}, [], [1, 2], [1, 1], [1, -1], [1.0], [[], [[]]], 1, "one", None,
    [1, 2, 3], [2], True, 1.0,
]  # fmt: skip


def test_json_schema_gives_the_verdicts_of_jsonschema() -> None:
    from jsonschema import validators

    for schema in SCHEMAS:
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        expected = [float(kind(schema).is_valid(value)) for value in VALUES]
        texts = [json.dumps(value) for value in VALUES]
        assert json_schema([said(text, schema=schema) for text in texts]) == expected
        assert json_schema([said(text, schema=json.dumps(schema)) for text in texts]) == expected
        assert json_schema([said(text) for text in texts], schema=schema) == expected


def test_what_is_no_json_does_not_fit_and_no_schema_is_a_gap() -> None:
    texts = ["", "{'a': 1}", "NaN", '```json\n{"a": 1}\n```', "[" * 100_000, '{"a": 1} ']
    assert json_schema([said(text) for text in texts], schema={}) == [0, 0, 0, 0, 0, 1]
    unusable = [said("1"), said("1", schema="no schema"), said("1", schema={"type": "nothing"})]
    assert is_nan(json_schema(unusable)) == [True] * 3


def test_a_schema_is_never_fetched() -> None:
    import http.server
    import threading

    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        schema = {"$ref": f"http://127.0.0.1:{server.server_port}/x.json"}
        assert is_nan(json_schema([said("1", schema=schema)])) == [True]
        with pytest.raises(UserError, match="leads out of it, and nothing is fetched"):
            json_schema([said("1")], schema=schema)
        server.shutdown()
        thread.join()
    assert asked == []


@pytest.mark.parametrize("tokens", [*range(70, 110, 5), 80, 99, 100, 101])
def test_the_overlong_punishment_is_that_of_trl(tokens: int) -> None:
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    answer = Answer([], "x", tokens=tokens)
    assert length([answer], max_tokens=100, soft_tokens=20) == theirs([[0] * tokens])


def test_lengths_by_hand() -> None:
    answers = [Answer([], text, tokens=count) for text, count in (("one two", 95), ("a", 95))]
    assert length(answers, max_tokens=100, soft_tokens=20) == [-0.75, -0.75]  # (80 − 95) / 20
    assert length(answers, max_tokens=95) == [0, 0]
    assert length(answers, max_tokens=94) == [-1, -1]  # without a soft part, a step
    assert length(answers, min_words=2) == [0, -1]
    assert length(answers, max_chars=6) == [-1, 0]
    assert length(answers, min_chars=1, max_chars=7, max_words=2) == [0, 0]
    assert length(answers, max_tokens=100, soft_tokens=20, min_words=2) == [-0.75, -1]  # the worst
    unknown = [said("one two"), said("a")]
    assert is_nan(length(unknown, max_tokens=9)) == [True, True]
    assert is_nan(length(unknown, max_tokens=9, min_words=2)) == [True, False]  # −1 is the least
    cut = [Answer([], "", is_ended=end) for end in (True, False, None)]
    assert ended(cut)[:2] == [0, -1]
    assert math.isnan(ended(cut)[2])


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("<think>a</think><answer>b</answer>", {}, 1),
        ("\n<think>\na\n</think>\n\n<answer> b </answer>\n", {}, 1),
        ("<think></think><answer>b</answer>", {}, 0),
        ("<answer>b</answer><think>a</think>", {}, 0),
        ("<think>a<think>b</think><answer>c</answer>", {}, 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", {}, 0),
        ("Sure! <think>a</think><answer>b</answer>", {}, 0),
        ("<think>a</think><answer>b</answer> Done.", {}, 0),
        ("<think>a</think><answer>b", {}, 0),
        ("<think>a <answer>b</answer></think><answer>c</answer>", {}, 0),
        ("a</think><answer>b</answer>", {}, 0),
        ("a</think><answer>b</answer>", {"opened": True}, 1),
        ("<think>a</think> So 4.", {"sections": ["think"], "rest": True}, 1),
        ("<think>a</think> ", {"sections": ["think"], "rest": True}, 0),
        ("<think>a</think> </think> 4", {"sections": ["think"], "rest": True}, 0),
        ("", {}, 0),
    ],
)
def test_layouts(text: str, options: dict[str, Any], expected: float) -> None:
    assert layout([said(text)], **options) == [expected]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " "]), max_size=9))  # fmt: skip
def test_a_layout_is_that_of_a_regular_expression(pieces: list[str]) -> None:
    import re

    text = "".join(pieces)
    section = r"\s*<{0}>(?=[^<]*\S)[^<]+</{0}>\s*"  # no piece but a tag has a <
    pattern = "".join(section.format(name) for name in ("think", "answer"))
    expected = re.fullmatch(pattern, text) and "< " not in text
    inside = re.findall(r"<(?:think|answer)>([^<]*)</", text)
    assert layout([said(text)]) == [float(bool(expected) and all(map(str.strip, inside)))]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("regex", {"pattern": "("}, r"at: regex: '\(' is no regular expression"),
        ("regex", {"pattern": 3}, "is no regular expression"),
        ("regex", {}, "needs pattern"),
        ("regex", {"patern": "a"}, r"has no option 'patern'\. Did you mean 'pattern'"),
        ("exact", {"x": 1}, r"has no option 'x'\. There are none"),
        ("json_schema", {"schema": {"type": "integr"}}, "'integr' is not valid under any"),
        ("length", {}, "set at least one of max_tokens"),
        ("length", {"max_chars": -1}, "max_chars=-1 must be a whole number"),
        ("length", {"max_words": 2, "min_words": 3}, "min_words is more than max_words"),
        ("length", {"max_tokens": 5, "soft_tokens": 6}, "soft_tokens=6 must be at most max_tokens"),
        ("format", {"sections": "think"}, "must be a list of different names"),
        ("format", {"sections": ["a", "a"]}, "must be a list of different names"),
        ("format", {"sections": 3}, "format cannot use these options"),
        ("code", {"timeout": 0}, "at: code: timeout=0 must be a number of seconds"),
        ("code", {"timeout": -1.0}, "timeout=-1.0 must be a number"),
        ("code", {"timeout": "5"}, "timeout='5' must be a number"),
        ("code", {"timeout": True}, "timeout=True must be a number"),
        ("code", {"timeout": math.inf}, "timeout=inf must be a number"),
        ("code", {"timeout": math.nan}, "timeout=nan must be a number"),
        (
            "code",
            {"timeout": 3e6},
            r"timeout=3000000\.0 must be a number of seconds, .* below 1e\+06",
        ),
        ("code", {"memory": 1.5}, r"code: memory=1\.5 must be a whole number, 1 or more"),
        ("code", {"memory": None}, "memory=None must be a whole number"),
        ("code", {"processes": 0}, "processes=0 must be a whole number"),
    ],
)
def test_options_are_checked_before_anything_loads(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        verify.check_options(kind, options, "at")


def test_a_process_that_does_not_start_says_so() -> None:
    with pytest.raises(UserError, match=r"the process behind .*absent does not start"):
        aside.Aside("absent").ask({})


HOSTILE = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(categories=["Cs", "Cc", "Nd", "Sm"]), max_size=20),
    st.sampled_from(
        [
            "",
            "\x00",
            "\ud800",
            "[" * 50_000,
            '{"a":' * 500 + "1" + "}" * 500,
            "9" * 10_000,
            "1e999999",
            "-" * 3000,
            "$10^{10^{10}}$",
            r"\boxed{" * 200,
            r"$\frac{1}{0}$",
            "x" * 1_000_000,
            "\\" * 1000,
            '"\\ud800"',
            "<think>" * 500,
            "\n" * 10_000,
            "** * **" * 300,
        ]
    ),
)
CHECKS: list[Callable[[list[Answer]], list[float]]] = [
    exact,
    equivalent,
    json_valid,
    json_exact,
    lambda answers: json_schema(answers, schema={"type": "array", "items": {"$ref": "#"}}),
    lambda answers: regex(answers, pattern=r"(\w+\s?)*$", full=True),
    ifeval,
    lambda answers: ifeval(answers, loose=True, share=True),
    lambda answers: length(answers, max_words=3),
    layout,
    ended,
]
FACTS = {
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:json_format"],
    "kwargs": [{}, {}],
}


@pytest.mark.usefixtures("hasty")
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(HOSTILE)
def test_no_text_breaks_a_verifier(text: str) -> None:
    for check in CHECKS:
        (score,) = check([Answer([], text, ["42", '["a"]'], FACTS)])
        assert math.isnan(score) or 0 <= abs(score) <= 1


# --- IFEval ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(shared_data: Path) -> list[dict[str, Any]]:
    """The real prompts, without those whose checks need NLTK's data."""
    from evals.punkt import NEEDED_BY

    with gzip.open(shared_data / "eval" / "ifeval.train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    usable = [row for row in rows if NEEDED_BY.isdisjoint(row["instruction_id_list"])]
    return usable[::2]  # all of them agree too, in twice the time


def official(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """lm-eval's own scoring, kept from downloading, and with a seed for its detection of languages."""
    import langdetect
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", 0)
    from lm_eval.tasks.ifeval.utils import process_results

    return process_results  # type: ignore[no-any-return]


ANSWERS = [
    "",
    "yes, all of it is in lower case here.",
    "THIS IS LOUD AND HAS *one* HIGHLIGHT",
    '"A quotation, with <<a title>> and a P.S. in the end."\n\nP.S. it ends',
    "Sure:\n\n* one\n* two\n* three\n\n***\n\nSECTION 1\n[name] and [place]\n",
    '{"a": 1}',
    "word " * 450 + "\n\n" + "Is there anything else I can help with?",
]


def test_ifeval_is_that_of_lm_eval(
    prompts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = official(monkeypatch)
    rows = [(row, ANSWERS[number % len(ANSWERS)]) for number, row in enumerate(prompts)]
    rows += [(row, row["prompt"]) for row in prompts[::10]]
    theirs = [scored(row, [text]) for row, text in rows]
    answers = [
        Answer([{"role": "user", "content": row["prompt"]}], text, (), row) for row, text in rows
    ]
    for mode in ("strict", "loose"):
        loose = mode == "loose"
        whole = [float(score[f"prompt_level_{mode}_acc"]) for score in theirs]
        each = [score[f"inst_level_{mode}_acc"] for score in theirs]
        assert 0 < sum(whole) < len(whole)
        assert ifeval(answers, loose=loose) == whole
        shares = [sum(followed) / len(followed) for followed in each]
        assert ifeval(answers, loose=loose, share=True) == pytest.approx(shares)


def test_rows_without_usable_instructions_are_gaps() -> None:
    ids = ["punctuation:no_comma"]
    rows: list[dict[str, Any]] = [
        {},
        {"instruction_id_list": ids},
        {"instruction_id_list": ["punctuation:no_commas"], "kwargs": [{}]},
        {"instruction_id_list": ids, "kwargs": []},
        {"instruction_id_list": [], "kwargs": []},
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{"words": 3}]},
        {"instruction_id_list": ids, "kwargs": ["{}"]},
    ]
    assert is_nan(ifeval([said("a", **row) for row in rows])) == [True] * 6 + [False]


@pytest.mark.usefixtures("hasty")
def test_an_answer_on_which_an_instruction_hangs_does_not_follow_it() -> None:
    row = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["(a|a)*b"]}]}
    assert ifeval([said("a" * 40, **row), said("ab", **row)]) == [0, 1]


def test_ifbench_and_thoughts() -> None:
    row = {"instruction_id_list": ["format:no_whitespace"], "kwargs": [{}]}
    texts = ["oneword", "two words", "<think>two words</think>oneword"]
    assert ifeval([said(text, **row) for text in texts]) == [1, 0, 1]


def test_checks_that_need_data_say_so() -> None:
    import nltk

    row = {
        "instruction_id_list": ["change_case:capital_word_frequency"],
        "kwargs": [{"capital_frequency": 1, "capital_relation": "at least"}],
    }
    with contextlib.suppress(LookupError):
        nltk.data.find("tokenizers/punkt_tab")
        pytest.skip("NLTK's punkt_tab is installed for the whole machine")
    with pytest.raises(UserError, match="need NLTK's punkt_tab, which is not here"):
        ifeval([said("ONE word", **row)])

"""Personal data are found by their shape, numbers that count something are not, masks hold."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import private

# Built from pieces, so that no scanner of this repository takes the examples for keys.
ALNUM = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0xF3hL6"
SECRETS = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + ALNUM,
    "github_pat_" + ALNUM,
    "glpat-" + ALNUM[:20],
    "xoxb-" + "123456789012-1234567890123-" + ALNUM[:24],
    "sk_" + "live_" + ALNUM[:24],
    "sk_" + "test_" + ALNUM[:24],
    "sk-" + ALNUM + ALNUM[:12],
    "sk-proj-" + ALNUM + "_" + ALNUM,
    "sk-ant-api03-" + ALNUM + "-" + ALNUM,
    "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi",
    "AIza" + ALNUM[:35],
    "npm_" + ALNUM,
    "SG." + ALNUM[:22] + "." + ALNUM + ALNUM[:7],
    "eyJ"
    + "hbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJ"
    + "zdWIiOiIxMjM0NTY3ODkwIn0.dBjftJeZ4CVPmB92K27u",
    "12345678:" + ALNUM[:35],
    "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow\nIBAAK+/==\n-----END RSA " + "PRIVATE KEY-----",
]
OPEN_KEY = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjE"  # cut off
PIECES = {
    "email": [
        "casey.examplar79@mail.invalid",
        "logan.placeholder43@example.com",
        "first+tag@sub.domain.example.co.uk",
        "o'brien@example.org",
        "x_1%y-z@123.example.museum",
        "jürgen@müller.example",
        "UPPER.CASE@EXAMPLE.COM",
        "a@b.io",
        "jane [at] example [dot] com",
        "jane.doe(at)example.org",
    ],
    "phone": [
        "(202) 555-0199",
        "(202)555-0199",
        "(123) 456-7890",
        "+1-415-555-0138",
        "+1 (415) 555-0138",
        "1-800-555-0199",
        "+14155550138",
        "212.555.0173",
        "212-555-0173",
        "212 555 0173",
        "212\u2011555\u20110173",
        "555-0142",
        "+44 20 7946 0983",
        "+44 (0)20 7946 0983",
        "+442079460983",
        "0044 20 7946 0983",
        "020 7946 0018",
        "(020) 7946 0018",
        "0161 496 0123",
        "01632 960123",
        "07700 900123",
        "+49 30 23125 000",
        "030 23125000",
        "+33 1 99 00 12 34",
        "01 99 00 12 34",
        "+61 2 5550 1234",
        "0491 570 156",
        "+91 98765 43210",
        "+81-3-1234-5678",
        "+86 138 0013 8000",
        "+34 612 34 56 78",
        "+55 11 91234-5678",
        "(11) 91234-5678",
        "+27 21 555 0123",
        "+353 1 555 0123",
    ],
    "card": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111111111111111",
        "4242 4242 4242 4242",
        "4012888888881881",
        "4222222222222",
        "5555 5555 5555 4444",
        "5105105105105100",
        "2223 0031 2200 3222",
        "3782 822463 10005",
        "378282246310005",
        "3714-496353-98431",
        "6011 1111 1111 1117",
        "3530111333300000",
        "3056 930902 5904",
        "30569309025904",
        "6200000000000005",
        "6759649826438453",
    ],
    "ssn": ["000-66-1500", "123-45-6789", "987-65-4320"],
    "ip": [
        "192.0.2.25",
        "198.51.100.7",
        "203.0.113.254",
        "172.16.254.1",
        "2001:db8::1",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
        "2001:db8:0:1:1:1:1:1",
        "fe80::1ff:fe23:4567:890a",
    ],
    "iban": [
        "GB82 WEST 1234 5698 7654 32",
        "GB82WEST12345698765432",
        "DE89 3704 0044 0532 0130 00",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947",
    ],
    "secret": SECRETS,
}
EXAMPLES = [(kind, piece) for kind, pieces in PIECES.items() for piece in pieces]

HARMLESS = [
    # arithmetic as in GSM8K
    "2025550199 + 1 = 2025550200",
    "He has 4155550138 grains and counts 10000000000 more.",
    "<<123-45-6789=-6711>> and 500-20-1000 = -520",
    "5000-400-3000=1600, 555-1000/4=305, 212+555+0173",
    "The sum 100 200 300 400 500 600 and 1,234,567,890.12 dollars",
    "$2,025,550,199.00 or 0.4111111111111111",
    "The number 4111111111111112 fails its check; 1234567812345670 has no issuer.",
    "numbers 01 02 03 04 05 06 07 08 09 10 11 12",
    "3.14159265358979 and 6.02214076e23 and 1700000000",
    # dates, times, versions, books
    "05-06-2021, 2021-03-14 10:20:30, 05.06.2021 12:00, 1990-1995, 03/04/2020",
    "In version 1.2.3.4 and v10.20.30.40, firmware 192.168.2.25, section 4.2.1.12, and 1.2.3.4",
    "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2, DOI 10.1038/s41586-020-2649-2",
    "550e8400-e29b-41d4-a716-446655440000",
    "12:30:45 a::b std::cafe 00:1A:2B:3C:4D:5E",
    # networks
    "localhost 127.0.0.1 0.0.0.0 255.255.255.0 10.0.0.0/8 ::1 fe80:: 999.1.2.300",
    "git@github.com:owner/name.git logo@2x.png @handle pip install name@1.2.3 a @ b",
    "https://example.com/a:b@c and x@y",
    # words about secrets
    "Your password: required. password = input('password'); api_key=YOUR_API_KEY",
    "The token sk-learn, hf_hub, task-oriented-dialogue-systems-are-good, AKIA, eyJhbGciOi",
    "The laws of GB82 and DE12 ABCD; RFC2616 HTTP 1234 5678",
]


def kinds(text: str) -> list[tuple[str, str]]:
    return [(span.kind, span.text) for span in private.find([text])]


@pytest.mark.parametrize(("kind", "piece"), EXAMPLES)
def test_a_piece_is_found_whole_wherever_it_stands(kind: str, piece: str) -> None:
    for before, after in [("", ""), ("It is ", "."), ("(see ", ")"), ("a:\n", "\nb"), ("«", "»")]:
        assert kinds(before + piece + after) == [(kind, piece)], (before, after)


@pytest.mark.parametrize(
    ("text", "kind", "piece"),
    [
        ("Call me at 2025550199 today", "phone", "2025550199"),
        ("Phone number: 98765 43210.", "phone", "98765 43210"),
        ("tel. 612 345 678", "phone", "612 345 678"),
        ("My SSN is 000661500", "ssn", "000661500"),
        ("social security number: 000 66 1500", "ssn", "000 66 1500"),
        ("IBAN: GB00 TEST 0000 0000 0000 00", "iban", "GB00 TEST 0000 0000 0000 00"),
        ("Pay GB82 WEST 1234 5698 7654 32 NOW PLEASE", "iban", "GB82 WEST 1234 5698 7654 32"),
        ("postgres://admin:hunter2@db.example.com/x", "secret", "hunter2"),
        ("password: rT8$jLpZ.\n", "secret", "rT8$jLpZ"),
        ("The password is Tr0ub4dor&3!", "secret", "Tr0ub4dor&3"),
        ("my_aws_secret = token '" + ALNUM + "abcd'", "secret", ALNUM + "abcd"),
        ("Key: " + OPEN_KEY + "\u2026", "secret", OPEN_KEY),
        ("from 192.0.2.25:8080", "ip", "192.0.2.25"),
        ("mailto:x@example.com?subject=1", "email", "x@example.com"),
    ],
)
def test_what_stands_before_decides(text: str, kind: str, piece: str) -> None:
    assert kinds(text) == [(kind, piece)]


@pytest.mark.parametrize("text", HARMLESS)
def test_other_numbers_and_words_are_left_alone(text: str) -> None:
    assert kinds(text) == []


def test_what_looks_like_many_tokens_takes_no_time() -> None:
    """Their number squared would be a quarter of an hour."""
    token = SECRETS[14]
    assert token.startswith("eyJ")
    assert kinds("eyJ-" * 250_000) == kinds("password=" * 100_000) == []
    assert kinds("eyJ-" * 9 + "Auth-" + token) == [("secret", token)]


def test_spans_say_where() -> None:
    texts = ["none", "ä a@b.io or +44 20 7946 0983 c@d.io", "", "000-66-1500"]
    spans = private.find(texts)
    assert [(span.index, span.kind) for span in spans] == [
        (1, "email"),
        (1, "phone"),
        (1, "email"),
        (3, "ssn"),
    ]
    assert all(texts[s.index][s.start : s.end] == s.text for s in spans)
    assert private.mask(texts[1], spans[:3]) == "ä [EMAIL] or [PHONE] [EMAIL]"
    assert private.find([]) == []


SHARDS = st.one_of(
    st.sampled_from([piece for _, piece in EXAMPLES]),
    st.sampled_from(["phone ", "SSN ", "IBAN ", "password: ", "://", "a:b@", "call me at ", "٣٤"]),
    st.text(alphabet="0123456789-. +()/@:abAB[]=_", max_size=12),
    st.text(max_size=5),
)


@given(st.lists(SHARDS, max_size=6).map("".join))
@settings(max_examples=300, deadline=None)
def test_nothing_is_found_in_a_masked_text(text: str) -> None:
    spans = private.find([text])
    ends = [0]
    for span in spans:
        assert ends[-1] <= span.start < span.end <= len(text)
        assert text[span.start : span.end] == span.text
        ends.append(span.end)
    masked = private.mask(text, spans)
    assert private.find([masked]) == []
    assert private.mask(masked, private.find([masked])) == masked


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value or [] for text in texts_of(item)]


@pytest.mark.parametrize("name", ["sft_dirty", "preference_dirty"])
def test_injected_pieces_are_found_exactly(shared_data: Path, name: str) -> None:
    with gzip.open(shared_data / "raw_dirty" / f"{name}.jsonl.gz", "rt", newline="\n") as file:
        rows = [texts_of(json.loads(line)) for line in file]
    truth_file = shared_data / "raw_dirty" / f"{name}.truth.jsonl"
    facts = map(json.loads, truth_file.read_text(encoding="utf-8").splitlines())
    truth = {fact["row"]: sorted(fact["spans"]) for fact in facts if fact["issue"] == "pii"}
    places = [row for row, texts in enumerate(rows) for _ in texts]
    found: dict[int, list[str]] = {}
    for span in private.find([text for texts in rows for text in texts]):
        found.setdefault(places[span.index], []).append(span.text)
    assert {row: sorted(pieces) for row, pieces in found.items()} == truth


def test_grade_school_arithmetic_holds_nothing_private(shared_data: Path) -> None:
    with gzip.open(shared_data / "sft" / "gsm8k.train.jsonl.gz", "rt", newline="\n") as file:
        texts = [text for line in file for text in texts_of(json.loads(line))]
    assert private.find(texts) == []
    assert any(re.search(r"\d{7}", text) for text in texts)  # there is something to mistake

"""Near-duplicates against brute force, against planted ones, and at the extremes."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward import duplicates, minhash
from reward.duplicates import NearDuplicate, near_duplicates

Write = Callable[..., Path]
PROSE = (
    "the river carried small boats past old stone houses while children played near water and "
    "merchants sold bread fruit cloth salt under bright awnings every market day until evening "
    "bells rang slowly over distant hills where shepherds gathered their flocks before night fell "
    "and travellers shared stories about far cities gardens storms ships and forgotten kings"
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def arrow(texts: list[str], batch: int = 100) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.arrow"
        schema = pa.schema([("text", pa.string())])
        with pa.ipc.new_file(str(path), schema) as file:
            for start in range(0, len(texts), batch):
                column = pa.array(texts[start : start + batch], pa.string())
                file.write_batch(pa.record_batch([column], schema=schema))
        return path

    return arrow


def sentence(rng: random.Random, words: int = 60) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(words))


def variant(text: str, rng: random.Random, share: float) -> str:
    words = [word if rng.random() >= share else sentence(rng, 1) for word in text.split(" ")]
    return " ".join(words)


def grams(text: str) -> set[tuple[str, ...]]:
    """The definition once more, letter by letter."""
    spaced = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower())
    letters = list(" ".join(spaced.split()))
    return {tuple(letters[i : i + 5]) for i in range(len(letters) - 4)} or {tuple(letters)}


def resemblance(first: str, second: str) -> float:
    one, other = grams(first), grams(second)
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("threshold", [0.8, 0.9])
def test_equals_brute_force(write: Write, threshold: float) -> None:
    rng = random.Random(7)
    texts = [sentence(rng) for _ in range(150)]
    for share in (0.0, 0.01, 0.02, 0.04, 0.06, 0.1):
        texts += [variant(text, rng, share) for text in rng.sample(texts, 25)]
    rng.shuffle(texts)
    sets = [grams(text) for text in texts]
    expected: dict[int, tuple[int, float]] = {}
    for row, one in enumerate(sets):
        for original, other in enumerate(sets[:row]):
            alike = len(one & other) / len(one | other)
            if original not in expected and alike >= threshold:
                expected[row] = original, alike
                break
    found = near_duplicates(write(texts), threshold)
    assert len(found) > 60
    assert {match.index: (match.original, match.similarity) for match in found} == expected


def test_recall_at_the_default_threshold() -> None:
    rng = random.Random(8)
    pairs = []
    while len(pairs) < 300:
        text = sentence(rng)
        other = variant(text, rng, 0.12)
        if 0.7 <= resemblance(text, other) < 0.75:
            pairs += [text, other]
    met = minhash.candidates(minhash.signatures(pairs), 0.7)
    expected = {row + 1 << 32 | row for row in range(0, len(pairs), 2)}
    assert len(expected & set(met.tolist())) >= 0.97 * len(expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1))
def test_signatures_do_not_depend_on_the_company(texts: list[str]) -> None:
    together = minhash.signatures(texts)
    assert (together == np.concatenate([minhash.signatures([text]) for text in texts])).all()


def test_what_is_left_has_no_pair(write: Write) -> None:
    """A chain: each row is like the one before it, the last not at all like the first."""
    rng = random.Random(3)
    chain = [sentence(rng, 100)]
    for step in range(12):
        words = chain[-1].split()
        words[8 * step : 8 * step + 8] = sentence(rng, 8).split()
        chain.append(" ".join(words))
    removed = {match.index for match in near_duplicates(write(chain))}
    left = [text for row, text in enumerate(chain) if row not in removed]
    assert 1 < len(left) < len(chain)
    assert max(resemblance(one, other) for one, other in combinations(left, 2)) < 0.7


def rows_of(name: str, folder: Path) -> tuple[list[int], list[str], dict[int, dict[str, Any]]]:
    """Usable rows of a dirty sample: their numbers and texts; and what was done to which."""
    numbers, texts = [], []
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file):
            fields = [
                field
                if isinstance(field, str)
                else "\n".join(turn["content"] for turn in field or [])
                for field in json.loads(line).values()
            ]
            if name == "sft_dirty":
                fields = [" ".join(fields[:2]), fields[2]]  # the input may be empty
            if all(field.strip() for field in fields):
                numbers.append(number)
                texts.append("\x1e".join(fields))
    lines = (folder / f"{name}.truth.jsonl").read_text(encoding="utf-8").split("\n")
    truth = {fault["row"]: fault for fault in map(json.loads, filter(None, lines))}
    return numbers, texts, truth


@pytest.mark.parametrize("name", ["sft_dirty", "preference_dirty"])
def test_planted_in_real_rows(write: Write, shared_data: Path, name: str) -> None:
    numbers, texts, truth = rows_of(name, shared_data / "raw_dirty")
    pairs = {
        frozenset((numbers[match.index], numbers[match.original]))
        for match in near_duplicates(write(texts))
    }
    planted = {
        issue: {
            frozenset((fault["row"], fault["ref"]))
            for fault in truth.values()
            if fault["issue"] == issue
        }
        for issue in ("near_duplicate", "exact_duplicate", "label_conflict")
    }
    near = planted["near_duplicate"]
    pairs -= planted["exact_duplicate"] | planted["label_conflict"]
    assert len(near) >= 15
    assert len(pairs & near) / len(near) >= 0.95
    assert len(pairs & near) / len(pairs) >= 0.95


LONG_NO = "no we should rather wait until somebody has asked the neighbours"
LONG_YES = "yes it is a fine idea to begin with the smaller boats first"


@pytest.mark.parametrize(
    ("answer", "other", "is_found"),
    [
        (LONG_NO, LONG_YES, False),  # several pairs of one long prompt are no duplicates
        (LONG_NO, "yes", False),
        (LONG_NO, LONG_NO.replace("rather", "perhaps"), True),
        ("no", "yes", False),  # short answers that differ are other answers
        ("Ottawa, I think", "ottawa – i think!", True),
        (LONG_NO, f"{LONG_YES[:20]}\x1e{LONG_YES[20:]}", True),  # other fields: the whole decides
    ],
)
def test_a_long_field_must_be_alike(write: Write, answer: str, other: str, is_found: bool) -> None:
    texts = [f"{PROSE}\x1e{answer}", f"{PROSE}\x1e{other}"]
    assert resemblance(*texts) >= 0.7
    assert bool(near_duplicates(write(texts))) is is_found


def test_copies_share_an_original(write: Write) -> None:
    text = PROSE
    near = text.replace("shepherds", "farmers")
    found = near_duplicates(write([text, "x", near, text.upper() + "!", f"  {near}.", "x"]))
    alike = resemblance(text, near)
    assert found == [
        NearDuplicate(2, 0, alike),
        NearDuplicate(3, 0, 1.0),
        NearDuplicate(4, 0, alike),
        NearDuplicate(5, 1, 1.0),
    ]


def test_scripts_of_the_world(write: Write) -> None:
    russian = "Съешь же ещё этих мягких французских булок, да выпей чаю, пока он не остыл."
    chinese = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
    texts = [
        russian,
        chinese,
        russian.upper().replace("ЧАЮ", "ЧАЙ"),
        chinese[:-1],
        "🙂🙂",
        "🎉",
        "🙂🙂",
    ]
    found = near_duplicates(write(texts))
    assert [(match.index, match.original) for match in found] == [(2, 0), (3, 1), (6, 4)]


@pytest.mark.parametrize(
    ("one", "other", "is_found"),
    [
        ("लड़का कहाँ है", "लड़की कहाँ हैं", False),  # the boy, the girls: only marks differ
        ("caf\u00e9 ＡＢＣ", "cafe\u0301 abc", True),
        ("\u2764\ufe0f", "\u2600\ufe0f", False),  # a heart, the sun
    ],
)
def test_marks_are_part_of_words(write: Write, one: str, other: str, is_found: bool) -> None:
    assert bool(near_duplicates(write([one, other]))) is is_found


@pytest.mark.parametrize("texts", [[], ["one"], ["", ""], ["ab", "AB", "abc"]])
def test_few_or_short(write: Write, texts: list[str]) -> None:
    found = [(match.index, match.original) for match in near_duplicates(write(texts))]
    assert found == ([(1, 0)] if len(texts) > 1 else [])


def test_threshold_must_be_a_similarity(write: Write) -> None:
    with pytest.raises(ValueError, match=r"threshold=1\.2"):
        near_duplicates(write([]), threshold=1.2)


def test_processes_change_nothing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    texts = [sentence(rng) for _ in range(300)]
    texts += [variant(text, rng, 0.02) for text in texts]
    path = write(texts)
    inline = near_duplicates(path)
    monkeypatch.setattr(duplicates, "_ROWS_A_TASK", 150)
    assert near_duplicates(path, processes=2) == inline
    assert len(inline) > 250


@pytest.mark.parametrize("boilerplate", ["copies", "almost copies", "one prompt, many answers"])
def test_a_crowd_is_compared_in_linear_time(
    write: Write, monkeypatch: pytest.MonkeyPatch, boilerplate: str
) -> None:
    rng, text = random.Random(1), PROSE
    texts = {
        "copies": [text] * 3000,
        "almost copies": [f"{text} {sentence(rng, 2)}" for _ in range(3000)],
        "one prompt, many answers": [f"{text}\x1e{sentence(rng, 9)}" for _ in range(1000)],
    }[boilerplate]
    compared, met = [], []
    similarity, equal_values = duplicates._similarity, minhash._equal_values

    def counting(*args: Any) -> float | None:
        compared.append(args)
        return similarity(*args)

    def estimating(signatures: Any, pairs: Any) -> Any:
        met.append(len(pairs))
        return equal_values(signatures, pairs)

    monkeypatch.setattr(duplicates, "_similarity", counting)
    monkeypatch.setattr(minhash, "_equal_values", estimating)
    found = near_duplicates(write(texts))
    assert len(compared) <= 8 * len(texts)
    assert sum(met) <= 25 * 16 * len(texts)  # bands; 4 met, and 12 of which 8 are kept
    expected = 0 if "prompt" in boilerplate else len(texts) - 1
    assert len(found) == expected
    assert {match.original for match in found} <= {0}


def test_a_duplicate_is_found_in_a_crowd(write: Write) -> None:
    """Many rows share a prompt; each of ten has one near-duplicate among the others."""
    rng, prompt = random.Random(2), PROSE
    answers = [sentence(rng, 12) for _ in range(600)]
    texts = [f"{prompt}\x1e{answer}" for answer in answers]
    texts += [f"{prompt}\x1e{answer} indeed" for answer in answers[:10]]
    found = near_duplicates(write(texts))
    assert [(match.index, match.original) for match in found] == [
        (600 + number, number) for number in range(10)
    ]


words = st.lists(st.sampled_from(PROSE.split()), max_size=30).map(" ".join)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.text(max_size=30) | words | st.lists(words, max_size=3).map("\x1e".join)),
    st.integers(1, 9),
    st.integers(1, 200),
)
def test_any_text(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    size: int,
    characters: int,
) -> None:
    found = near_duplicates(write(texts))
    assert [match.index for match in found] == sorted({match.index for match in found})
    removed = {match.index for match in found}
    for match in found:
        assert match.original < match.index
        assert match.original not in removed
        assert 0.7 <= match.similarity <= 1
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "_ROWS_A_TASK", size)
        patch.setattr(duplicates, "_CHARACTERS_AT_ONCE", characters)
        patch.setattr(minhash, "_PAIRS_AT_ONCE", size)
        assert near_duplicates(write(texts, batch=size)) == found


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_orphans(write: Write, tmp_path: Path, how: signal.Signals) -> None:
    rng = random.Random(4)
    path = write([sentence(rng, 2000) for _ in range(200)] * 40)
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            from pathlib import Path
            from reward import duplicates

            if __name__ == "__main__":
                duplicates._ROWS_A_TASK = 100
                duplicates.near_duplicates(Path({str(path)!r}), processes=2)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        process = psutil.Process(parent.pid)
        while len(children := process.children(recursive=True)) < 3:  # two and their tracker
            assert parent.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        assert parent.poll() is None, "it ended before it could be interrupted"
        if how is signal.SIGINT:
            os.killpg(parent.pid, how)  # as a terminal does
        else:
            parent.kill()
        assert parent.wait(10) != 0
    assert psutil.wait_procs(children, timeout=10)[1] == []

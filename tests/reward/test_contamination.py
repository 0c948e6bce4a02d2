"""Shared n-grams against brute force; planted leaks; benchmark files; what hits say."""

import gzip
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.entry import UserError
from reward import ngrams
from reward.benchmarks import Document, questions_in, read_documents, text_of_row
from reward.contamination import Coverage, Hit, Index
from reward.ngrams import Reading

LEAKS = {"leak_verbatim", "leak_normalised", "leak_embedded"}
QUESTION = "Which of these planets is the nearest to the sun?"  # 10 words


def is_in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")


def without_marks(text: str, reading: Reading) -> str:
    """A text without the marks that neither belong to a word nor separate two."""
    kept = ""
    for before, character, after in zip(f" {text}", text, f"{text[1:]} ", strict=False):
        is_mark = not is_in_word(character) and not character.isspace()
        is_inner = (
            {before, after} <= set("0123456789")
            if character in ",."
            else character in "'’" and is_in_word(before) and is_in_word(after)
        )
        if (reading is Reading.joined and is_mark) or (reading is Reading.usual and is_inner):
            continue
        kept += character
    return kept


def words_of(text: str, reading: Reading = Reading.usual) -> list[str]:
    """The words of a text, character by character."""
    found, current = [], ""
    for character in without_marks(unicodedata.normalize("NFKC", text), reading):
        is_word = is_in_word(character)
        stands_alone = is_word and re.match(
            r"[\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]", character
        )
        if current and (not is_word or stands_alone):
            found.append(current)
            current = ""
        if stands_alone:
            found.append(character)
        elif is_word:
            current += character.lower()[0]
    return found + [current] * bool(current)


def grams_of(text: str, n: int, reading: Reading = Reading.usual) -> set[tuple[str, ...]]:
    words = words_of(text, reading)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def entries_of(document: str, n: int) -> dict[tuple[str, ...], tuple[bool, bool]]:
    """The n-grams of a document: whether one is of the question, whether it is as the text stands."""
    entries: dict[tuple[str, ...], tuple[bool, bool]] = {}
    for reading in Reading:
        for texts, is_asked in ((questions_in(document), True), ([document], False)):
            for gram in set().union(*(grams_of(text, n, reading) for text in texts)):
                entries.setdefault(gram, (is_asked, reading is Reading.usual))
    return entries


def share_of(kinds: list[bool], entries: list[bool]) -> tuple[int, int]:
    """How many of these are there, and how many are looked for, by whether each is as it stands."""
    size = max(sum(entries), min(1, len(entries)))
    return min(len(kinds), size), size


def brute_force(
    documents: list[str], texts: list[str], n: int
) -> set[tuple[int, int, int, int, bool | None]]:
    """What `found_by` tells, without template n-grams; for n up to 8."""
    every = [entries_of(document, n) for document in documents]
    seen = Counter(gram for entries in every for gram in entries)
    found = set()
    for number, wanted in enumerate(grams_of(text, n) for text in texts):
        for doc, entries in enumerate(every):
            kept = {gram: kinds for gram, kinds in entries.items() if seen[gram] < 10}
            if not wanted & kept.keys():
                continue
            there, size = share_of(
                [usual for gram, (_, usual) in kept.items() if gram in wanted],
                [usual for _, usual in kept.values()],
            )
            asked, question_size = share_of(
                [usual for gram, (of_it, usual) in kept.items() if of_it and gram in wanted],
                [usual for of_it, usual in kept.values() if of_it],
            )
            questions = list(questions_in(documents[doc]))
            joined = len(words_of(questions[0], Reading.joined)) - n + 1
            question_size = min(question_size, joined) if joined > 0 else question_size
            is_whole = asked > 0 and asked >= 0.9 * question_size
            found.add((number, doc, there, size, is_whole if len(questions) == 1 else None))
    return found


def found_by(
    documents: list[str], texts: list[str], n: int
) -> set[tuple[int, int, int, int, bool | None]]:
    """Text, document, shared n-grams, n-grams, and for documents of one question if that is there."""
    clear = [len(list(questions_in(document))) == 1 for document in documents]
    return {
        (hit.text, hit.doc, hit.grams, hit.of, hit.has_question if clear[hit.doc] else None)
        for hit in Index.build(documents_of(documents), n).find(texts)
    }


def documents_of(texts: list[str], task: str = "quiz") -> list[Document]:
    return [Document(task, number, text) for number, text in enumerate(texts)]


# Few words, so that texts share n-grams; characters of one, two and four bytes, marks, case
# mappings that change a text's length, ligatures, halves of surrogate pairs.
SOME_WORDS = st.sampled_from(
    [
        *(
            "the",
            "Cat",
            "sat.",
            "on-a",
            "mat's",
            "3,5",
            "1,000.5.",
            "don’t",
            "'the'",
            "a's,b",
            "x-y",
            "mat?\n",
            "",
            "_",
            "\n",
            "été",
            "E\u0301te",
            "ß",
            "ﬁn",
        ),
        *(
            "中文",
            "かな",
            "İs",
            "ς",
            "Σ",
            "हिन्दी",
            "\ud800",
            "𠀀𠀁",
            "ก็",
            "\u2028",
            "Ⅷ",
            "x\u00adx",
        ),
    ]
)
SOME_TEXT = st.lists(SOME_WORDS, max_size=25).map(" ".join) | st.text(max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.lists(SOME_TEXT, max_size=14), st.lists(SOME_TEXT, max_size=5), st.integers(1, 5))
def test_hits_are_those_of_brute_force(documents: list[str], texts: list[str], n: int) -> None:
    assert found_by(documents, texts, n) == brute_force(documents, texts, n)


def test_brute_force_agrees_on_long_texts_and_many_batches() -> None:
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(draw.choice("abcdef") + draw.choice("xyé") for _ in range(length))

    documents = [text(60) for _ in range(300)]
    texts = [text(draw.choice([0, 3, 40, 4000])) for _ in range(60)] + [text(50_000)]
    texts[7] += documents[12]
    assert max(map(len, texts)) > 2 * ngrams._BATCH
    hits = found_by(documents, texts, 5)
    assert len(hits) > 100
    assert hits == brute_force(documents, texts, 5)


@given(st.lists(SOME_TEXT, max_size=5))
def test_any_text_is_accepted(texts: list[str]) -> None:
    index = Index.build(documents_of([*texts, QUESTION]))
    found = {hit.text for hit in index.find([*texts, QUESTION])}
    assert found >= {number for number, text in enumerate(texts) if len(words_of(text)) >= 13}
    assert len(texts) in found
    assert Index.build([]).find(texts) == []


def test_other_characters_do_not_change_what_ascii_text_finds() -> None:
    sentence = "one two three four five six seven eight nine ten eleven twelve Thirteen fourteen"
    index = Index.build(documents_of([sentence]))
    plain, with_accent = index.find([sentence, f"é {sentence} 中文"])
    assert (plain.grams, plain.of) == (with_accent.grams, with_accent.of) == (2, 2)
    assert plain.snippet == with_accent.snippet


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        (QUESTION, True),
        (f"My homework: {QUESTION.lower()[:-1]} Thank you!", True),
        ("Which of these planets is the nearest to the moon?", False),
        ("which of these\nplanets is the nearest to the sun", True),
        ("Which of these planets is the nearest to", False),
    ],
)
@pytest.mark.parametrize(
    "document",
    [
        QUESTION,
        f"Question: {QUESTION}\nAnswer: Mercury",
        f"The sun has planets.\nQuestion: {QUESTION}\nAnswer:\nMercury",
        f"问题：{QUESTION}",
    ],
)
def test_a_short_question_counts_as_a_whole(document: str, text: str, is_found: bool) -> None:
    hits = Index.build(documents_of([document])).find([text])
    assert [hit.has_question for hit in hits] == [True] * is_found


LONG_QUESTION = (
    "A bird-watcher's list has 1,000 birds; how many of them can't fly at all in winter?"
)
CHOICES = "\n".join(" ".join(f"c{i}x{k}" for k in range(60)) for i in range(4))


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        (LONG_QUESTION, True),
        ("so " + LONG_QUESTION.replace("'", "’").upper(), True),
        ("a birdwatchers list has 1000 birds how many of them cant fly at all in winter", True),
        ("a bird watcher s list has 1 000 birds how many of them can t fly at all in winter", True),
        (LONG_QUESTION.replace("all in winter", "night in June"), False),
        (CHOICES.split("\n")[0][:70], False),
    ],
)
@pytest.mark.parametrize("opening", ["", "Question: ", "Birds are animals.\nQuestion: "])
def test_a_long_question_counts_as_a_whole(opening: str, text: str, is_found: bool) -> None:
    document = f"{opening}{LONG_QUESTION}\n{CHOICES}"
    hits = Index.build(documents_of([document])).find([text])
    assert [hit.is_strong for hit in hits if hit.has_question] == [True] * is_found
    assert all(hit.grams < 0.1 * hit.of for hit in hits)


def test_a_long_question_may_miss_one_word_in_ten() -> None:
    words = [f"w{k}" for k in range(22)]  # 10 13-grams
    index = Index.build(documents_of([" ".join(words) + "\n" + CHOICES]))
    hits = index.find([" ".join(words[start:]) for start in (0, 1, 2)])
    assert [(hit.grams, hit.has_question) for hit in hits] == [(10, True), (9, True), (8, False)]


MARKS = re.compile(r"[^\w\s]|_")


@pytest.mark.parametrize(
    "changed",
    [
        str,
        str.lower,
        lambda text: MARKS.sub("", text),
        lambda text: MARKS.sub(" ", text),
        lambda text: re.sub("['’]", "", text),
        lambda text: text.replace("'", "’"),
        lambda text: "  \n ".join(text.split()),
    ],
    ids=["verbatim", "lower", "deleted", "spaced", "no-apostrophes", "curly", "white-space"],
)
@pytest.mark.parametrize("name", ["gsm8k.test", "arc_easy.test", "arc_challenge.test"])
def test_questions_are_found_however_they_are_normalised(
    shared_data: Path, name: str, changed: Callable[[str], str]
) -> None:
    path = shared_data / "eval" / f"{name}.jsonl.gz"
    index = Index.build(read_documents(str(path)))
    asked = {
        doc: row["question"]
        for doc, row in enumerate(rows_of(path))
        if len(row["question"].split()) >= 8
    }
    hits = index.find([changed(question) for question in asked.values()])
    places = list(asked)
    found = {hit.doc for hit in hits if hit.is_strong and hit.doc == places[hit.text]}
    assert len(found) >= 0.995 * len(asked)


def test_questions_of_every_width_are_found_and_shorter_ones_not() -> None:
    lines = [" ".join(f"w{i}x{k}" for k in range(i)) for i in range(4, 16)]
    index = Index.build(documents_of(lines))
    assert [hit.doc + 4 for hit in index.find([f"so {line} it is" for line in lines])] == [
        *range(8, 16)
    ]
    assert index.coverage([]) == [Coverage("quiz", found=0, searchable=8, documents=12)]


def test_what_ten_documents_of_a_task_share_is_its_template() -> None:
    template = "Answer the following question by choosing the right option from the list given below here: "
    mine = [f"{template} number {i} " + " ".join(f"w{i}x{k}" for k in range(20)) for i in range(10)]
    hits = Index.build(documents_of(mine)).find([template, mine[3]])
    assert [(hit.text, hit.doc) for hit in hits] == [(1, 3)]
    assert hits[0].grams == hits[0].of < len(grams_of(mine[3], 13))
    assert len(Index.build(documents_of(mine[:9])).find([template])) == 9
    split = documents_of(mine[:5], "one") + documents_of(mine[5:], "two")  # five of each task
    assert len(Index.build(split).find([template])) == 10


def test_texts_do_not_run_into_each_other() -> None:
    first, second = "one two three four five six seven", "eight nine ten eleven twelve thirteen 14"
    index = Index.build(documents_of([f"{first} {second}"]))
    assert index.find([first, second]) == []
    assert len(index.find([f"{first}\n{second}"])) == 1


def test_hits_say_what_and_coverage_how_much() -> None:
    texts = [" ".join(f"{name}{k}" for k in range(43)) for name in ("Ann's", "b", "c")]
    index = Index.build([*documents_of(texts, "quiz"), Document("other", 5, QUESTION)])
    hits = index.find(["nothing", f"so {texts[0][:120]}", QUESTION, texts[2]])
    assert [(hit.text, hit.task, hit.doc) for hit in hits] == [
        (1, "quiz", 0),
        (2, "other", 5),
        (3, "quiz", 2),
    ]
    assert hits[0].detail == (
        f'quiz document 0: {hits[0].grams} of {hits[0].of} 13-grams, "{texts[0][:60]} …"'
    )
    assert hits[1].detail == f'other document 5: the whole question, "{QUESTION[:-1]}"'
    assert index.coverage(hits) == [Coverage("other", 1, 1, 1), Coverage("quiz", 2, 3, 3)]


@pytest.mark.parametrize(
    ("grams", "of", "has_question", "expected"),
    [
        (1, 31, False, False),
        (4, 31, False, True),
        (49, 900, False, False),
        (50, 900, False, True),
        (0, 20, True, True),
    ],
)
def test_strong_hits(grams: int, of: int, has_question: bool, expected: bool) -> None:
    assert Hit(0, "quiz", 0, grams, of, has_question, "").is_strong is expected


def test_an_index_is_saved_and_mapped(tmp_path: Path) -> None:
    texts = [f"{QUESTION} " + " ".join(f"w{i}x{k}" for k in range(i)) for i in range(30)]
    for number, documents in enumerate(([], documents_of(texts), documents_of(texts, "überprüft"))):
        index = Index.build(documents, 13)
        path = tmp_path / f"{number}.arrow"
        index.save(path)
        loaded = Index.load(path)
        assert loaded.find(texts) == index.find(texts)
        assert loaded.coverage([]) == index.coverage([])
        assert not loaded.hashes.flags.owndata
    assert len(list(tmp_path.iterdir())) == 3
    path.write_text("{}")
    for wrong in (path, tmp_path / "none"):
        with pytest.raises(UserError, match="no contamination index"):
            Index.load(wrong)


def test_benchmark_files(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": "a b",
            "ctx_a": "He",
            "ctx": "He runs",
            "endings": ["fast", "He runs"],
            "label": "x y",
        },
        {"category": "a b", "answer": "to", "question": "Where to?", "kwargs": [{"n": 1}]},
        {"text": "https://example.com/a", "data": "x" * 200},
        {"choices": {"text": ["one", "two"], "label": ["A", "B"]}, "Question": "多少"},
    ]
    assert [text_of_row(row) for row in rows] == [
        "He runs\nfast",
        "Where to?",
        "",
        "多少\none\ntwo",
    ]
    (tmp_path / "quiz.test.jsonl").write_text("\n".join(["broken", *map(json.dumps, rows)]))
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"question,answer\nwhy,because\n"))
    written = [{"task": "gsm8k", "doc": 7, "text": "a\nb"}]
    (tmp_path / "written.json").write_text(json.dumps(written))
    documents = read_documents(str(tmp_path))
    assert [(document.task, document.doc) for document in documents] == [
        *(("quiz.test", number) for number in (1, 2, 4)),
        ("table", 0),
        ("gsm8k", 7),
    ]
    (tmp_path / "quiz.test.jsonl").write_text('{"n": 1}\n')
    for path in ("quiz.test.jsonl", "none.jsonl"):
        with pytest.raises(UserError, match=path):
            read_documents(str(tmp_path / path))


def rows_of(path: Path) -> list[dict[str, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_planted_leaks_are_found_and_nothing_else(shared_data: Path) -> None:
    names = [
        "gsm8k.test",
        "arc_easy.test",
        "arc_challenge.test",
        "mmlu.test",
        "hellaswag.validation",
    ]
    files = [shared_data / "eval" / f"{name}.jsonl.gz" for name in names]
    index = Index.build([item for file in files for item in read_documents(str(file))])
    rows = rows_of(shared_data / "raw_dirty" / "sft_dirty.jsonl.gz")
    hits = index.find(["\n".join(value for value in row.values() if value) for row in rows])
    truth = {
        (
            leak["row"],
            leak["eval_file"].removeprefix("eval/").removesuffix(".jsonl.gz"),
            leak["eval_row"],
        )
        for leak in rows_of(shared_data / "raw_dirty" / "sft_dirty.truth.jsonl")
        if leak["issue"] in LEAKS
    }
    assert len(truth) == 53
    assert {(hit.text, hit.task, hit.doc) for hit in hits} == truth
    assert all(hit.is_strong for hit in hits)


def test_a_split_is_recognised_and_other_rows_are_not(shared_data: Path) -> None:
    index = Index.build(read_documents(str(shared_data / "eval" / "gsm8k.test.jsonl.gz")))
    test = rows_of(shared_data / "eval" / "gsm8k.test.jsonl.gz")
    (coverage,) = index.coverage(index.find([row["question"] for row in test]))
    assert coverage.found / coverage.documents > 0.99
    train = rows_of(shared_data / "sft" / "gsm8k.train.jsonl.gz")
    hits = index.find([f"{row['question']}\n{row['answer']}" for row in train])
    assert len({hit.text for hit in hits}) <= 10  # of 7,473
    assert len([hit for hit in hits if hit.is_strong]) <= 3  # one question twice, one nearly so

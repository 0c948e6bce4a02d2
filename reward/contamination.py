"""Texts that repeat a benchmark: an index of the word n-grams of its documents, and the look-up.

The rule is GPT-3's (Brown et al. 2020, appendix C) and lm-eval's: a text is suspect if it shares 13
words in a row with a document. N-grams that stand in ten or more documents of a task are its template
or a stock phrase and say nothing. A question counts as a whole, however long the choices and answers
after it are: one of 8 to 12 words where all of it stands in a row, a longer one by nine tenths of its
n-grams. GPT-3 too goes down to 8 words where documents are short; shorter ones are not looked for.

Documents are in the index as they stand, and with punctuation deleted or replaced by spaces wherever
that gives other words; the texts are read once.

A hit is a reason to look, not a verdict: benchmarks quote laws, songs and proverbs that others quote.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.entry import UserError
from reward.benchmarks import Document, questions_in
from reward.ngrams import Bools, Hashes, Numbers, Reading, Words, batches, bit_filter, passing

N = 13
SHORTEST_QUESTION = 8  # words
BOILERPLATE = 10  # documents of one task that share an n-gram

_PAGE = 50  # n-grams, of documents too long for a share to say much
# Bits of the filters for each hash. Grams are many: more bits would no longer fit a cache. Questions
# are few, and each one that passes in vain is looked for at five widths.
_GRAM_BITS = 16
_QUESTION_BITS = 256
_SNIPPET = 60  # characters
_FORMAT = {b"contents": b"contamination index 2"}
_ARRAYS = ["hashes", "owners", "questions", "tasks", "numbers", "sizes", "question_sizes"]
_ARRAYS += ["gram_filter", "question_filter"]


@dataclass(frozen=True, slots=True)
class Hit:
    """A text that shares words with a document."""

    text: int  # its place among the texts
    task: str
    doc: int
    grams: int  # different n-grams of the document that stand in the text
    of: int  # different n-grams of the document that are looked for
    has_question: bool  # the whole of a question stands in the text
    snippet: str  # the first shared words, as the text has them
    n: int = N

    @property
    def is_strong(self) -> bool:
        """Whether more is shared than a phrase: a question, a tenth of the document, or a page.

        On 15,500 clean rows this kept the real overlaps (one question with other numbers, one prompt
        in two benchmarks) and left out the accidents (a common loop in Python, a recipe's first line);
        of planted leaks it left out none.
        """
        return self.has_question or 10 * self.grams >= self.of or self.grams >= _PAGE

    @property
    def is_whole(self) -> bool:
        """Whether most of the document is there, not only what it shares with others of its kind."""
        return 2 * self.grams >= self.of or self.grams >= _PAGE

    @property
    def detail(self) -> str:
        """One line for a user, such as `gsm8k document 7: 24 of 31 13-grams, "Ann has …"`."""
        shared = [f"{self.grams} of {self.of} {self.n}-grams"] if self.grams else []
        shared += ["the whole question"] if self.has_question else []
        return f'{self.task} document {self.doc}: {" and ".join(shared)}, "{self.snippet}"'


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a task was found in the texts."""

    task: str
    found: int  # documents with a hit
    searchable: int  # documents long enough to be looked for
    documents: int


@dataclass(frozen=True, eq=False)
class Index:
    """The n-grams of documents, sorted by hash; an entry is one n-gram, or short question, of one.

    Attributes:
        n: words of an n-gram.
        names: the tasks, sorted.
        hashes: sorted, uint64, shape (entries,).
        owners: the document of each entry, uint32, shape (entries,).
        questions: the question that an entry is of, from 1, or 0 for none, uint32, shape (entries,).
        tasks: the place of each document's task in `names`, uint32, shape (documents,).
        numbers: each document's number in its task, int64, shape (documents,).
        sizes: different n-grams of each document as it stands, int64, shape (documents,).
        question_sizes: n-grams of each question, in the reading with fewest, and of none, int64,
            shape (questions + 1,).
        gram_filter: a bit for each value of a hash's leading bits, set where an entry has it; uint8.
        question_filter: the same for the first words of short questions; uint8.
    """

    n: int
    names: list[str]
    hashes: Hashes
    owners: NDArray[np.uint32]
    questions: NDArray[np.uint32]
    tasks: NDArray[np.uint32]
    numbers: Numbers
    sizes: Numbers
    question_sizes: Numbers
    gram_filter: NDArray[np.uint8]
    question_filter: NDArray[np.uint8]

    @classmethod
    def build(cls, documents: Iterable[Document], n: int = N) -> "Index":
        """The index of some documents, of any number of tasks, by their `n`-grams."""
        chosen = sorted(documents, key=lambda document: document.task)
        names = sorted({document.task for document in chosen})
        place = {name: number for number, name in enumerate(names)}
        tasks = np.array([place[document.task] for document in chosen], np.uint32)
        texts = [document.text for document in chosen]
        asked = [(owner, line) for owner, text in enumerate(texts) for line in questions_in(text)]
        lines = [line for _, line in asked]
        owner_of = np.array([owner for owner, _ in asked], np.int64)
        parts = []
        for reading in (Reading.usual, Reading.split, Reading.joined):
            short, short_line, opening = _short_questions(lines, n, reading)
            long, long_line = _grams(lines, n, reading)
            grams, owner = _grams(texts, n, reading)
            parts.append(
                (
                    np.concatenate((short, long, grams)),
                    np.concatenate((owner_of[short_line], owner_of[long_line], owner)),
                    # An n-gram is there twice, and stays as the first: as one of its question.
                    np.concatenate(
                        (short_line + 1, len(asked) + 1 + long_line, np.zeros_like(owner))
                    ),
                    opening,
                )
            )
        hashes, owners, questions, openings = map(np.concatenate, zip(*parts, strict=True))
        is_gram = (questions == 0) | (questions > len(asked))
        is_usual = np.arange(len(hashes)) < len(parts[0][0])
        # By hash, then document, and so by task too: the documents are sorted by task.
        order = np.lexsort((owners, hashes))
        order = order[_is_first(hashes[order], owners[order])]
        run = np.cumsum(_is_first(hashes[order], tasks[owners[order]])) - 1  # equal, of one task
        order = order[np.bincount(run)[run] < BOILERPLATE]
        hashes, owners, questions = hashes[order], owners[order], questions[order]
        is_gram, is_usual = is_gram[order], is_usual[order]
        question_sizes = _sizes(questions, is_usual, 2 * len(asked) + 1)
        # Fewer words are left of a question where its hyphens are deleted.
        fewest = np.bincount(parts[-1][2], minlength=len(question_sizes))
        question_sizes = np.where(fewest, np.minimum(question_sizes, fewest), question_sizes)
        return cls(
            n=n,
            names=names,
            hashes=hashes,
            owners=owners.astype(np.uint32),
            questions=questions.astype(np.uint32),
            tasks=tasks,
            numbers=np.array([document.doc for document in chosen], np.int64),
            sizes=_sizes(owners[is_gram], is_usual[is_gram], len(chosen)),
            question_sizes=question_sizes,
            gram_filter=bit_filter(hashes, _GRAM_BITS),
            question_filter=bit_filter(openings, _QUESTION_BITS),
        )

    def save(self, path: Path) -> None:
        """Write one Arrow file, whole or not at all."""
        import pyarrow as pa

        values = {name: pa.array(getattr(self, name)) for name in _ARRAYS}
        values |= {"names": pa.array(self.names, pa.string()), "n": pa.array([self.n])}
        columns = [
            pa.LargeListArray.from_arrays([0, len(value)], value) for value in values.values()
        ]
        batch = pa.record_batch(columns, names=list(values)).replace_schema_metadata(_FORMAT)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Map a saved index into memory: processes that load the same file share it.

        Raises:
            UserError: if the file cannot be read or is something else.
        """
        import pyarrow as pa

        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if reader.schema.metadata != _FORMAT:
                raise pa.ArrowInvalid("it holds something else")
            batch = reader.get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} is no contamination index: {error}") from error
        arrays: dict[str, Any] = {name: batch[name].values.to_numpy() for name in _ARRAYS}
        return cls(
            n=batch["n"].values[0].as_py(), names=batch["names"].values.to_pylist(), **arrays
        )

    def find(self, texts: Sequence[str]) -> list[Hit]:
        """The documents that share words with each text, by text, then task and document.

        Costs about 20 µs for a text of 150 words; give it a thousand or more at once.
        """
        hits = [hit for numbers, words in batches(texts) for hit in self._hits(numbers, words)]
        return sorted(hits, key=lambda hit: (hit.text, hit.task, hit.doc))

    def coverage(self, hits: Iterable[Hit]) -> list[Coverage]:
        """How many of each task's documents the hits name, by task."""
        found = Counter(task for task, _ in {(hit.task, hit.doc) for hit in hits})
        can_be_found = np.zeros(len(self.tasks), np.bool_)
        can_be_found[self.owners] = True
        searchable = np.bincount(self.tasks[can_be_found], minlength=len(self.names))
        documents = np.bincount(self.tasks, minlength=len(self.names))
        return [
            Coverage(name, found[name], int(can), int(every))
            for name, can, every in zip(self.names, searchable, documents, strict=True)
        ]

    def _hits(self, numbers: list[int], words: Words) -> Iterator[Hit]:
        """The hits of one batch, whose texts have these numbers."""
        word, entry, is_gram = self._matches(words)
        if not len(word):
            return
        text, owner, question = words.text_of(word), self.owners[entry], self.questions[entry]
        order = np.lexsort((word, entry, question, owner, text))
        order = order[_is_first(text[order], entry[order])]  # it may stand in a text twice
        text, owner, question = text[order], owner[order], question[order]
        run = np.flatnonzero(_is_first(text, owner, question))
        there = np.diff(run, append=len(order))  # entries of a question that stand in a text
        is_whole = (question[run] > 0) & (10 * there >= 9 * self.question_sizes[question[run]])
        group = np.flatnonzero(_is_first(text, owner))  # where each hit begins
        has_question = np.logical_or.reduceat(np.repeat(is_whole, there), group)
        grams = np.add.reduceat(is_gram[order].astype(np.int64), group)
        grams = np.minimum(grams, self.sizes[owner[group]])  # other readings may have more
        first = np.minimum.reduceat(word[order], group)
        for at, start, count, asks in zip(group, first, grams, has_question, strict=True):
            document = owner[at]
            yield Hit(
                text=numbers[text[at]],
                task=self.names[self.tasks[document]],
                doc=int(self.numbers[document]),
                grams=int(count),
                of=int(self.sizes[document]),
                has_question=bool(asks),
                snippet=_snippet(words, start, min(start + self.n, words.first[text[at] + 1])),
                n=self.n,
            )

    def _matches(self, words: Words) -> tuple[Numbers, Numbers, Bools]:
        """First word and entry of each stretch of words that is an entry; whether that is a gram."""
        word = passing(self.gram_filter, words.grams(self.n))
        found = [self._entries_at(words, word, self.n)]
        word = passing(self.question_filter, words.grams(SHORTEST_QUESTION))
        for width in range(SHORTEST_QUESTION, self.n):
            found.append(self._entries_at(words, word, width))
        matches, entries = (np.concatenate(part) for part in zip(*found, strict=True))
        return matches, entries, np.arange(len(matches)) < len(found[0][0])

    def _entries_at(self, words: Words, word: Numbers, width: int) -> tuple[Numbers, Numbers]:
        """Those of these words where an entry of this width begins, once for each entry."""
        word = word[words.within(word, width)]
        hashes = words.grams_at(word, width)
        order = np.argsort(hashes)  # searches for neighbours share what they read
        word, hashes = word[order], hashes[order]
        low = np.searchsorted(self.hashes, hashes)
        is_entry = self.hashes[np.minimum(low, len(self.hashes) - 1)] == hashes
        word, hashes, low = word[is_entry], hashes[is_entry], low[is_entry]
        count = np.searchsorted(self.hashes, hashes, side="right") - low
        nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(word, count), np.repeat(low, count) + nth


def _sizes(owners: Numbers, is_usual: Bools, count: int) -> Numbers:
    """Entries of each owner in the usual reading; 1 for those that only have some in another."""
    return np.maximum(
        np.bincount(owners[is_usual], minlength=count), np.bincount(owners, minlength=count) > 0
    )


def _grams(texts: list[str], n: int, reading: Reading) -> tuple[Hashes, Numbers]:
    """The hash and the text of each n-gram, in no order."""
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for numbers, words in batches(texts, reading):
        word = np.arange(len(words.starts))
        word = word[words.within(word, n)]
        hashes.append(words.grams_at(word, n))
        owners.append(np.array(numbers)[words.text_of(word)])
    return np.concatenate(hashes), np.concatenate(owners)


def _short_questions(lines: list[str], n: int, reading: Reading) -> tuple[Hashes, Numbers, Hashes]:
    """The hash, the line and the hash of the first words of each question shorter than `n`."""
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    openings = [np.empty(0, np.uint64)]
    for numbers, words in batches(lines, reading):
        length = np.diff(words.first)
        for width in range(SHORTEST_QUESTION, n):
            line = np.flatnonzero(length == width)
            word = words.first[line]
            hashes.append(words.grams_at(word, width))
            places.append(np.array(numbers)[line])
            openings.append(words.grams_at(word, SHORTEST_QUESTION))
    return np.concatenate(hashes), np.concatenate(places), np.concatenate(openings)


def _is_first(*columns: NDArray[Any]) -> Bools:
    """Whether each row of sorted columns differs from the row before it."""
    differs = np.ones(len(columns[0]), np.bool_)
    differs[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return differs


def _snippet(words: Words, start: int, end: int) -> str:
    """The words from `start` to before `end`, cut to what a line can show."""
    text = " ".join(words.text[words.starts[start] : words.ends[end - 1]].split())
    return text if len(text) <= _SNIPPET else f"{text[:_SNIPPET].rstrip()} …"

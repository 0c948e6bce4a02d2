"""Word n-grams of many texts at once, as 64-bit hashes, without a Python step per word.

A word is a run of letters, digits and combining marks in lower case; all else separates words. Only
an apostrophe inside a word and a comma or full stop inside a number are nothing: "don't" is `dont`. A
Han character or kana is a word by itself, since Chinese and Japanese put no spaces between words.

Hashes are polynomials modulo 2^64 over random values of the characters (a word) or over the mixed
hashes of the words (an n-gram). Prefix sums of all terms of a batch give the hash of any stretch of
it with one subtraction (Karp and Rabin 1987). Two different n-grams have one hash with probability
about 2^-64: looking up 10^9 words in an index of 10^6 grams goes wrong once in 18,000 times.
"""

import enum
import functools
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]

_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_PRIME = np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64, as its second one below
_PRIME_2 = np.uint64(0x94D049BB133111EB)

_CODES = 0x110000
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # there is none beyond
_BATCH = 1 << 16  # characters; the arrays of a batch of this size stay in a core's own cache

# By code point: the hash value (0 separates words), and whether it has been looked up yet. Memory
# is taken by the pages in use only.
_values: Hashes = np.zeros(_CODES, np.uint64)
_is_known: Bools = np.zeros(_CODES, np.bool_)


class Reading(enum.Enum):
    """What punctuation is in a text: what the text becomes when that is taken out of it."""

    usual = enum.auto()
    split = enum.auto()  # each mark separates words, as where it is replaced by a space
    joined = enum.auto()  # none does, as where it is deleted


class Words:
    """The words of some texts in one row, hashed.

    Attributes:
        text: the texts, joined by line feeds; NFKC-normalised where they are not ASCII.
        starts: offset in `text` of each word's first character, shape (words,).
        ends: offset after its last character, shape (words,).
        first: number of each text's first word, and the number of words, shape (texts + 1,).
    """

    def __init__(self, texts: Sequence[str], reading: Reading = Reading.usual) -> None:
        texts = [text if text.isascii() else unicodedata.normalize("NFKC", text) for text in texts]
        self.text = "\n".join(texts)
        every_code = _code_points(self.text)
        kept = _kept(every_code, reading)
        codes = every_code[kept]
        values = _values[codes]
        powers, inverses = _powers(1 << max(_BATCH, len(codes)).bit_length())
        self._inverses = inverses
        starts, ends = _edges(codes, values)
        self.starts, self.ends = kept[starts], kept[ends - 1] + 1
        lengths = np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))
        self.first = np.searchsorted(self.starts, np.concatenate(([0], np.cumsum(lengths))))
        sums = _prefix_sums(values * powers[: len(values)])
        words = _mixed((sums[ends] - sums[starts]) * inverses[starts])
        self._sums = _prefix_sums(words * powers[: len(words)])

    def grams(self, n: int) -> Hashes:
        """The hash of the `n` words from each word on, shape (max(0, words - n + 1),).

        Some reach from one text into the next: ask `within`.
        """
        found = self._sums[n:] - self._sums[:-n]
        return found * self._inverses[: len(found)]

    def grams_at(self, word: Numbers, n: int) -> Hashes:
        """The hash of the `n` words from each of these words on, all within their text."""
        return (self._sums[word + n] - self._sums[word]) * self._inverses[word]

    def text_of(self, word: Numbers) -> Numbers:
        """The number of the text that a word belongs to, same shape."""
        return np.searchsorted(self.first, word, side="right") - 1

    def within(self, word: Numbers, n: int) -> Bools:
        """Whether the `n` words from each word on belong to one text, same shape."""
        return word + n <= self.first[self.text_of(word) + 1]


def batches(
    texts: Sequence[str], reading: Reading = Reading.usual
) -> Iterator[tuple[list[int], Words]]:
    """The words of all texts, in pieces that fit a cache: numbers of the texts, and their words.

    ASCII texts come first: a batch without other characters is cheaper to take apart.
    """
    plain = [number for number, text in enumerate(texts) if text.isascii()]
    other = [number for number, text in enumerate(texts) if not text.isascii()]
    for numbers in (plain, other):
        batch: list[int] = []
        size = 0
        for number in numbers:
            size += len(texts[number]) + 1
            if size > _BATCH and batch:
                yield batch, Words([texts[i] for i in batch], reading)
                batch, size = [], len(texts[number]) + 1
            batch.append(number)
        if batch:
            yield batch, Words([texts[i] for i in batch], reading)


def bit_filter(hashes: Hashes, bits_per_hash: int) -> NDArray[np.uint8]:
    """A bit table that lets these hashes pass, and of others one in `bits_per_hash` or fewer."""
    bits = 1 << (1024 + bits_per_hash * len(hashes)).bit_length()
    table = np.zeros(bits // 8, np.uint8)
    np.bitwise_or.at(table, *_place(hashes, table))
    return table


def passing(table: NDArray[np.uint8], hashes: Hashes) -> Numbers:
    """Where the hashes pass the filter: nearly nowhere but at entries."""
    byte, bit = _place(hashes, table)
    return np.flatnonzero(table[byte] & bit)


def _place(hashes: Hashes, table: NDArray[np.uint8]) -> tuple[Hashes, NDArray[np.uint8]]:
    """The byte of a filter that holds a hash's bit, and the bit in it."""
    leading = hashes >> np.uint64(64 - (8 * len(table)).bit_length() + 1)
    return leading >> np.uint64(3), np.left_shift(1, leading & np.uint64(7), dtype=np.uint8)


def _code_points(text: str) -> NDArray[np.uint8] | NDArray[np.uint32]:
    """The code point of each character, all of them in the table of values."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    if not _is_known[codes].all():
        _learn(np.unique(codes))
    return codes


def _learn(codes: NDArray[np.uint32]) -> None:
    """Fill the table of values for some code points."""
    lower = [ord(chr(code).lower()[0]) if _is_in_word(chr(code)) else 0 for code in codes]
    seeds = np.array(lower, np.uint64)
    _values[codes] = np.where(seeds == 0, np.uint64(0), _mixed((seeds + 1) * np.uint64(_BASE)))
    _is_known[codes] = True


def _is_in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def _kept(codes: NDArray[np.uint8] | NDArray[np.uint32], reading: Reading) -> Numbers:
    """Where the characters are that belong to a word or separate words: nearly all."""
    if reading is Reading.split:
        return np.arange(len(codes))
    if reading is Reading.joined:
        return np.flatnonzero(
            (_values[codes] != 0) | _IS_SPACE[np.minimum(codes, np.uint32(0x3001))]
        )
    # Unsigned: what is less than the apostrophe becomes a large number.
    may_join = codes - codes.dtype.type(ord("'")) <= ord(".") - ord("'")
    if codes.dtype != np.uint8:
        may_join |= codes == ord("’")
    place = np.flatnonzero(may_join[1:-1]) + 1
    code, before, after = codes[place], codes[place - 1], codes[place + 1]
    in_number = ((code == ord(",")) | (code == ord("."))) & _is_digit(before) & _is_digit(after)
    in_word = (_values[before] != 0) & (_values[after] != 0)
    keeps = np.ones(len(codes), np.bool_)
    keeps[place[in_number | (in_word & ((code == ord("'")) | (code == ord("’"))))]] = False
    return np.flatnonzero(keeps)


def _is_digit(codes: NDArray[np.uint8] | NDArray[np.uint32]) -> Bools:
    return (codes >= ord("0")) & (codes <= ord("9"))


def _edges(
    codes: NDArray[np.uint8] | NDArray[np.uint32], values: Hashes
) -> tuple[Numbers, Numbers]:
    """Where words start and end, each of shape (words,)."""
    is_word = np.zeros(len(codes) + 2, np.bool_)
    np.not_equal(values, 0, out=is_word[1:-1])
    is_joined = is_word[1:] & is_word[:-1]  # between a character and the one before it
    if codes.dtype != np.uint8:
        stands_alone = np.zeros_like(is_word)
        stands_alone[1:-1] = _is_ideograph(codes)
        is_joined &= ~(stands_alone[1:] | stands_alone[:-1])
    starts = np.flatnonzero(is_word[1:-1] & ~is_joined[:-1])
    return starts, np.flatnonzero(is_word[1:-1] & ~is_joined[1:]) + 1


def _is_ideograph(codes: NDArray[np.uint8] | NDArray[np.uint32]) -> Bools:
    """Whether a character is of the Han script (with its extensions) or kana."""
    found = (codes >= 0x3041) & (codes <= 0x30FF)
    for low, high in ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)):
        found |= (codes >= low) & (codes <= high)
    return found


@functools.lru_cache(maxsize=2)  # the usual size, and that of a very long text
def _powers(size: int) -> tuple[Hashes, Hashes]:
    """The base and its inverse to the powers 0 to size - 1."""
    return _geometric(_BASE, size), _geometric(_INVERSE, size)


def _geometric(ratio: int, size: int) -> Hashes:
    terms = np.full(size, ratio, np.uint64)
    terms[0] = 1
    return np.cumprod(terms)


def _prefix_sums(terms: Hashes) -> Hashes:
    """Sums of the first 0, 1, … terms, modulo 2^64."""
    sums = np.zeros(len(terms) + 1, np.uint64)
    np.cumsum(terms, out=sums[1:])
    return sums


def _mixed(values: Hashes) -> Hashes:
    """Spread each bit over all (the finaliser of splitmix64); a bijection."""
    values = (values ^ (values >> np.uint64(30))) * _PRIME
    values = (values ^ (values >> np.uint64(27))) * _PRIME_2
    return values ^ (values >> np.uint64(31))


_learn(np.arange(128, dtype=np.uint32))

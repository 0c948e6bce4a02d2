"""Personal data and secrets in texts: find them in a batch, and mask them.

Speed comes from RE2, which reads the whole batch for anything that could be of interest; Python
looks closely only at the few texts where something is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from reward import keys, shapes
from reward.shapes import SPACE, Place


@dataclass(frozen=True, slots=True)
class Span:
    """A private piece of a text."""

    index: int  # of the text in the batch
    kind: str  # a key of KINDS
    start: int  # in characters
    end: int
    text: str


# kind → what a text must hold (for RE2), and who looks closely. Of pieces that overlap, the kind
# that comes first here has it: an IBAN holds digits that could be a phone number.
KINDS: dict[str, tuple[str, Callable[[str], Iterator[Place]]]] = {
    "secret": (keys.TRIGGER, keys.secrets),
    "email": (r"@|(?i:[\[({]at[\])}])", shapes.emails),
    "iban": (r"[A-Z]{2}\d{2}[ -]?[A-Z0-9]{4}[ -]?[A-Z0-9]{4}", shapes.ibans),
    "card": (rf"\d(?:[{SPACE}.]?\d){{12}}", shapes.cards),
    "ip": (r"\d\.\d{1,3}\.\d{1,3}\.\d|[23Ff][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:", shapes.ips),
    "ssn": (rf"\d{{3}}[{SPACE}]\d{{2}}[{SPACE}]\d{{4}}|\d{{9}}", shapes.ssns),
    "phone": (shapes.PHONE_TRIGGER, shapes.phones),
}

# What every such text has, and few others: one scan for it costs less than seven.
_COARSE = "|".join(
    (
        rf"@|\d(?:[{SPACE}./()]{{0,3}}\d){{6}}|\d\.\d{{1,3}}\.\d{{1,3}}\.\d|[A-Z]{{2}}\d{{2}}",
        r"[23Ff][0-9A-Fa-f]{3}:|[\[({][Aa][Tt][\])}]",
        keys.COARSE,
    )
)


def find(texts: list[str]) -> list[Span]:
    """All private pieces, ordered by text and place.

    Args:
        texts: valid Unicode, without surrogates.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    is_candidate = pc.match_substring_regex(pa.array(texts, pa.large_string()), _COARSE)
    [rows] = is_candidate.to_numpy(False).nonzero()
    rest = {row: texts[row] for row in rows.tolist()}
    taken = {row: bytearray(len(text)) for row, text in rest.items()}
    found: list[Span] = []
    while rest:  # a piece that is masked may have hidden the one beside it
        masked = {}
        for row, kinds in _kinds(rest):
            spans, text = _search(row, texts[row], rest[row], taken[row], kinds)
            if spans:
                found += spans
                masked[row] = text
        rest = masked
    return sorted(found, key=lambda span: (span.index, span.start))


def _kinds(texts: dict[int, str]) -> Iterator[tuple[int, list[str]]]:
    """For each text, the kinds that it may hold."""
    import pyarrow as pa
    import pyarrow.compute as pc

    batch = pa.array(texts.values(), pa.large_string())
    asked = [pc.match_substring_regex(batch, trigger).to_pylist() for trigger, _ in KINDS.values()]
    for row, *has_trigger in zip(texts, *asked, strict=True):
        yield row, [kind for kind, has in zip(KINDS, has_trigger, strict=True) if has]


def _search(
    index: int, text: str, rest: str, taken: bytearray, kinds: list[str]
) -> tuple[list[Span], str]:
    """The pieces of some kinds, and the text without them.

    Args:
        index: of the text in the batch.
        text: as it was.
        rest: as long, with earlier pieces masked.
        taken: 1 for each character of an earlier piece; changed.
        kinds: to look for.
    """
    spans = []
    for kind in kinds:
        characters = list(rest)
        for start, end in KINDS[kind][1](rest):
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * (end - start)
                spans.append(Span(index, kind, start, end, text[start:end]))
                # As long as the piece, but to a detector it looks like its mask.
                characters[start:end] = f"[{'X' * (end - start - 2)}]"[: end - start]
        rest = "".join(characters)
    return spans, rest


def mask(text: str, spans: Iterable[Span]) -> str:
    """The text with `[EMAIL]`, `[PHONE]`, … for its private pieces.

    Nothing is found in the result, so that masking again changes nothing.

    Args:
        text: the text that the spans were found in.
        spans: all that `find` gave for this text, in any order.
    """
    pieces = []
    end = 0
    for span in sorted(spans, key=lambda span: span.start):
        pieces += [text[end : span.start], f"[{span.kind.upper()}]"]
        end = span.end
    return "".join([*pieces, text[end:]])

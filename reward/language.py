"""What a text is made of: broken encodings, refusals, languages.

RE2 reads a batch for what may be there, a library looks closely at the few texts where it is: ftfy
(Speer, 2019) repairs encodings, py3langid (after Lui and Baldwin, ACL 2012) names languages.
"""

import random
import re
import unicodedata
from collections import Counter
from functools import cache
from typing import Any

# UTF-8 read in a one-byte encoding: a lead byte (C2 to F4) and a byte that continues it, as latin-1
# and cp1252 show them; `à` after a letter, whose second byte became a space; quotes in cp1251 and
# Mac Roman. And cp1252 read as latin-1: its quotes and dashes are then control characters.
_CONTINUES = "[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_BROKEN = f"[\u00c2-\u00f4]{_CONTINUES}|[a-z][ÂÃ] |â€|вЂ|‚Ä|[\u0091-\u0097]|\u0080[\u0090-\u00a6]"
# The last byte of a closing quote, 9D, means nothing in cp1252 and is often lost. Of what is left,
# `â€ `, ftfy would make a dagger.
_LOST_QUOTE = re.compile("â€(?:\ufffd|(?=[\\s.,;:!?)]|$))")
# So is the first byte of a dash or quote: MMLU has `seller\x80\x94buyer`.
_LOST_LEAD = re.compile("(?<![\x80-\xbf\u00c2-\u00f4])\x80([\x90-\x9f\xa6])")
# No one writes these but by mistake; ftfy 6.3 passes some over, such as `â„¢`.
_SURE = re.compile(f"â[€„†‰]{_CONTINUES}")
_MOST_LAYERS = 8  # how often a text is repaired again; one broken three times has been seen

_OPENING = 240  # characters of an answer in which a refusal is looked for
_LEAD = (  # what may stand between the start of a sentence and the refusal itself
    r"(?:(?:no|well|hm+|oh|ok|okay|yes|but|and|so|therefore|that|for|this|actually|however"
    r"|unfortunately|regrettably|sorry|(?:my )?apologies|I apologi[sz]e|I must say"
    r"|I(?:['’]m| am)(?: \w+)? (?:sorry|afraid)|due to [^.!?\n]{0,60}?"
    r"|I (?:do not|don['’]t) [^.!?\n]{0,80}?(?:so|therefore))\b[,.:!…]*\s+)"
)
_AS_AI = (
    r"(?:(?:as|because I['’]m|since I['’]m) an? [^.!?\n]{0,60}?"
    r"\b(?:AI|model|assistant|chatbot|bot|program|intelligence)\b[^.!?\n]{0,60}?\s+)"
)
_I_CANNOT = (
    r"\b(?:I|we) ?(?:can(?:no|['’])t|can not|won['’]t|will not|refuse to|must decline"
    r"|have to decline"
    r"|(?:am|['’]m) (?:unable|not (?:able|allowed|going|willing|permitted|programmed|designed)))"
)
_MILDLY = (
    r"(?:[, ]+(?:to|be|able|really|actually|possibly|ethically|legally|directly|just|even"
    r"|in good conscience))*"
)
_HELP = (
    r"(?:help(?: (?:you|with|to|in|there|them|him|her|people|anyone|create|write|plan|find|that)\b"
    r"|[.,;!]|$)|do (?:that|this|it|so|what)\b|talk about|look up|say that"
    r"|tell (?:you|anyone) (?:that|this|the|her|his|their|where|who|what|about|any)\b|tell you[.,]"
    r"|make (?:a|any|such|jokes|judg\w+|statements|generali\w+|fun)\b"
    r"|(?:assist|provid|answer|fulfil|comply|support|creat|generat|writ|produc|engag|participat"
    r"|condon|encourag|endors|promot|offer|giv|shar|discuss|complet|continu|recommend|advis"
    r"|respond|access|brows|search|comment|speculat|disclos|facilitat|suggest|teach|reveal|send"
    r"|repeat|retriev|summari|estimat|determin|draw|agree|defin|cooperat|conduct|perform|proceed"
    r"|advocat|display|process)\w*)"
)
_UNWILLING = (
    r"\bI ?(?:am|['’]m) not comfortable|\bI (?:don['’]t|do not|wouldn['’]t|would not) (?:feel|be)"
    r" comfortable|\bI(?:['’]d| would) (?:rather|prefer) not(?: to)? (?:do|say|answer|talk|discuss"
    r"|give|help)|\b(?:that|this|it)(?:['’]s| is) not something (?:that )?I (?:can|could|will|am)\b"
)
# What every refusal has, for RE2; and the refusal: `I can't wait` and `he said he can't help` are
# none, but whatever a model cannot do as a model is.
_DECLINING = f"(?i){_I_CANNOT}|{_UNWILLING}"
_REFUSAL = re.compile(
    rf"(?:^|[.!?…]\s+|\n\s*)({_LEAD}{{0,5}}(?:{_AS_AI}{_LEAD}{{0,2}})?"
    rf"(?:{_I_CANNOT}(?:{_MILDLY} {_HELP}|[.!])|{_UNWILLING}|\bI must decline)"
    rf"|{_LEAD}{{0,5}}{_AS_AI}{_I_CANNOT} [\w'’-]+)",
    re.IGNORECASE,
)

# In bytes of UTF-8, as ten Chinese letters say no less. Shorter texts are mostly names and numbers.
_MIN_LETTERS = 30
_MIN_CONFIDENCE = 0.5
_READ = 400  # characters that tell a language as well as all


def mojibake(texts: list[str]) -> list[tuple[int, str]]:
    """Texts that were decoded with the wrong encoding: index, and `cafÃ© → café`.

    Args:
        texts: valid Unicode, without surrogates.
    """
    found = []
    beyond_ascii = [index for index, text in enumerate(texts) if not text.isascii()]
    for place in _matching([texts[index] for index in beyond_ascii], _BROKEN):
        index = beyond_ascii[place]
        repaired = repair(texts[index])
        if repaired != texts[index]:
            found.append((index, _first_change(texts[index], repaired)))
    return found


def repair(text: str) -> str:
    """The text with its broken encoding mended, line by line; all else stays as it is.

    What cannot be broken UTF-8 does not change: curly quotes, accents, `20°C`, emoji. A repaired
    text stays as it is when it is repaired again.
    """
    if text.isascii():
        return text
    return "\n".join(line if line.isascii() else _repair_line(line) for line in text.split("\n"))


def _repair_line(line: str) -> str:
    from ftfy import fix_encoding

    for _ in range(_MOST_LAYERS):
        if not _broken().search(line):
            break
        previous = line
        line = _LOST_LEAD.sub(lambda match: _decode("â\x80" + match[1]), _LOST_QUOTE.sub("”", line))
        line = _SURE.sub(lambda match: _decode(match[0]), fix_encoding(line))
        if line == previous:
            break
    return line


def _decode(broken: str) -> str:
    try:
        return broken.encode("sloppy-windows-1252").decode()  # ftfy's codec, made for this
    except UnicodeError:
        return broken


@cache
def _broken() -> re.Pattern[str]:
    return re.compile(_BROKEN)


def _first_change(before: str, after: str) -> str:
    """The word that a repair changes first, before and after."""
    pairs = zip(before, after, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
    start = max(before.rfind(space, 0, place) for space in " \n\t") + 1
    start = max(start, place - 20)
    old, new = (re.match(r"\S*", text[start : start + 40]) for text in (before, after))
    assert old
    assert new
    shown = f"{old[0]} → {new[0]}"
    return re.sub(r"[^ \S]|[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", shown)


def refusals(texts: list[str]) -> list[tuple[int, str]]:
    """Answers that decline to help: index, and the phrase that says so, near the start.

    Args:
        texts: answers, each from its beginning.
    """
    openings = [text[:_OPENING] for text in texts]
    found = []
    for index in _matching(openings, _DECLINING):
        if match := _REFUSAL.search(openings[index]):
            found.append((index, " ".join(match[1].split())))
    return found


def mix(texts: list[str], sample: int = 2000) -> dict[str, int]:
    """How many texts are in which language, commonest first.

    Args:
        texts: any texts.
        sample: how many are read, the same in each run; all if there are fewer.

    Returns:
        ISO 639-1 codes, and `unknown` for what is too short, no prose, or unclear.
    """
    drawn = texts if len(texts) <= sample else random.Random(0).sample(texts, sample)
    counts = Counter(map(_language, drawn))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _language(text: str) -> str:
    text = text[:_READ]
    if len("".join(filter(str.isalpha, text)).encode()) < _MIN_LETTERS:
        return "unknown"
    language, confidence = _identifier().classify(text)
    is_clear = confidence >= _MIN_CONFIDENCE and language != "zxx"  # the code for no language
    return str(language) if is_clear else "unknown"


@cache
def marks() -> str:
    """The combining marks, which `re` leaves out of words: without them, 'boy' and 'girl' are the same in Hindi.

    Those beyond 16 bits are of rare scripts, and would make a pattern twice as slow.
    """
    codes = map(chr, range(0x300, 0x10000))
    return "".join(code for code in codes if unicodedata.category(code)[0] == "M")


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _matching(texts: list[str], pattern: str) -> list[int]:
    """The indices of the texts in which RE2 finds a pattern."""
    import pyarrow as pa
    import pyarrow.compute as pc

    matches = pc.match_substring_regex(pa.array(texts, pa.large_string()), pattern)
    [rows] = matches.to_numpy(zero_copy_only=False).nonzero()
    return list(map(int, rows))

"""The shapes of personal data: where a text holds an e-mail address or a number of a person.

By shape, not by truth: an invented address at example.com is found as a real one is. Sources:
RFC 5322 (addresses), ISO/IEC 7812 (cards: issuer and check digit), ISO 13616 (IBAN), RFC 4291
(IPv6), Google's libphonenumber (numbers with a country code).

A detector takes a text and gives the (start, end) of what it finds; of places that overlap, the
first given counts. Numbers are read with care: most digits in a data set count something.
"""

import re
from collections.abc import Iterator
from ipaddress import IPv6Address

Place = tuple[int, int]

# What stands between groups of digits: space and hyphen, their no-break forms, the dashes. Part of
# a character class, in Python's regular expressions and in RE2's.
SPACE = " \\-\u00a0\u2010-\u2013"
_ENDS = r"(?!\w|[-.,]\d)"  # no longer number goes on

_EMAIL = re.compile(
    r"(?<![\w.%+-])\w[\w.!#$%&'*+/=?^`{|}~-]{0,63}@"
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w@])"
)
_SPELT_EMAIL = re.compile(
    r"\b[\w.+-]{1,64}\s?(?:\[at\]|\(at\)|\{at\})\s?[\w-]+"
    r"(?:(?:\.|\s?(?:\[dot\]|\(dot\)|\{dot\})\s?)[\w-]+)+",
    re.IGNORECASE,
)
_NO_EMAIL = re.compile(r"git@|.*\.(?:png|jpe?g|gif|svg|webp|js|css)$", re.DOTALL | re.IGNORECASE)

_IP = re.compile(rf"(?<![\w.])(?:\d{{1,3}}\.){{3}}\d{{1,3}}(?!\.?\d){_ENDS}")
_IPV6 = re.compile(
    r"(?<![\w:.])[23Ff][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}(?:[0-9A-Fa-f]{1,4})?(?![\w:])"
)
_BEFORE_VERSION = re.compile(
    r"(?:\bv|\b(?:versions?|ver|release|firmware|build|section|chapter|clause|figure|table)|§)"
    r"[.:]?\s*$",
    re.IGNORECASE,
)

_CARD = re.compile(
    rf"(?<![\w.+])(?<!\d[{SPACE}])(?:\d{{13,19}}"
    rf"|\d{{4}}([{SPACE}.])\d{{4}}\1\d{{4}}\1\d{{1,4}}(?:\1\d{{1,3}})?"
    rf"|\d{{4}}([{SPACE}.])\d{{6}}\2\d{{4,5}}){_ENDS}"
)
_ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|3(?:0[0-5]\d|[689]\d\d)\d{10}"  # Diners Club
    r"|35(?:2[89]|[3-8]\d)\d{12,15}"  # JCB
    r"|6(?:011|4[4-9]\d|5\d\d|2\d\d)\d{12,15}"  # Discover, UnionPay
    r"|(?:50[0-9]\d|5[6-8]\d\d|6304|67\d\d)\d{12,15}"  # Maestro
)

_SSN = re.compile(rf"(?<![\w.<=+*/$-])\d{{3}}([- \u2010-\u2013])\d{{2}}\1\d{{4}}(?!\s*=){_ENDS}")
_NINE = re.compile(rf"(?<![\w.$-])\d{{9}}{_ENDS}")
_BEFORE_SSN = re.compile(
    r"\b(?:ssn|social security(?: (?:number|no\.?|#))?)(?: is|[ :=#-])*$", re.IGNORECASE
)

_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?!\w)")
_BEFORE_IBAN = re.compile(r"\bIBAN\b[\s\w]{0,12}[:#=]?\s*$")

_ABROAD = re.compile(rf"(?<![\w+=)])(?:\+|\b00(?=\d\d[{SPACE}]))\(?\d[\d{SPACE}.()/]{{5,22}}\d")
_AMERICAN = re.compile(
    rf"(?<![\w.,$<=*/+-])(?<!\d[{SPACE}])(?:\+?1[{SPACE}.]?)?"
    rf"(?:\(\d{{3}}\)[{SPACE}.]?\d{{3}}[{SPACE}.]|[2-9]\d\d([{SPACE}./])[2-9]\d\d\1)"
    rf"\d{{4}}(?!\s*[=*/+]){_ENDS}"
)
_LOCAL_555 = re.compile(
    rf"(?<![\w.,$<=*/+-])(?<!\d )555[-.\u2010-\u2013]\d{{4}}(?!\s*[=*/+]){_ENDS}"
)
# National forms of other countries begin with the trunk prefix 0, or a Brazilian area code in
# brackets. Dates (05-06-2021) and lists of numbers with leading zeros have the wrong length.
_NATIONAL = re.compile(
    rf"(?<![\w.,:$<=*/+-])(?<!\d[{SPACE}])(?!\d\d[-. ]\d\d[-. ](?:19|20)\d\d)"
    rf"(?:\(0[1-9]\d{{0,3}}\)|0[1-9]\d{{0,4}})(?:[{SPACE}.]\d{{2,8}}){{1,4}}"
    rf"(?!\s*[=*/+]|[{SPACE}]\d|:\d){_ENDS}"
    rf"|\([1-9]\d\) ?9?\d{{4}}[{SPACE}]\d{{4}}{_ENDS}"
)
_RUN = re.compile(rf"(?<![\w.,$+])\(?\d(?:[{SPACE}.()]{{0,2}}\d){{6,13}}{_ENDS}")
_BEFORE_PHONE = re.compile(
    r"\b(?:(?:phone|telephone|tel|mobile|cell|cellphone|fax|whatsapp|sms|hotline|helpline)"
    r"(?:\s+(?:number|no|line))?(?:\s+is)?"
    r"|(?:call|text|ring|dial|reach|contact)(?:\s+(?:me|us|him|her|them))?(?:\s+(?:at|on))"
    r"|(?:call|text|ring|dial)\s+(?:me|us|him|her|them))"
    r"(?:\s*[:.#=-])?\s*$",
    re.IGNORECASE,
)

# What any of these phone numbers has, for RE2.
PHONE_TRIGGER = "|".join(
    (
        rf"(?:\+|\b00)\(?\d[\d{SPACE}.()/]{{6}}",
        rf"\d{{3}}\)?[{SPACE}./]?\d{{3}}[{SPACE}./]\d{{4}}",
        rf"555[{SPACE}.]\d{{4}}",
        rf"\b0\d{{1,4}}\)?[{SPACE}.]\d{{2,8}}(?:[{SPACE}.]\d{{2}}|\b)",
        rf"\(\d\d\) ?\d{{4,5}}[{SPACE}]\d{{4}}",
        r"(?i:phone|tel|mobile|cell|fax|whatsapp|sms|line|call|text|ring|dial|reach|contact)"
        rf"[a-z\s:.#=(-]{{0,20}}\d(?:[{SPACE}.()]{{0,2}}\d){{6}}",
    )
)


def emails(text: str) -> Iterator[Place]:
    """E-mail addresses, also `name [at] host [dot] org`; no `git@host`, no `logo@2x.png`."""
    for pattern in (_EMAIL, _SPELT_EMAIL):
        for match in pattern.finditer(text):
            if not _NO_EMAIL.match(match[0]):
                yield match.span()


def ips(text: str) -> Iterator[Place]:
    """IP addresses of a machine: no versions, network masks, whole networks or `localhost`."""
    for match in _IP.finditer(text):
        octets = [int(octet) for octet in match[0].split(".")]
        # 1.2.3.4 counts sections or releases; 1.1.1.1 and 8.8.8.8 are everybody's.
        is_numbering = max(octets) < 10 or _follows(_BEFORE_VERSION, text, match.start())
        is_everyones = octets[0] in (0, 127) or octets[0] >= 224 or octets[3] == 0
        if max(octets) <= 255 and not is_numbering and not is_everyones:
            yield match.span()
    for match in _IPV6.finditer(text):
        try:
            IPv6Address(match[0])
        except ValueError:
            continue
        if not match[0].endswith("::"):  # a whole network
            yield match.span()


def cards(text: str) -> Iterator[Place]:
    """Payment cards: 13 to 19 digits of a known issuer, whole or in groups, with a check digit."""
    from stdnum.luhn import is_valid

    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUED.fullmatch(digits) and is_valid(digits):
            yield match.span()


def ssns(text: str) -> Iterator[Place]:
    """US social security numbers, also of areas never issued; without dashes if they are named."""
    for match in _SSN.finditer(text):
        if match[1] != " " or _follows(_BEFORE_SSN, text, match.start()):
            yield match.span()
    for match in _NINE.finditer(text):
        if _follows(_BEFORE_SSN, text, match.start()):
            yield match.span()


def ibans(text: str) -> Iterator[Place]:
    """Bank accounts whose check digits are right, or which the text calls an IBAN."""
    from stdnum.iban import is_valid

    for match in _IBAN.finditer(text):
        start, end = match.span()
        if _follows(_BEFORE_IBAN, text, start):
            yield start, end
            continue
        while end - start >= 15:  # a word in capitals may follow; the shortest IBAN is Norway's
            if is_valid(text[start:end], check_country=False):
                yield start, end
                break
            end = max(text.rfind(" ", start, end), start)


def phones(text: str) -> Iterator[Place]:
    """Phone numbers: +NN as libphonenumber has it, US and national forms, and what is called one.

    Ten digits in a row are no phone number unless the text says so (`call me at 2025550199`).
    """
    for match in _ABROAD.finditer(text):
        if end := _possible_end(match[0]):
            yield match.start(), match.start() + end
    for match in _AMERICAN.finditer(text):
        yield match.span()
    for match in _LOCAL_555.finditer(text):
        yield match.span()
    for match in _NATIONAL.finditer(text):
        if 9 <= sum(map(str.isdecimal, match[0])) <= 12:
            yield match.span()
    for match in _RUN.finditer(text):
        if _follows(_BEFORE_PHONE, text, match.start()):
            yield match.span()


def _possible_end(number: str) -> int:
    """Where a number with its country code ends, 0 if there is none that could exist."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    international = "+" + number[2:] if number.startswith("00") else number
    # POSSIBLE asks for a right length alone: an invented number is in nobody's range.
    for match in PhoneNumberMatcher(international, None, leniency=Leniency.POSSIBLE):
        if match.start == 0:
            return int(match.end) + len(number) - len(international)
    return 0


def _follows(context: re.Pattern[str], text: str, place: int) -> bool:
    return bool(context.search(text[max(0, place - 40) : place]))

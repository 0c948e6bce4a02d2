"""Broken encodings are mended and clean text is not; refusals are told from stories."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import language

CLEAN = [
    "Les élèves « à l’école » — c’est déjà l’été, où l’on mange des crêpes… Ça va ?",
    "Über die Brücke: „Straße“, Äpfel, Öl – 20 °C, 5 €",
    "El niño comió jalapeños; ¿qué? ¡Sí!",
    "NÃO É POSSÍVEL — A IRMÃ DO JOÃO. PREÇO À VISTA; coração, “à vista”",
    "Příliš žluťoučký kůň; Zażółć gęślą jaźń – „Łódź”; İstanbul’da",
    "Phở bò Việt Nam: Ân, Ấn Độ, “Đà Nẵng” À Â Ã Ă",
    "Blåbær, Ångström, Øst, Æble – “Å”, ‘Ø’",
    "£5 ½ cup 25°C ±3 µm x² × y³ ≤ 10 § 4 ¶ © 2020 ® ™ • † …",
    "Καλημέρα κόσμε Привет, «мир» 你好，世界。「日本」 안녕 مرحبا שלום हिन्दी",
    "😀👩‍💻🧙‍♂️ ♥ → √2 ≈ 1.41 ∑ ∫ π; the operators Â and B̂",
    "She said “don’t”, and he said ‘why?’",
]
INTENDED = [
    "don’t",
    "“quoted”",
    "5 – 3 — x…",
    "café",
    "naïve",
    "São Paulo",
    "Łódź",
    "Привет, мир",
    "日本語です",
    "안녕하세요",
    "مرحبا",
    "😀 ok 🧙‍♂️",
    "£5 €6 ½ 20°C",
    "à la carte",
    "Brand™",
    "’",
    "é",
]


def misread(text: str, encoding: str) -> str:
    """UTF-8 read in another encoding; bytes that cp1252 lacks stay control characters."""
    decoded = []
    for byte in text.encode():
        try:
            decoded.append(bytes([byte]).decode(encoding))
        except UnicodeDecodeError:
            decoded.append(chr(byte))
    return "".join(decoded)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("intended", INTENDED)
def test_misread_text_is_mended(intended: str, encoding: str, layers: int) -> None:
    broken = intended
    for _ in range(layers):
        broken = misread(broken, encoding)
    for frame in ("{}", "In a word {} end", "It’s “ok” — {} and 😀\nÜber"):
        text = frame.format(broken)
        assert language.repair(text) == frame.format(intended)
        assert [index for index, _ in language.mojibake(["", text, "x"])] == [1]


@pytest.mark.parametrize("text", CLEAN)
def test_clean_text_stays_as_it_is(text: str) -> None:
    assert language.repair(text) == text
    assert language.mojibake([text]) == []


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("â€œLost the last byteâ€ of it", "“Lost the last byte” of it"),
        ("â€œLostâ€\ufffd, and replaced", "“Lost”, and replaced"),
        ("voilÃ le travail", "voilà le travail"),
        ("cp1252 as latin-1: \x93don\x92t\x94", "cp1252 as latin-1: “don’t”"),
        ("it\x80\x99s so\nbuyer\x80\x94seller", "it’s so\nbuyer—seller"),
        ("itвЂ™s Windows-1251", "it’s Windows-1251"),
        ("it‚Äôs Mac Roman", "it’s Mac Roman"),
    ],
)
def test_lossy_and_other_encodings(broken: str, mended: str) -> None:
    assert language.repair(broken) == mended


def test_a_finding_shows_the_word() -> None:
    texts = ["fine", "One.\nWe read booksâ€¦ daily", "â€œAâ€\x9d", "x " + "Ã©" * 50]
    found = dict(language.mojibake(texts))
    assert found[1] == "booksâ€¦ → books…"
    assert found[2] == r"â€œAâ€\x9d → “A”"
    assert len(found[3]) < 90


BROKEN_PIECES = [
    "â€œ",
    "â€",
    "â€™",
    "Ã©",
    "Ã",
    "Â ",
    "\ufffd",
    "\x93",
    "ðŸ§™",
    "Ã¢â‚¬â„¢",
    "вЂ™",
    "\n",
    "a",
]


@given(st.lists(st.sampled_from(BROKEN_PIECES) | st.text(max_size=4), max_size=8).map("".join))
@settings(max_examples=200, deadline=None)
def test_repair_is_final_and_finds_what_it_changes(text: str) -> None:
    repaired = language.repair(text)
    assert language.repair(repaired) == repaired
    assert bool(language.mojibake([text])) == (repaired != text)


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I can’t assist with that request.",
    "I can't help with that",
    "I cannot provide instructions for this.",
    "I can’t.",
    "As an AI language model, I cannot predict the future.",
    "As an AI language model, I am not able to browse the internet. However, here is a guide.",
    "I'm sorry, but as an AI assistant, I'm unable to create images.",
    "I apologize, but I do not feel comfortable writing that.",
    "Unfortunately, I am unable to do this.",
    "No, I won't do that.",
    "I'm afraid I must decline to provide guidance on tax fraud.",
    "I would rather not discuss that.",
    "That's a serious matter. I can’t help you with that.",
    "Due to privacy concerns, we cannot complete this task.",
    "I don't have access to news sources, so I'm unable to summarize the article.",
    "I'm sorry, that's not something I can do.",
    "I will not be able to assist you with this.",
]
ANSWERS = [
    "I can't wait to see you! I can't help but smile.",
    "“I can’t help you,” she said, and left.",
    "He wrote: \"I'm sorry, but I can't assist.\" Then he slept.",
    "I'm sorry to hear that you're having trouble with Anki. Try this:",
    "I'm sorry, but I can't make it to the party on Friday.",
    "Sorry, what do you mean?",
    "As an AI, I can help you with that.",
    "You cannot provide less than two arguments.",
    "There are many reasons why people can't provide proof.",
    "Sure! " + "Here is a long answer. " * 12 + "I can't help with that.",
    "",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_refusals(answer: str) -> None:
    [(index, phrase)] = language.refusals(["Sure.", answer])
    assert index == 1
    assert phrase
    assert phrase in " ".join(answer.split())


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_do_not_decline(answer: str) -> None:
    assert language.refusals([answer]) == []


def test_languages() -> None:
    texts = [
        "The weather is fine today, and we are going for a walk in the park.",
        "Il fait beau aujourd’hui et nous allons nous promener dans le parc.",
        "Das Wetter ist heute schön, und wir gehen im Park spazieren.",
        "今天天气很好，我们去公园散步吧，然后一起吃饭。",
        "ok",
        "12 + 30 = 42",
        "",
    ]
    assert language.mix(texts) == {"unknown": 3, "de": 1, "en": 1, "fr": 1, "zh": 1}
    assert language.mix([]) == {}


def test_a_sample_is_the_same_each_time() -> None:
    texts = ["The weather is fine today, is it not?"] * 30 + ["Wie ist das Wetter bei dir?"] * 30
    assert language.mix(texts, sample=10) == language.mix(texts, sample=10)
    assert sum(language.mix(texts, sample=10).values()) == 10


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value or [] for text in texts_of(item)]


@pytest.mark.parametrize("name", ["sft_dirty", "preference_dirty"])
def test_injected_mojibake_is_found_and_nothing_else(shared_data: Path, name: str) -> None:
    with gzip.open(shared_data / "raw_dirty" / f"{name}.jsonl.gz", "rt", newline="\n") as file:
        rows = [texts_of(json.loads(line)) for line in file]
    truth_file = shared_data / "raw_dirty" / f"{name}.truth.jsonl"
    facts = map(json.loads, truth_file.read_text(encoding="utf-8").splitlines())
    truth = {fact["row"] for fact in facts if fact["issue"] == "mojibake"}
    places = [row for row, texts in enumerate(rows) for _ in texts]
    found = language.mojibake([text for texts in rows for text in texts])
    assert {places[index] for index, _ in found} == truth

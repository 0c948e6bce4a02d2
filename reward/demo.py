"""The demo's data: short texts, and the exact JSON that a prompt asks for.

Everything is generated from a seed, so the demo needs no download and every answer is checkable. Held-out prompts
use people, places and things that no training row contains.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Value = str | int


@dataclass(frozen=True)
class Domain:
    """A kind of text: its fields with two pools of values (training, held-out) and its sentence templates."""

    fields: dict[str, tuple[list[Value], list[Value]]]
    templates: list[str]


def _integers(low: int, high: int) -> tuple[list[Value], list[Value]]:
    """Odd numbers are for training, even ones are held out."""
    return list(range(low | 1, high, 2)), list(range(low + (low & 1), high, 2))


DOMAINS = [
    Domain(
        {
            "name": (
                [
                    "Maria Silva",
                    "John Baker",
                    "Aisha Khan",
                    "Peter Novak",
                    "Lucy Chen",
                    "Omar Haddad",
                    "Ingrid Berg",
                ],
                ["Elena Rossi", "David Cohen", "Yuki Tanaka", "Sofia Costa", "Ravi Patel"],
            ),
            "age": _integers(19, 70),
            "city": (
                ["Porto", "Boston", "Lahore", "Prague", "Toronto", "Cairo", "Bergen", "Lyon"],
                ["Milan", "Denver", "Osaka", "Madrid", "Mumbai"],
            ),
            "job": (
                ["nurse", "carpenter", "lawyer", "baker", "pilot", "farmer", "teacher"],
                ["dentist", "plumber", "chemist", "painter", "editor"],
            ),
        },
        [
            "{name}, {age}, works as a {job} in {city}.",
            "In {city} we met {name}, a {job} who is {age} years old.",
            "{name} is a {age}-year-old {job} from {city}.",
        ],
    ),
    Domain(
        {
            "customer": (
                [
                    "Acme Ltd",
                    "Blue Cafe",
                    "North School",
                    "Hill Clinic",
                    "Star Hotel",
                    "River Books",
                ],
                ["Green Farm", "City Museum", "Oak Studio", "Lake Diner"],
            ),
            "item": (
                ["chairs", "lamps", "notebooks", "printers", "towels", "mugs", "pencils"],
                ["tables", "mirrors", "blankets", "kettles", "folders"],
            ),
            "quantity": _integers(3, 90),
            "price": _integers(5, 200),
        },
        [
            "{customer} ordered {quantity} {item} at {price} dollars each.",
            "Please send {quantity} {item} to {customer}; the unit price is {price} dollars.",
            "Invoice for {customer}: {quantity} {item}, {price} dollars apiece.",
        ],
    ),
    Domain(
        {
            "title": (
                [
                    "Data Night",
                    "Jazz Evening",
                    "Chess Open",
                    "Poetry Hour",
                    "Garden Day",
                    "Science Fair",
                ],
                ["Film Club", "Book Swap", "Robot Show", "Tea Workshop"],
            ),
            "day": (
                ["Monday", "Tuesday", "Thursday", "Saturday"],
                ["Wednesday", "Friday", "Sunday"],
            ),
            "room": (["A1", "B4", "C2", "D7", "E5"], ["F3", "G8", "H6"]),
            "seats": _integers(11, 120),
        },
        [
            "{title} takes place on {day} in room {room}, which has {seats} seats.",
            "On {day}, room {room} ({seats} seats) hosts {title}.",
            "Room {room} with its {seats} seats is booked for {title} on {day}.",
        ],
    ),
]

INSTRUCTIONS = [
    "Reply with one JSON object and nothing else. Keys, in this order: {keys}.\nText: {text}",
    "Extract from the text a JSON object with exactly these keys in this order: {keys}. No other words.\nText: {text}",
    "Text: {text}\nGive me only JSON with the keys {keys}, in that order.",
]


def _draw(rng: random.Random, is_held_out: bool) -> tuple[str, dict[str, Value], dict[str, Value]]:
    """One example: (prompt, expected object, every value in the text)."""
    domain = rng.choice(DOMAINS)
    values = {field: rng.choice(pools[is_held_out]) for field, pools in domain.fields.items()}
    text = rng.choice(domain.templates).format(**values)
    wanted = rng.sample(list(values), rng.randint(2, len(values)))
    keys = ", ".join(
        f'"{key}" ({"integer" if isinstance(values[key], int) else "string"})' for key in wanted
    )
    prompt = rng.choice(INSTRUCTIONS).format(keys=keys, text=text)
    return prompt, {key: values[key] for key in wanted}, values


def _examples(
    count: int, seed: str, is_held_out: bool
) -> Iterator[tuple[str, dict[str, Value], dict[str, Value]]]:
    """`count` examples with distinct prompts."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        example = _draw(rng, is_held_out)
        if example[0] not in seen:
            seen.add(example[0])
            yield example


def _corrupt(expected: dict[str, Value], values: dict[str, Value], rng: random.Random) -> str:
    """A wrong answer of a kind that language models really give."""
    keys = list(expected)
    key = rng.choice(keys)
    others = [value for value in values.values() if value != expected[key]]
    faults: list[Callable[[], str]] = [
        lambda: "Here is the JSON object:\n```json\n" + json.dumps(expected, indent=2) + "\n```",
        lambda: json.dumps({k: str(v) for k, v in expected.items()} | {key: rng.choice(others)}),
        lambda: json.dumps({k: v for k, v in expected.items() if k != key}),
        lambda: json.dumps(expected | {"note": "done"}),
        lambda: json.dumps(expected | {key: rng.choice(others)}),
        lambda: str(expected),
        lambda: json.dumps({k: expected[k] for k in keys[::-1]}),
    ]
    return rng.choice(faults)()


def _user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _assistant(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


def demonstrations(count: int) -> list[Row]:
    """`count` conversations whose answer is the JSON asked for."""
    return [
        {"messages": _user(prompt) + _assistant(json.dumps(expected))}
        for prompt, expected, _ in _examples(count, "demonstrations", is_held_out=False)
    ]


def preferences(count: int) -> list[Row]:
    """`count` pairs: the right JSON against a plausible fault."""
    rng = random.Random("faults")
    return [
        {
            "prompt": _user(prompt),
            "chosen": _assistant(json.dumps(expected)),
            "rejected": _assistant(_corrupt(expected, values, rng)),
        }
        for prompt, expected, values in _examples(count, "preferences", is_held_out=False)
    ]


def prompts(count: int) -> list[Row]:
    """`count` prompts with their reference, like those of the demonstrations."""
    return [
        {"prompt": prompt, "reference": json.dumps(expected)}
        for prompt, expected, _ in _examples(count, "prompts", is_held_out=False)
    ]


def held_out(count: int) -> list[Row]:
    """`count` prompts with their reference, on people, places and numbers that training never shows."""
    return [
        {"prompt": prompt, "reference": json.dumps(expected)}
        for prompt, expected, _ in _examples(count, "held out", is_held_out=True)
    ]


def score(answer: str, reference: str) -> dict[str, float]:
    """Judge an answer.

    `json_valid`: it is one JSON object with the right keys and types, and nothing else.
    `json_exact`: its values and their order are right too.
    """
    expected = json.loads(reference)
    try:
        got = json.loads(answer)
    except (ValueError, RecursionError):
        return {"json_exact": 0.0, "json_valid": 0.0}
    is_valid = (
        isinstance(got, dict)
        and set(got) == set(expected)
        and all(type(got[key]) is type(expected[key]) for key in expected)
    )
    return {
        "json_exact": float(is_valid and list(got.items()) == list(expected.items())),
        "json_valid": float(is_valid),
    }

"""`python -m reward.synthesize DOCS OUT.jsonl --endpoint URL --model NAME`: questions from documents.

A chat model writes question–answer pairs about passages of documents; the pairs that pass the filters
of `reward.questions` are rows of the format `qa`. An interrupted run continues where it stopped.
"""

import argparse
import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from conf.entry import UserError, plainly
from reward.chat import Endpoint, NoAnswer, check_url, key_of
from reward.command import (
    MAX_BAD_FRACTION,
    at_least_one,
    at_least_zero,
    check_out,
    counts,
    fraction,
)
from reward.ledger import Ledger
from reward.passages import Document, Documents, passages
from reward.questions import pairs_in, prompt_of, same_question, why_not
from reward.store import content_key
from reward.turns import Row

_SHORTEST = 100  # characters: a heading holds no fact to ask for
_AHEAD = 4  # requests in line for each one that runs, so that a slow answer holds up no other
_GIVE_UP = 5  # passages in a row without an answer: the endpoint is down


@dataclass(frozen=True)
class Work:
    """A passage and how many questions to ask for."""

    key: str  # hash of what is sent, so another model or count is other work
    source: str
    passage: str
    count: int


def works(document: Document, per_document: int, limit: int, model: str) -> list[Work]:
    """The passages of a document, with its questions spread evenly over them.

    Args:
        document: its place and text.
        per_document: questions to ask for in all; fewer than passages leave some passages out.
        limit: most characters of a passage.
        model: whom to ask.
    """
    source, text = document
    found = [passage for passage in passages(text, limit) if len(passage) >= _SHORTEST]
    shares = [
        (place + 1) * per_document // len(found) - place * per_document // len(found)
        for place in range(len(found))
    ]
    return [
        Work(content_key([prompt_of(passage, count), model]), source, passage, count)
        for passage, count in zip(found, shares, strict=True)
        if count
    ]


class Synthesis:
    """Asks about passages and keeps the good pairs.

    Args:
        endpoint: whom to ask.
        ledger: where the pairs go, entered.
        min_grounded: see `reward.questions.why_not`.
    """

    def __init__(self, endpoint: Endpoint, ledger: Ledger, min_grounded: float) -> None:
        self.failed: list[str] = []
        self._endpoint, self._ledger = endpoint, ledger
        self._min_grounded = min_grounded
        self._seen = {same_question(str(row.get("question"))) for row in ledger.rows()}
        self._failed_in_a_row = 0

    async def run(self, todo: list[Work], concurrency: int) -> None:
        """Ask about every passage; the pairs are written in the order of the passages.

        Raises:
            UserError: if the endpoint refuses every request or stopped answering.
        """
        from tqdm import tqdm

        gate = asyncio.Semaphore(concurrency)
        waiting: deque[tuple[Work, asyncio.Task[str]]] = deque()
        async with self._endpoint.client() as client:

            async def ask(work: Work) -> str:
                async with gate:
                    return await self._endpoint.ask(client, prompt_of(work.passage, work.count))

            try:
                for work in tqdm(todo, unit="passage", disable=None):
                    waiting.append((work, asyncio.create_task(ask(work))))
                    if len(waiting) == _AHEAD * concurrency:
                        await self._finish(*waiting.popleft())
                while waiting:
                    await self._finish(*waiting.popleft())
            finally:
                left = [task for _, task in waiting]
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)

    async def _finish(self, work: Work, answer: asyncio.Task[str]) -> None:
        try:
            reply = await answer
        except NoAnswer as error:
            self.failed.append(f"{work.source}: {error}")
            self._failed_in_a_row += 1
            if self._failed_in_a_row == _GIVE_UP:
                raise UserError(
                    f"no answer for {_GIVE_UP} passages in a row ({error}): check --endpoint; the "
                    "same command continues"
                ) from error
            return
        self._failed_in_a_row = 0
        rows, dropped = self.filtered(work, reply)
        self._ledger.add(work.key, rows, {"kept": len(rows), "dropped": dropped})

    def filtered(self, work: Work, reply: str) -> tuple[list[Row], Counter[str]]:
        """The rows of the good pairs in a reply, and the others counted by reason."""
        items = pairs_in(reply)
        if items is None:
            return [], Counter({"unparsable reply": 1})
        rows: list[Row] = []
        dropped: Counter[str] = Counter()
        for item in items:
            reason = why_not(item, work.passage, self._min_grounded, self._seen)
            if reason:
                dropped[reason] += 1
                continue
            question, answer = item["question"].strip(), item["answer"].strip()
            self._seen.add(same_question(question))
            row = {"question": question, "answer": answer}
            rows.append(row | {"source": work.source, "chunk": work.key})
        return rows, dropped


def run(given: argparse.Namespace) -> Iterator[str]:
    """Make the pairs; lines for the user.

    Raises:
        UserError: if something cannot be read, or the endpoint did not answer every question.
    """
    endpoint = Endpoint(
        check_url(given.endpoint),
        given.model,
        key_of(given.api_key_env),
        given.timeout,
        given.retries,
        given.pause,
        is_json_asked=not given.no_json_mode,
    )
    documents = Documents(given.source, given.field)
    check_out(given.out, given.source if documents.reading else None)
    read = list(islice(documents, given.max_documents))
    if documents.reading:
        documents.reading.check(given.max_bad_fraction)
    # By key: a passage that documents share is asked about once.
    wanted = {
        work.key: work
        for document in read
        for work in works(document, given.per_document, given.max_chars, given.model)
    }
    if not wanted:
        raise UserError(
            f"{given.source} has no passage of {_SHORTEST} characters in {len(read)} documents"
        )
    with Ledger(given.out) as ledger:
        todo = [work for key, work in wanted.items() if key not in ledger.done]
        yield (
            f"{len(read):,} documents, {len(wanted):,} passages to ask about"
            + (
                f", {len(wanted) - len(todo):,} of them done before"
                if len(todo) < len(wanted)
                else ""
            )
        )
        synthesis = Synthesis(endpoint, ledger, given.min_grounded)
        asyncio.run(synthesis.run(todo, given.concurrency))
        kept, dropped = ledger.totals()
    yield f"{given.out}: {kept:,} pairs\ndropped: {counts(dropped)}"
    if documents.reading and documents.reading.bad:
        yield documents.reading.described()
    if synthesis.failed:
        raise UserError(
            f"{len(synthesis.failed):,} passages got no answer, such as {synthesis.failed[0]}; the same "
            "command asks again"
        )
    if not kept:
        raise UserError(
            f"no reply had a pair that is fit to keep: {given.model} may be too small for the task, or "
            "--min-grounded too strict"
        )


def main() -> None:
    """Make question–answer pairs from documents with a chat model, and filter them."""
    parser = argparse.ArgumentParser(prog="python -m reward.synthesize", description=main.__doc__)
    add = parser.add_argument
    add("source", metavar="DOCS", help="folder or glob of .txt and .md, or a data file with texts")
    add("out", metavar="OUT.jsonl", type=Path, help="file to write, or to continue")
    add("--endpoint", required=True, metavar="URL", help="OpenAI-compatible, up to /v1")
    add("--model", required=True, metavar="NAME", help="the model's name there")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    add("--per-document", type=at_least_one, default=3, metavar="N", help="questions to ask for")
    add("--max-documents", type=at_least_one, metavar="N", help="the first N documents only")
    add("--field", default="text", help="column with the text in a data file (default: text)")
    add("--max-chars", type=at_least_one, default=3000, metavar="N", help="of a passage")
    add(
        "--min-grounded",
        type=fraction,
        default=0.7,
        metavar="SHARE",
        help="of an answer's content words that the passage must have (default: %(default)s)",
    )
    add("--concurrency", type=at_least_one, default=4, metavar="N", help="requests at a time")
    add("--timeout", type=at_least_zero, default=120.0, metavar="SECONDS", help="of a request")
    add(
        "--retries",
        type=at_least_one,
        default=5,
        metavar="N",
        help="after 429, 5xx, lost connections",
    )
    add(
        "--pause", type=at_least_zero, default=1.0, metavar="SECONDS", help="before the first retry"
    )
    add("--no-json-mode", action="store_true", help="for servers without response_format")
    add("--max-bad-fraction", type=fraction, default=MAX_BAD_FRACTION, help="of a data file's rows")
    given = parser.parse_args()
    with plainly():
        for line in run(given):
            print(line, flush=True)


if __name__ == "__main__":
    main()

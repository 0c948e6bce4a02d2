"""Free-form tasks: a user's own prompts, with the answers expected, as tasks of lm-eval."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from lm_eval.api.task import ConfigurableTask

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Data, Source
from reward.records import NORMALISERS, Conversation, Prompt, detect
from reward.sources import open_rows
from reward.store import content_key
from reward.turns import BadRow, Message, Row

# Without a template: who speaks in a prompt of several turns.
_SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class PromptTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval is untyped here
    """Prompts that a model answers in its own words. What it says is scored by `evals.metrics` alone.

    lm-eval makes one user's turn of a document; here the turns go to the chat template with their roles.
    """

    def __init__(self, name: str, source: Source) -> None:
        documents, self.left_out = read(name, source)
        super().__init__(
            config={
                "task": name,
                "custom_dataset": lambda **_: _dataset(documents),
                "test_split": "test",
                "num_fewshot": 0,
                "doc_to_text": "text",
                "doc_to_target": "references",
                "output_type": "generate_until",
                # Only the model ends its answer: lm-eval's default is the first blank line.
                "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 512},
                "metric_list": [],
                "metadata": {"version": content_key(documents)},
            }
        )

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> str | list[str]:
        """The reference, or the list of them; empty text where there is none."""
        references = list(doc["references"])
        return references if len(references) > 1 else "".join(references)

    def fewshot_context(
        self,
        doc: Any,
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> str:
        """The prompt as the model sees it: rendered by the chat template, or flattened."""
        turns: list[Message] = json.loads(doc["messages"])
        if system_instruction:
            is_system = turns[0]["role"] == "system"
            said = [system_instruction, *([turns[0]["content"]] if is_system else [])]
            turns = [{"role": "system", "content": "\n\n".join(said)}, *turns[is_system:]]
        if apply_chat_template and chat_template:
            return chat_template(turns, add_generation_prompt=True)
        return flattened(turns)

    def process_results(self, doc: Any, results: list[Any]) -> dict[str, Any]:
        """Nothing: see `evals.generated`."""
        return {}


def flattened(turns: list[Message]) -> str:
    """A prompt without a chat template: the text of a single turn; of several, each after its speaker's name.

    Several turns end with "Assistant:", which the model continues.
    """
    if len(turns) == 1:
        return str(turns[0]["content"])
    said = [f"{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns]
    return "\n\n".join([*said, "Assistant:"])


def read(name: str, source: Source) -> tuple[list[Row], int]:
    """The prompts of a source as documents, and how many rows were left out.

    Raises:
        UserError: when the format or source does not exist, nothing can be used, or more rows are unusable than
            `Data.max_bad_fraction` allows, with the first reason.
    """
    where = f"suite.prompts.{name}"
    if source.format not in (*NORMALISERS, "auto"):
        hint = did_you_mean(source.format, [*NORMALISERS, "auto"])
        raise UserError(
            f"{where}.format: there is no format {source.format!r}.{hint} "
            f"There are: auto, {', '.join(NORMALISERS)}"
        )
    documents: list[Row] = []
    reasons: list[str] = []
    for found in _documents(source, where):
        if isinstance(found, str):
            reasons.append(found)
            continue
        documents.append(found)
        if len(documents) == source.limit:
            break
    rows = len(documents) + len(reasons)
    if len(reasons) > Data.max_bad_fraction * rows:
        raise UserError(
            f"{where}: {len(reasons)} of {rows} rows cannot be used, more than the allowed share of "
            f"{Data.max_bad_fraction:.0%}; the first: {reasons[0]}"
        )
    if not documents:
        raise UserError(f"{where}.source={source.source!r} has no rows")
    return documents, len(reasons)


def _documents(source: Source, where: str) -> Iterator[Row | str]:
    """A document for each row, or the reason why there is none."""
    from reward.readers import parse

    for place, raw in open_rows(source, where):
        try:
            row = parse(raw)
            name = detect(row) if source.format == "auto" else source.format
            yield document(NORMALISERS[name](row))
        except BadRow as error:
            yield f"{place}: {error}"


def document(record: Any) -> Row:
    """A record as a document: messages (JSON), their text, the references, and further columns (JSON) if any.

    Raises:
        BadRow: when it is no prompt, or one that cannot be shown to the model as it is.
    """
    if isinstance(record, Conversation):
        turns, references, facts = record.messages[:-1], [record.messages[-1]["content"]], {}
    elif isinstance(record, Prompt):
        turns, references, facts = record.prompt, _references(record), record.facts
    else:
        raise BadRow("a row with a chosen, rejected or rated answer has no right one", "wrong_type")
    if record.tools or any(turn.get("tool_calls") for turn in turns):
        raise BadRow("it offers or calls tools, which a task cannot pass on")
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise BadRow("before the answer is no turn of a user", "bad_role_order")
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    found = {"messages": json.dumps(plain), "text": flattened(plain), "references": references}
    facts = {key: value for key, value in facts.items() if key != "references"}
    if not facts:
        return found
    # with the question, which an instruction may ask to be repeated
    return found | {"facts": json.dumps(facts | {"prompt": plain[-1]["content"]})}


def _references(record: Prompt) -> list[str]:
    """The right answers of a prompt; `references` is a list of several that are all right."""
    several = record.facts.get("references", [])
    if not isinstance(several, list) or not all(isinstance(text, str) for text in several):
        raise BadRow("'references' must be a list of texts")
    return record.references


def _dataset(documents: list[Row]) -> Any:
    import datasets

    text = datasets.Value("string")
    features = {"messages": text, "text": text, "references": datasets.Sequence(text)}
    if any("facts" in document for document in documents):
        features["facts"] = text
        documents = [{"facts": "", **document} for document in documents]
    return {"test": datasets.Dataset.from_list(documents, features=datasets.Features(features))}

"""What a tokenizer makes of records: where the loss falls, what is cut off, what the template does."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.entry import UserError
from reward.findings import KINDS, Finding
from reward.gguf import gguf_file, is_gguf
from reward.records import Record
from reward.versions import to_trl


class TemplateError(Exception):
    """A chat template that cannot write a row; the text is its reason."""


@dataclass
class TokenAudit:
    """Findings, and token counts of every example."""

    findings: list[Finding] = field(default_factory=list)
    examples: int = 0
    no_loss: int = 0
    truncated: int = 0
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(
        default_factory=list
    )  # longest answer of an example, with its end token
    loss: int = 0  # tokens that carry loss


def open_tokenizer(path: str, revision: str | None = None, chat_template: str | None = None) -> Any:
    """The tokenizer of a hub id, a folder, a `.gguf` file or `package:NAME`; no weights are read.

    Raises:
        UserError: if there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"revision": revision} if revision else {}
    place = os.path.expanduser(path)
    if is_gguf(path):
        file = gguf_file(path)
        place, options["gguf_file"] = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # the hub's client, JSON and tokenizers share no base
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot open the tokenizer of {path}: {reason}") from error
    if chat_template:
        tokenizer.chat_template = Path(os.path.expanduser(chat_template)).read_text(
            encoding="utf-8"
        )
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {path} has no chat template; set model.chat_template to a Jinja file, such as the "
            "chat_template.jinja of the model's instruct version"
        )
    return tokenizer


def audit_tokens(
    records: Iterable[tuple[int, Record]],
    tokenizer: Any,
    max_length: int | None = None,
    cut: str = "end",
) -> TokenAudit:
    """Tokenize records as TRL's trainers do and say what is wrong with the result.

    Args:
        records: each with its row in the source.
        tokenizer: with a chat template.
        max_length: tokens of prompt and answer that the trainer keeps; None keeps all.
        cut: what the trainer takes from a longer sequence: its `end`, its `start`
            (`truncation_mode=keep_end`), or `all` of it (the reward trainer leaves the row out).
    """
    audit = TokenAudit()
    for row, record in records:
        found: dict[str, str] = {}
        for example in to_trl(record):
            try:
                _count(example, tokenizer, max_length, cut, audit, found)
            except TemplateError as error:
                raise UserError(
                    f"the chat template cannot write row {row} of the data: {error}. Drop such rows, or set "
                    "model.chat_template to a Jinja file that can"
                ) from error
        audit.findings += [
            Finding(row, kind, KINDS[kind].severity, detail) for kind, detail in found.items()
        ]
    return audit


def _count(
    example: dict[str, Any],
    tokenizer: Any,
    max_length: int | None,
    cut: str,
    audit: TokenAudit,
    found: dict[str, str],
) -> None:
    """Add one training example to the counts, and what is wrong with it to `found`."""
    write = _writer(tokenizer, example)
    prompt = write(example["prompt"], True)
    audit.examples += 1
    answers = [name for name in ("completion", "chosen", "rejected") if name in example]
    losses, longest = [], 0
    for name in answers:
        whole = write(example["prompt"] + example[name], False)
        start = _common(prompt, whole)
        kept = len(whole) if max_length is None else min(len(whole), max_length)
        losses.append(_with_loss(len(whole), start, kept, cut))
        longest = max(longest, len(whole) - start)
        _look(example, name, prompt, whole, start, kept, tokenizer, found)
    audit.prompt.append(len(prompt))
    audit.answer.append(longest)
    audit.loss += sum(losses)
    audit.truncated += "truncated" in found
    if answers and not min(losses):
        audit.no_loss += 1
        needed = len(prompt) + longest
        limit = "the answer has no tokens" if max_length is None else f"max_length={max_length}"
        found["no_loss_tokens"] = f"the prompt has {len(prompt)} tokens, {limit}: it needs {needed}"


def _with_loss(length: int, start: int, kept: int, cut: str) -> int:
    """Tokens after `start` of a sequence that are left when `kept` of its tokens are."""
    if cut == "all":
        return length - start if kept == length else 0
    return min(kept, length - start) if cut == "start" else max(0, kept - start)


def _lost_tools(example: dict[str, Any], name: str, written: str) -> str:
    """Names of called or defined tools that a template left out, as many do."""
    turns = example["prompt"] + example[name]
    calls = [call for turn in turns for call in turn.get("tool_calls") or []]
    tools = json.loads(example["tools"]) if "tools" in example else []
    described = [item.get("function", item) for item in calls + tools if isinstance(item, dict)]
    names = dict.fromkeys(str(item.get("name", "")) for item in described if isinstance(item, dict))
    return ", ".join(repr(called) for called in names if called not in written)


def _look(
    example: dict[str, Any],
    name: str,
    prompt: list[int],
    whole: list[int],
    start: int,
    kept: int,
    tokenizer: Any,
    found: dict[str, str],
) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and whole[:2] == [bos, bos]:
        found["double_bos"] = f"prompt and {name} begin with {tokenizer.bos_token!r} twice"
    if start < len(prompt):
        rest = tokenizer.decode(prompt[start:])
        found["prefix_mismatch"] = (
            f"with {name}, the prompt's end {rest[:60]!r} is written otherwise"
        )
    if lost := _lost_tools(example, name, tokenizer.decode(whole)):
        found["tools_lost"] = f"nothing of {lost} is written"
    if eos is not None and eos not in whole[start:]:
        found["missing_eos"] = f"{name} does not end with {tokenizer.eos_token!r}"
    if kept < len(whole):
        found["truncated"] = f"prompt and {name} have {len(whole)} tokens, {kept} are kept"


def _writer(tokenizer: Any, example: dict[str, Any]) -> Callable[[list[Any], bool], list[int]]:
    tools = json.loads(example["tools"]) if "tools" in example else None

    def write(turns: list[Any], opens_answer: bool) -> list[int]:
        try:
            ids = tokenizer.apply_chat_template(
                turns, tools=tools, add_generation_prompt=opens_answer, return_dict=True
            )["input_ids"]
        except Exception as error:  # whatever a Jinja template raises
            raise TemplateError(str(error)[:200]) from error
        return list(ids)

    return write


def _common(left: list[int], right: list[int]) -> int:
    """Length of the longest common beginning."""
    if right[: len(left)] == left:
        return len(left)
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )

"""What a tokenizer and a template do to records, against counts made the long way."""

from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from reward.records import Conversation, Preference, Record
from reward.tokens import TokenAudit, audit_tokens, open_tokenizer

GOOD = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


PAIR = Preference([turn("user", "Hi?")], [turn("assistant", "Yes!")], [turn("assistant", "No.")])
TALK = Conversation(
    [turn("user", "a"), turn("assistant", "bb"), turn("user", "c"), turn("assistant", "dd")]
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    made = open_tokenizer(str(tiny_model))
    made.bos_token = made.eos_token
    return made


def look(tokenizer: Any, record: Record, template: str = GOOD, **limits: Any) -> TokenAudit:
    tokenizer.chat_template = template
    return audit_tokens([(7, record)], tokenizer, **limits)


def kinds(audit: TokenAudit) -> dict[str, str]:
    assert {finding.row for finding in audit.findings} <= {7}
    return {finding.kind: finding.detail for finding in audit.findings}


def size(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_good_template_has_no_findings_and_counts_by_hand(tokenizer: Any) -> None:
    audit = look(tokenizer, PAIR)
    assert kinds(audit) == {}
    assert audit.prompt == [size(tokenizer, "<|user|>Hi?<|assistant|>")]
    answers = [size(tokenizer, text) + 1 for text in ("Yes!", "No.")]  # each with its end token
    assert (audit.loss, audit.answer) == (sum(answers), [max(answers)])


def test_every_answer_of_a_conversation_is_an_example(tokenizer: Any) -> None:
    audit = look(tokenizer, TALK)
    assert audit.examples == 2
    assert audit.loss == 2 * (size(tokenizer, "bb") + 1)
    assert kinds(audit) == {}


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ bos_token }}{{ bos_token }}" + GOOD, "double_bos"),
        (GOOD.replace("{{ eos_token }}", ""), "missing_eos"),
        (GOOD.replace("<|assistant|>{% endif %}", "<|helper|>{% endif %}"), "prefix_mismatch"),
    ],
)
def test_what_a_template_does_wrong_is_told(tokenizer: Any, template: str, kind: str) -> None:
    assert list(kinds(look(tokenizer, PAIR, template))) == [kind]


def test_truncation_of_each_side(tokenizer: Any) -> None:
    prompt = size(tokenizer, "<|user|>Hi?<|assistant|>")
    longest = prompt + size(tokenizer, "Yes!") + 1
    assert kinds(look(tokenizer, PAIR, max_length=longest)) == {}
    assert list(kinds(look(tokenizer, PAIR, max_length=longest - 1))) == ["truncated"]
    cut = kinds(look(tokenizer, PAIR, max_length=prompt))
    assert set(cut) == {"truncated", "no_loss_tokens"}
    assert f"it needs {longest}" in cut["no_loss_tokens"]
    from_the_end = look(tokenizer, PAIR, max_length=3, cut="start")
    assert set(kinds(from_the_end)) == {"truncated"}
    assert from_the_end.loss == 6
    left_out = look(tokenizer, PAIR, max_length=longest - 1, cut="all")
    assert (left_out.no_loss, left_out.truncated) == (1, 1)


def test_a_tool_call_that_the_template_leaves_out_is_told(tokenizer: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    calling = Conversation([turn("user", "1+2?"), call])
    assert kinds(look(tokenizer, calling))["tools_lost"] == "nothing of 'add' is written"
    knows = GOOD.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
    assert "tools_lost" not in kinds(look(tokenizer, calling, knows))


def test_a_template_that_cannot_write_a_row_is_said(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="cannot write row 7 of the data: no system turns"):
        look(tokenizer, PAIR, "{{ raise_exception('no system turns') }}")


def test_a_model_without_a_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no chat template; set model"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="cannot open the tokenizer"):
        open_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("path", ["package:", "package:a.b", "package:nothing_of_that_name"])
def test_a_package_that_cannot_be_is_told(path: str) -> None:
    with pytest.raises(UserError, match=f"^model.path={path}: "):
        open_tokenizer(path)

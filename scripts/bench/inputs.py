"""What both sides read, written once: a model folder, rows, a task.

The functions import heavy libraries and are called by `running.apart`.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from counting import Shape

from conf.entry import UserError
from reward.store import build_once, fingerprint

INT8 = "torchao_int8"  # a name in evals.quantize.QUANTIZERS
_SHORT_PROMPT, _SHORT_ANSWER = 30, 150  # tokens


def model_folder(path: str, out: Path) -> Path:
    """The model as an ordinary folder: a GGUF or `package:NAME` is written to `out` once.

    Raises:
        UserError: when it is no folder and cannot be made one.
    """
    from conf.schema import Model
    from evals.models import check, local_path

    check(Model(path=path))
    folder = Path(local_path(Model(path=path), out / "cache")).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"--model {path} must be a folder, a .gguf file or package:NAME")
    return folder


def shape(model: Path) -> Shape:
    """What a causal model's operations depend on."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    apart = {
        id(m.weight): m.weight.numel()
        for m in (made.get_input_embeddings(), made.get_output_embeddings())
    }
    every = {id(p): p.numel() for p in made.parameters()}
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        sum(every.values()) - sum(apart.values()),
        made.get_output_embeddings().weight.numel(),
        config.num_hidden_layers,
        heads * size,
    )  # fmt: skip


def reward_start(model: Path, out: Path) -> Path:
    """The model with a scalar head, so that both sides begin with the same one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    def build(folder: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        tokenizer = _tokenizer(model)
        made = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="auto")
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        made.config.get_text_config().pad_token_id = pad
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {}

    return _built("reward_start", model, out, build)


def tuned(model: Path, out: Path) -> Path:
    """A second set of weights, as training would leave it: each moved by a hundredth of its matrix's spread.

    What an evaluation costs does not depend on the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def build(folder: Path) -> dict[str, Any]:
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter += 0.01 * parameter.float().std() * torch.randn_like(parameter)
        made.save_pretrained(folder)
        _tokenizer(model).save_pretrained(folder)
        return {}

    return _built("tuned", model, out, build)


def int8(model: Path, out: Path) -> Path:
    """The model with weights in int8, as a checkpoint that lm-eval opens.

    By torchao: with LLM.int8() an answer depends on what else is in its batch, so no two programs agree.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from evals.quantize import QUANTIZERS

    def build(folder: Path) -> dict[str, Any]:
        options = QUANTIZERS[INT8].options()
        made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **options)
        made.save_pretrained(folder)
        _tokenizer(model).save_pretrained(folder)
        return {}

    return _built("int8", model, out, build)


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _built(name: str, model: Path, out: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder made of a model, of that model's very weights."""
    from reward.quiet import quiet

    quiet()
    return build_once(out / f"{name}-{fingerprint(model)}", build)


# --- rows for training ---


def training_rows(
    source: str, kind: str, model: Path, longest: int, number: int, out: Path
) -> Path:
    """The first rows of a source whose prompt leaves room for an answer, as one JSONL that both sides read.

    Args:
        source: any file that `python -m align` reads, or `short` for pairs with short prompts.
        kind: `preference` or `sft`.
        longest: `max_length` of the trainers, in tokens.
        number: of rows.
        out: folder for the file.

    Raises:
        UserError: when the source has fewer.
    """
    from reward.quiet import quiet

    quiet()
    tokenizer = _tokenizer(model)
    rows = _short_pairs(tokenizer) if source == "short" else _rows_of(source, kind, out)
    found = []
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=False
        )
        if len(ids) < longest - 1 and row not in found:
            found.append(row)
        if len(found) == number:
            break
    if len(found) < number:
        raise UserError(
            f"{source} has {len(found)} usable rows with prompts below {longest} tokens, and --rows asks for {number}"
        )
    return _written(found, out / "rows" / "train.jsonl").parent


def _rows_of(source: str, kind: str, out: Path) -> Iterator[dict[str, Any]]:
    """As `python -m align` would train on them. Of demonstrations, those of one answer."""
    from conf.schema import Data
    from reward.data import prepare
    from reward.versions import to_trl

    for record in prepare(Data(source=source, max_bad_fraction=1.0), kind, out / "data").records():
        rows = list(to_trl(record))
        if len(rows) == 1:
            fields = (
                ("prompt", "chosen", "rejected")
                if kind == "preference"
                else ("prompt", "completion")
            )
            yield {name: rows[0][name] for name in fields}


def _short_pairs(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Pairs of random words: prompts of about 30 tokens with the template, answers of 150."""
    words = [
        text
        for text in map(tokenizer.decode, range(len(tokenizer)))
        if text[:1] == " " and text[1:].isalpha()
    ]
    words = [word for word in words if word.isascii()] or [" a", " b", " c", " d"]
    drawn = random.Random(0)

    def text(size: int) -> str:
        return "".join(drawn.choices(words, k=size)).strip()

    def turn(role: str, size: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(size)}]

    empty = [{"role": "user", "content": ""}]
    frame = len(tokenizer.apply_chat_template(empty, add_generation_prompt=True, return_dict=False))
    while True:
        pair = {name: turn("assistant", _SHORT_ANSWER) for name in ("chosen", "rejected")}
        yield {"prompt": turn("user", max(4, _SHORT_PROMPT - frame)), **pair}


# --- questions for evaluation ---

TASK = "bench_choice"
_POOL = 32  # solved questions to draw examples from

_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {pool}
    validation: {questions}
output_type: multiple_choice
training_split: train
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def task_folder(source: Path, number: int, options: int | None, out: Path) -> Path:
    """An lm-eval task of the first questions of a file, with further ones behind them as examples.

    Args:
        source: rows with `ctx`, `endings` and `label`, as HellaSwag's.
        number: of questions.
        options: of each question; more than it has are taken from the questions after it. None: its own.
        out: folder for the task and its rows.

    Raises:
        UserError: when the file has too few questions or other fields.
    """
    opened = gzip.open if source.name.endswith(".gz") else open
    with opened(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if rows and not {"ctx", "endings", "label"} <= rows[0].keys():
        raise UserError(
            f"{source}: questions need the fields ctx, endings and label, as HellaSwag's"
        )
    if len(rows) < number + _POOL:
        raise UserError(
            f"{source} has {len(rows)} questions; --rows {number} and {_POOL} examples are more"
        )
    every = [_question(rows, place, options) for place in range(number + _POOL)]
    folder = out / "tasks"
    files = {
        "questions": _written(every[:number], folder / "questions.jsonl"),
        "pool": _written(every[number:], folder / "pool.jsonl"),
    }
    (folder / f"{TASK}.yaml").write_text(_YAML.format(task=TASK, **files), encoding="utf-8")
    return folder


def _question(rows: list[dict[str, Any]], place: int, options: int | None) -> dict[str, Any]:
    row = rows[place]
    right = int(row["label"])
    others = [ending for number, ending in enumerate(row["endings"]) if number != right]
    further = (ending for later in rows[place + 1 :] for ending in later["endings"])
    size = options or len(row["endings"])
    while len(others) < size - 1:
        others.append(next(further))
    choices = others[: size - 1]
    choices.insert(right % size, row["endings"][right])
    return {"query": row["ctx"], "choices": choices, "label": right % size}


def _written(rows: list[dict[str, Any]], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    return file.resolve()

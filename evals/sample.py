"""`python -m evals.sample model.path=… source=… out=…`: completions of prompts, drawn from a model."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.entry import UserError, entry
from conf.schema import Sampling

if TYPE_CHECKING:
    from evals.generate import Generator
    from reward.records import Prompt
    from reward.turns import Row

_PACKAGE = Path(__file__).parent
# A change in these files can change a row.
_CODE = [
    *(_PACKAGE / name for name in ("generate.py", "gguf.py", "models.py", "quantize.py")),
    *(
        _PACKAGE.parent / "reward" / name
        for name in ("prompts.py", "records.py", "turns.py", "demo.py")
    ),
]


def sample(config: Sampling) -> dict[str, Any]:
    """Write the completions that `config.out` does not hold yet.

    Rows are `{"prompt": [message…], "completions": [{"text", "tokens", "finish"}…]}`, in the order of the source, with
    `tools` where the prompt has them. A prompt that the source repeats is completed once.

    Returns:
        What was done: counts, as they also stand in the manifest beside the file.

    Raises:
        UserError: when the settings, the source, the model or the file do not allow it.
    """
    from evals.journal import continued
    from evals.models import check, free_device, open_model
    from evals.quantize import QuantizerUnavailable, find
    from reward.prompts import key_of
    from reward.samples import check_sampling

    check_sampling(config)
    find(config.quant)
    check(config.model)
    prompts, left_out = read_prompts(config)
    cache = Path(config.paths.root) / "cache"
    with continued(Path(config.out), settings(config, cache)) as journal:
        present = {key_of(row["prompt"], row.get("tools")) for row in journal.rows}
        todo = [prompt for prompt in prompts if key_of(prompt.prompt, prompt.tools) not in present]
        if todo:
            try:
                with open_model(config.model, config.quant, cache) as (model, tokenizer):
                    for row in _completed(todo, model, tokenizer, config, left_out):
                        journal.append(row)
                del model
                free_device()
            except QuantizerUnavailable as error:
                raise UserError(f"quant={config.quant} cannot run here: {error}") from error
        if not journal.rows:
            raise UserError("every prompt is longer than the model can see; lower max_new_tokens")
        facts = _facts(journal.rows, len(present)) | {"left_out": dict(left_out)}
        journal.write_manifest(is_complete=True, **facts, **_origin(config))
    return facts


def settings(config: Sampling, cache: Path) -> dict[str, Any]:
    """All that a row depends on besides its prompt. Not the batch size, see `evals.generate`."""
    import torch

    from evals.models import identity
    from evals.provenance import versions
    from evals.quantize import QUANTIZERS
    from reward import sources
    from reward.store import source_key

    names = ("n", "temperature", "top_p", "max_new_tokens", "seed", "format")
    library = QUANTIZERS[config.quant].library
    return {
        "model": identity(config.model, cache),
        "quantizer": config.quant,
        "source": sources.identity(config, "sample", cache),
        **{name: getattr(config, name) for name in names},
        "code": source_key(*_CODE),
        "versions": versions("torch", "transformers", *([library] if library else [])),
        "device": "cuda" if torch.cuda.is_available() else "cpu",  # has random numbers of its own
    }


def read_prompts(config: Sampling) -> tuple[list["Prompt"], Counter[str]]:
    """The distinct prompts of a source, up to `limit`, and what was left out by reason.

    Raises:
        UserError: when more than `max_bad_fraction` of the rows cannot be used, with the first reason.
    """
    from reward import prompts
    from reward.records import Prompt

    found, left_out = prompts.read_prompts(config, "sample", config.max_bad_fraction)
    left_out["too_long"] = 0
    return [Prompt(asked.prompt, None, asked.tools) for asked in found.values()], left_out


def _completed(
    prompts: list["Prompt"], model: Any, tokenizer: Any, config: Sampling, left_out: Counter[str]
) -> Iterator["Row"]:
    """A row for each prompt that fits into the model's context."""
    from tqdm import tqdm

    from evals.generate import Generator, seed_of

    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {config.model.path} has no chat template; set model.chat_template to a Jinja file"
        )
    generator = Generator(model, tokenizer, config.temperature, config.top_p, config.max_new_tokens)
    fitting = [(prompt, ids) for prompt in prompts if (ids := _fitting_ids(generator, prompt))]
    left_out["too_long"] += len(prompts) - len(fitting)
    work = [(prompt, ids, index) for prompt, ids in fitting for index in range(config.n)]
    waiting: list[dict[str, Any]] = []  # completions of a prompt that the batch cut in two
    for start in tqdm(range(0, len(work), config.batch_size), unit="batch", disable=None):
        batch = work[start : start + config.batch_size]
        seeds = [seed_of(config.seed, prompt, index) for prompt, _, index in batch]
        completions = generator.complete([ids for _, ids, _ in batch], seeds)
        for (prompt, _, index), completion in zip(batch, completions, strict=True):
            waiting.append(dataclasses.asdict(completion))
            if index == config.n - 1:
                tools = {"tools": prompt.tools} if prompt.tools else {}
                yield {"prompt": prompt.prompt, **tools, "completions": waiting}
                waiting = []


def _fitting_ids(generator: "Generator", prompt: "Prompt") -> list[int] | None:
    """The prompt's token ids; None when prompt and completion exceed the context."""
    from jinja2 import TemplateError

    try:
        ids = generator.encode(prompt)
    except TemplateError as error:
        start = prompt.prompt[0]["content"][:40]
        raise UserError(
            f"the model's chat template refuses a prompt ({error}); it begins with {start!r}"
        ) from error
    limit = generator.context
    return None if limit and len(ids) + generator.max_new_tokens > limit else ids


def _facts(rows: list["Row"], present: int) -> dict[str, Any]:
    completions = [completion for row in rows for completion in row["completions"]]
    return {
        "prompts": len(rows),
        "present": present,
        "completions": len(completions),
        "tokens": sum(completion["tokens"] for completion in completions),
        "ended": sum(completion["finish"] == "eos" for completion in completions),
        "empty": sum(not completion["text"].strip() for completion in completions),
    }


def _origin(config: Sampling) -> dict[str, Any]:
    from evals.provenance import provenance

    return {"model": config.model.path, "source": config.source, "provenance": provenance()}


@entry("sample", Sampling)
def main(config: Sampling, overrides: list[str]) -> float | None:
    """Sample, and print how much there is and how often the model ended by itself."""
    from reward.quiet import quiet

    del overrides
    quiet()
    found = sample(config)
    n = found["completions"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in found["left_out"].items())
    print(
        f"{found['prompts']} prompts ({found['present']} were there), {n} completions of "
        f"{found['tokens'] / n:.1f} tokens on average, {found['ended'] / n:.0%} ended by the model, "
        f"{found['empty']} empty; left out: {left_out.replace('_', ' ')}"
    )
    print(config.out)
    return None


if __name__ == "__main__":
    main()

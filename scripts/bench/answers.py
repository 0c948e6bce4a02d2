"""Whether two evaluations of multiple-choice questions agree, question by question."""

from dataclasses import dataclass
from typing import Any

METRICS = ("acc", "acc_norm")
# How far a log-likelihood may be off by rounding, in nats of a whole option. Products in bfloat16 keep 8 bits, those in
# float32 24, and how requests are batched decides what is summed first.
WITHIN = {"bfloat16": 0.5, "float32": 1e-3}


@dataclass(frozen=True)
class Answer:
    """What one side made of a question."""

    document: int
    picked: dict[str, int]  # metric → number of the option with the highest value
    values: dict[str, float]  # of the metrics
    likelihoods: list[float]  # of the options; empty where they were not kept
    lengths: list[int]  # of the options, in characters, by which `acc_norm` divides

    def normed(self, option: int, metric: str) -> tuple[float, float]:
        """An option's value, and by what its likelihood was divided."""
        length = self.lengths[option] if metric == "acc_norm" else 1
        return self.likelihoods[option] / length, length


def of_peer(row: dict[str, Any]) -> Answer:
    """An answer from a line of lm-eval's samples."""
    likelihoods = [float(one[0]) for one in row["filtered_resps"]]
    lengths = list(map(len, row["doc"]["choices"]))
    options = range(len(lengths))
    picked = {
        "acc": max(options, key=likelihoods.__getitem__),
        "acc_norm": max(options, key=lambda option: likelihoods[option] / lengths[option]),
    }
    values = {name: float(row[name]) for name in METRICS}
    return Answer(row["doc_id"], picked, values, likelihoods, lengths)


def of_ours(row: dict[str, Any]) -> Answer:
    """An answer from a line of our samples."""
    picked, values = ({name: row[key][name] for name in METRICS} for key in ("picked", "metrics"))
    return Answer(row["doc_id"], picked, values, [], [])


def _is_tie(theirs: Answer, own: Answer, metric: str, within: float) -> bool:
    """Whether rounding may make one side's option the other's: both likelihoods may be off."""
    best, length = theirs.normed(theirs.picked[metric], metric)
    other, its_length = theirs.normed(own.picked[metric], metric)
    return best - other <= within / length + within / its_length


def is_alike(theirs: Answer, own: Answer) -> bool:
    """Whether both sides took the same options."""
    return theirs.picked == own.picked


def differences(name: str, theirs: list[Answer], own: list[Answer], dtype: str) -> list[str]:
    """What is answered otherwise and not by rounding, and what one side calls right and the other wrong."""
    if [one.document for one in theirs] != [one.document for one in own]:
        return [f"{name}: the two sides answered other questions"]
    found = []
    for a, b in zip(theirs, own, strict=True):
        for metric in METRICS:
            options = a.picked[metric], b.picked[metric]
            where = f"{name}, question {a.document}, {metric}: "
            if options[0] == options[1]:
                if a.values[metric] != b.values[metric]:
                    found.append(
                        f"{where}{a.values[metric]:g} with the peer, {b.values[metric]:g} with ours"
                    )
            elif not _is_tie(a, b, metric, WITHIN[dtype]):
                found.append(
                    f"{where}the peer takes option {options[0]}, ours {options[1]}: no rounding does that"
                )
    return found

"""Whether an answer follows instructions that a program can check: IFEval and IFBench.

IFEval: Zhou et al. 2023, arXiv 2311.07911. IFBench: Pyatkin et al. 2025, arXiv 2507.02833. The official checks of both,
as the package if-verifiable bundles them.
"""

import importlib.util
import json
import math
import random
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from conf.entry import UserError
from reward.answers import Answer
from reward.verifiers.aside import Aside, Unanswered

_ASIDE = Aside("instructions")
_PLAIN = "Yes."  # an answer that every usable instruction can be checked on
_LACKING = "LookupError: "  # what NLTK raises for data that are not here
_RESOURCE = re.compile(r"nltk\.download\('([\w]+)'\)")


def ifeval(answers: Sequence[Answer], *, loose: bool = False, share: bool = False) -> list[float]:
    """1 where the answer follows all instructions of its prompt's row.

    The row's `instruction_id_list` names them, `kwargs` has the arguments of each; NaN where a row has no such columns,
    or an instruction that does not exist; 0 where it is this answer alone that cannot be checked. A block
    <think>…</think> at the start is not part of the answer.

    Args:
        loose: an instruction also counts as followed when it is without the first line, the last line, both, or
            without asterisks (section 2.2 of IFEval).
        share: the share of the instructions that are followed, instead of all or nothing.

    Raises:
        UserError: when the checks cannot be run, or NLTK's data, which some need, are not here.
    """
    name = f"{'partial' if share else 'binary'}_{'loose' if loose else 'strict'}"
    return [_followed(answer, name) for answer in answers]


def _followed(answer: Answer, name: str) -> float:
    names = answer.facts.get("instruction_id_list")
    options = answer.facts.get("kwargs")
    if not isinstance(names, list) or not isinstance(options, list):
        return math.nan
    prompt = answer.prompt[-1]["content"] if answer.prompt else ""
    question = {"names": names, "options": options, "prompt": prompt, "text": answer.text}
    if found := _scores(question):
        return float(found[name])
    return 0.0 if _scores(question | {"text": _PLAIN}) else math.nan


def _scores(question: dict[str, Any]) -> dict[str, float] | None:
    """What `reply` says; None where it says nothing."""
    try:
        found: dict[str, float] = _ASIDE.ask(question)
    except Unanswered as error:
        if error.problem and error.problem.startswith(_LACKING):
            raise UserError(_remedy(error.problem, question["names"])) from error
        return None
    return found


def _remedy(problem: str, names: list[str]) -> str:
    """What to fetch, of which NLTK says the name in a banner of ten lines."""
    found = _RESOURCE.search(problem)
    data = found.group(1) if found else "punkt_tab"
    return (
        f"ifeval: instructions such as {', '.join(names)} need NLTK's {data}, which is not here. Where there is a "
        f"network: python -m nltk.downloader {data}; or copy its folder to nltk_data, see NLTK_DATA"
    )


def prepare() -> None:
    """In the process: import the checks alone, and let no check fetch anything.

    The package's own __init__ imports `datasets`, for functions that are not used here, and IFBench's checks download
    NLTK's data when they are imported.
    """
    import langdetect
    import nltk

    nltk.download = lambda *_, **__: False
    langdetect.DetectorFactory.seed = 0  # or the language of a short text is drawn at random
    found = importlib.util.find_spec("if_verifiable")
    if found is None:
        raise ModuleNotFoundError("if-verifiable is not installed")
    package = types.ModuleType("if_verifiable")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["if_verifiable"] = package
    _registry()


def _registry() -> dict[str, Any]:
    from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT as IFBENCH
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT as IFEVAL

    return {**IFBENCH, **IFEVAL}


def reply(
    names: list[str], options: list[Mapping[str, Any] | str | None], prompt: str, text: str
) -> dict[str, float]:
    """In the process: the four scores of if-verifiable, `binary_strict` and so on.

    Raises:
        LookupError: when NLTK's data are not here.
        ValueError: when the instructions make no sense.
    """
    from if_verifiable.common import evaluate_instructions

    registry = _registry()
    unknown = [name for name in names if name not in registry]  # the package would skip them
    if unknown or not names or len(names) != len(options):
        raise ValueError(f"no instructions {unknown}, or not one set of arguments for each")
    random.seed(0)  # an instruction draws an argument that its row lacks
    arguments = [json.loads(item) if isinstance(item, str) else item or {} for item in options]
    _, scores = evaluate_instructions(text, names, arguments, prompt, registry)
    return dict(vars(scores))

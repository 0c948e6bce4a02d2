"""Verifiable rewards: answers that a program can check. One table, for training and evaluation alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from conf.entry import UserError
from conf.passthrough import did_you_mean
from reward import sandbox


@dataclass(frozen=True)
class Verifier:
    """A way to check an answer.

    `function` is "module:function" in reward.verifiers: (answers, *, options) → a score for each answer, NaN where
    nothing can be said. `needs` names what an answer must come with: "references", or a column of its prompt's row.
    """

    function: str
    needs: str | None = None
    library: str | None = None  # package whose version decides the score
    check: Callable[[str], None] | None = (
        None  # refuses, before anything is loaded, what cannot run here
    )


VERIFIERS = {
    "exact": Verifier("words:exact", "references"),
    # tests in `tests`, `test` or `inputs`, so no one column is what it needs
    "code": Verifier("code:code", check=sandbox.check),
}


def check(names: Iterable[str], where: str) -> None:
    """Refuse a name that no verifier has, and a verifier that cannot run here.

    Raises:
        UserError: with the nearest name and the list, or with what is missing.
    """
    for name in names:
        if name not in VERIFIERS:
            hint = did_you_mean(name, VERIFIERS)
            raise UserError(
                f"{where}: there is no verifier {name!r}.{hint} There are: {', '.join(VERIFIERS)}"
            )
        if refuse := VERIFIERS[name].check:
            refuse(where)

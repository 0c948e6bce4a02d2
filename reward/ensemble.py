"""Several reward models as one: seeds or checkpoints whose disagreement warns of what none of them has learnt.

The combinations are those of Coste et al. 2023 (arXiv:2310.02743): `mean`; `min`, their worst-case optimization; and
`mean_minus_std`, their uncertainty-weighted optimization with the standard deviation in place of the variance, so that
`k` has no unit. Members that share a pretraining share mistakes too (Eisenstein et al. 2023, arXiv:2312.09244).
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from conf.entry import UserError
from conf.passthrough import did_you_mean
from reward import classifier
from reward.chat import key_of
from reward.model import RewardModel
from reward.store import read_json
from reward.turns import Message

if TYPE_CHECKING:
    from reward.remote import RemoteModel

Array = np.ndarray[Any, Any]

COMBINATIONS = ("mean", "min", "mean_minus_std")
K = 1.0  # standard deviations, unless told otherwise


class Member(Protocol):
    """One reward model, in this process or behind a server."""

    def score(
        self,
        prompts: Sequence[list[Message]],
        completions: Sequence[list[Message]],
        tools: Sequence[list[Any] | None] | None = None,
    ) -> list[float]:
        """Rewards, higher is better; NaN where there is none."""
        ...


class Scale(NamedTuple):
    """Where a member's scores lie on reference data."""

    mean: float
    std: float


class Ensemble:
    """Reward models that score as one. Use `open_models`.

    Attributes:
        names: (members,) what each was opened from.
        identities: (members,) what names the weights of each.
        max_length: tokens of the longest conversation that every member can score; None: unknown.
    """

    def __init__(
        self,
        members: Sequence[tuple[str, Member]],
        combine: str = "mean",
        k: float = K,
        scales: Mapping[str, Scale] | None = None,
    ) -> None:
        check(combine, k, len(members))
        self.names = [name for name, _ in members]
        self._members = [member for _, member in members]
        # A server that does not tell is known by its address.
        self.identities = [str(getattr(member, "identity", name)) for name, member in members]
        limits = [getattr(member, "max_length", None) for member in self._members]
        self.max_length = min((limit for limit in limits if limit), default=None)
        self._combine, self._k = combine, k
        self._scales = None if scales is None else self._matched(scales)

    def _matched(self, scales: Mapping[str, Scale]) -> Array:
        """(members, 2) the mean and the standard deviation of each member."""
        for name, identity in zip(self.names, self.identities, strict=True):
            if identity not in scales:
                raise UserError(
                    f"the scales do not hold {name} with these weights; make them with the same models"
                )
            if not (math.isfinite(scales[identity].mean) and scales[identity].std > 0):
                raise UserError(f"the scales of {name} have no spread: score more reference data")
        return np.array([scales[identity] for identity in self.identities])

    def members(
        self,
        prompts: Sequence[list[Message]],
        completions: Sequence[list[Message]],
        tools: Sequence[list[Any] | None] | None = None,
    ) -> Array:
        """(n, members) float64: what each member says, on its own scale (with `scales`: in its standard deviations).

        One member scores the whole list before the next one begins. NaN where a member has no score.
        """
        columns = [member.score(prompts, completions, tools) for member in self._members]
        found = np.array(columns, dtype=np.float64).reshape(len(columns), len(prompts)).T
        if self._scales is not None:
            found = (found - self._scales[:, 0]) / self._scales[:, 1]
        return found

    def score(
        self,
        prompts: Sequence[list[Message]],
        completions: Sequence[list[Message]],
        tools: Sequence[list[Any] | None] | None = None,
    ) -> list[float]:
        """The combined rewards, higher is better; NaN where any member has none."""
        return self.combined(self.members(prompts, completions, tools))

    def close(self) -> None:
        """Close the connections of members behind servers."""
        for member in self._members:
            close(member)

    def combined(self, scores: Array) -> list[float]:
        """The combination of the members' scores (n, members)."""
        return [float(value) for value in combine(scores, self._combine, self._k)]


def open_models(
    paths: Sequence[str],
    combine: str = "mean",
    k: float = K,
    scales: str | Path | None = None,
    **options: Any,
) -> Ensemble:
    """Load reward models to score as one.

    Members have scales of their own: Bradley–Terry leaves the zero of each free, and its unit grows with training. The
    member with the largest unit then rules `mean`, the one with the lowest zero `min`. Seeds of one recipe are close
    when they are trained with centred rewards; for other members give `scales`.

    Args:
        paths: of each a folder, an adapter, a hub id, or the address http(s)://… of a scoring server.
        combine: `mean`, `min`, or `mean_minus_std`.
        k: standard deviations that `mean_minus_std` takes off.
        scales: manifest that `python -m reward.score` wrote about the same members on reference data; each member's
            scores are centred on its mean there and divided by its standard deviation.
        options: of `RewardModel.load`; a server has its own.

    Raises:
        UserError: when a model cannot be opened, or an option is wrong.
    """
    check(combine, k, len(paths))
    known = None if scales is None else read_scales(Path(os.path.expanduser(scales)))
    members = [(path, open_model(path, **options)) for path in paths]
    return Ensemble(members, combine, k, known)


def check(combine: Any, k: Any, members: int) -> None:
    """Refuse what cannot be combined, before anything is loaded.

    Raises:
        UserError: naming the option.
    """
    if combine not in COMBINATIONS:
        raise UserError(
            f"there is no combination {combine!r}.{did_you_mean(str(combine), COMBINATIONS)} "
            f"There are: {', '.join(COMBINATIONS)}"
        )
    is_number = isinstance(k, int | float) and not isinstance(k, bool)
    if not (is_number and math.isfinite(k) and k >= 0):
        raise UserError(f"k={k!r} must be a number, 0 or more: it takes disagreement off")
    if k != K and combine != "mean_minus_std":
        raise UserError(f"k={k:g} is of mean_minus_std: {combine} does not use it")
    if not members:
        raise UserError("an ensemble needs at least one reward model")


def check_options(paths: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse options that would do nothing, or mean another thing for each model.

    Args:
        paths: of one model, or of the members of an ensemble.
        options: of `RewardModel.load`, those that were set.

    Raises:
        UserError: naming the option.
    """
    if options and all(map(is_remote, paths)):
        raise UserError(
            f"{', '.join(options)}: the options of a model at an address are set where it is served"
        )
    if "revision" in options and len(paths) > 1:
        raise UserError("revision is of one model; give several as folders")


def is_remote(path: str) -> bool:
    """Whether a path is the address of a scoring server."""
    return path.startswith(("http://", "https://"))


def open_model(path: str, **options: Any) -> Member:
    """A reward model in this process, or behind a server where `path` is its address.

    Args:
        path: a folder, an adapter, a hub id, or `http(s)://HOST:PORT`.
        options: of `RewardModel.load`; a server has its own.

    Raises:
        UserError: when it cannot be opened.
    """
    return _served(path) if is_remote(path) else RewardModel.load(path, **options)


def close(model: Member) -> None:
    """Close the connections of a model behind a server; one in this process is freed with its last reference."""
    if hasattr(model, "close"):
        model.close()


def identity(path: str, revision: str | None = None, cache: Path | None = None) -> str:
    """What names a reward model's bytes, without loading it: a server tells it.

    Args:
        path: as of `open_model`.
        revision: hub branch, tag or commit.
        cache: folder that remembers hashes of files.

    Raises:
        UserError: when the server cannot be reached, or the folder is an adapter of something else.
    """
    if not is_remote(path):
        return classifier.identity(path, revision, cache)
    with contextlib.closing(_served(path)) as model:
        return model.identity


def _served(address: str) -> "RemoteModel":
    from reward.remote import API_KEY, RemoteModel

    key = key_of(API_KEY, "the key in") if os.environ.get(API_KEY) else None
    return RemoteModel(address, key=key)


def read_scales(path: Path) -> dict[str, Scale]:
    """The scale of each member, by its identity, out of a manifest of `python -m reward.score`.

    Raises:
        UserError: when it is no such file.
    """
    try:
        members = read_json(path)["members"]
        return {m["identity"]: Scale(float(m["mean"]), float(m["std"])) for m in members}
    except OSError as error:
        raise UserError(f"cannot read the scales in {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no scales: give the OUT.jsonl.manifest.json of `python -m reward.score` on reference data"
        ) from error


def combine(scores: Array, how: str, k: float) -> Array:
    """One score for each row of (n, members); NaN where any member has none."""
    if how == "min":
        return np.asarray(scores.min(axis=1))
    mean, std = _moments(scores)
    return mean if how == "mean" else mean - k * std


def disagreement(scores: Array) -> Array:
    """(n,) standard deviation between members (divided by their number, as Coste et al. do)."""
    return _moments(scores)[1]


def _moments(scores: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each row, exact when all members say the same: sums start at the first one."""
    first = scores[:, :1]
    off = scores - first
    mean = off.mean(axis=1)
    return first[:, 0] + mean, np.sqrt(((off - mean[:, None]) ** 2).mean(axis=1))


def are_at_odds(first: Array, second: Array) -> Array:
    """(n,) whether members disagree about which of two completions is better.

    Args:
        first, second: (n, members) scores of the two; a tie agrees with nothing but a tie.

    Returns:
        1.0 or 0.0; NaN where any member has no score. The mean over pairs is the share at odds.
    """
    order = np.sign(first - second)
    odds = (order != order[:, :1]).any(axis=1).astype(np.float64)
    return np.where(np.isnan(order).any(axis=1), math.nan, odds)

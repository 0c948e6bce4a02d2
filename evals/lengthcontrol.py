"""Length-controlled win rates: what a judge would say if both answers were equally long.

The model is that of Dubois et al. 2024 ("Length-Controlled AlpacaEval", arXiv 2404.04475): the judge prefers model m
to the baseline on instruction x with probability logistic(θ_m + φ_m tanh(Δ_mx / sd Δ_m) + ψ_m γ_x), where Δ is the
difference in length, γ_x the difficulty of the instruction, and the baseline's own θ and ψ are 0. Without the length
term, its mean over the instructions is the length-controlled rate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Ridges on θ, φ and a known difficulty's ψ; they move no rate by 0.1 points where the data speak. Where a judge goes by
# length without exception, θ is known only up to the gap between shorter and longer answers, and φ is what may grow:
# the rate is then 50, with an interval that says that nothing is known.
_RIDGES = (0.005, 1e-12, 1e-3)
_DOUBTFUL = 2.0  # Σ p (1 − p) below which residuals say nothing of the error: the fit is perfect
# Of difficulty in a joint fit, one is chosen by cross-validation: with graded preferences difficulty can be followed
# exactly, with plain verdicts of few models that would be following noise. A strong ridge leaves difficulty to the
# length term where the two go together (by 3.6 points on simulated verdicts of 12 models, 1.1 with the rule below), so
# the weakest is taken that predicts nearly as well as the best.
_PRIORS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.003)
_NEARLY = 1.15
_FOLDS = 5
_STEPS, _HALVINGS = 500, 30
_TOLERANCE, _ROUGHLY = 1e-12, 1e-5  # of the loss, relative


@dataclass(frozen=True)
class Controlled:
    """A length-controlled win rate of one model.

    `rate` and `stderr` are shares, not percent. The standard error is that of the delta method over instructions (from
    each one's influence on the estimate, so that the noise of θ, φ, ψ and of joint difficulties is in it); where the
    fit is perfect, and there are no residuals, that of the curvature, and at most 0.5. The coefficients are those of
    the model above; `difficulty` (ψ) is None where the fit is on length alone.
    """

    rate: float
    stderr: float
    quality: float
    length: float
    difficulty: float | None

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """The interval of `rate`, made on the logit scale so that it stays between 0 and 1."""
        spread = self.rate * (1 - self.rate)
        if not (spread > 0 and math.isfinite(self.stderr)):
            return math.nan, math.nan
        middle, half = math.log(self.rate / (1 - self.rate)), z * self.stderr / spread
        return float(logistic(middle - half)), float(logistic(middle + half))


def logistic(x: Array | float) -> Array:
    """1 / (1 + exp(−x)) without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(x, dtype=float))))


def length_terms(differences: Array) -> Array | None:
    """tanh of the length differences over their standard deviation (ddof 1, not centred); None if they do not vary."""
    spread = float(differences.std(ddof=1)) if differences.size > 1 else 0.0
    return np.tanh(differences / spread) if spread > 0 else None


def fit_alone(preferences: Array, lengths: Array, difficulties: Array | None = None) -> Controlled:
    """Fit one model, with known difficulties or on length alone.

    Args:
        preferences: from 0 (baseline) to 1 (model), NaN where there is no judgement; shape (n,).
        lengths: `length_terms` of the rows; shape (n,).
        difficulties: of the rows; shape (n,).
    """
    n = preferences.size
    ones = np.ones(n)
    extra = [] if difficulties is None else [difficulties]
    design = np.column_stack([ones, lengths, *extra])  # (n, 2 or 3)
    is_judged = np.isfinite(preferences)
    seen, wanted = design[is_judged], preferences[is_judged]
    ridge = np.diag(_RIDGES[: design.shape[1]])
    weights = np.zeros(design.shape[1])

    def loss(at: Array) -> float:
        logits = seen @ at
        fitted = wanted @ logits - np.logaddexp(0, logits).sum()
        return float(0.5 * at @ ridge @ at - fitted)

    for _ in range(_STEPS):
        p = logistic(seen @ weights)
        information = (seen * (p * (1 - p))[:, None]).T @ seen + ridge
        step = np.linalg.solve(information, seen.T @ (wanted - p) - ridge @ weights)
        if np.abs(step).max() < 1e-8 * (1 + np.abs(weights).max()):
            break
        weights = weights + _step_size(loss, weights, step) * step
    p = logistic(seen @ weights)
    information = (seen * (p * (1 - p))[:, None]).T @ seen + ridge
    equal = np.column_stack([ones, 0 * lengths, *extra])
    rates = logistic(equal @ weights)
    slope = equal.T @ (rates * (1 - rates)) / n
    direction = np.linalg.solve(information, slope)
    influence = (rates - rates.mean()) / n
    influence[is_judged] += (seen * (wanted - p)[:, None]) @ direction
    is_perfect = (p * (1 - p)).sum() < _DOUBTFUL
    stderr = min(0.5, math.sqrt(slope @ direction)) if is_perfect else _stderr(influence)
    psi = None if difficulties is None else float(weights[2])
    return Controlled(float(rates.mean()), stderr, float(weights[0]), float(weights[1]), psi)


def fit_jointly(
    preferences: Array, lengths: Array, is_row: NDArray[np.bool_]
) -> tuple[list[Controlled], Array]:
    """Fit several models together with the difficulty of every instruction, by penalised maximum likelihood.

    What the likelihood leaves open is fixed afterwards: difficulties have mean 0 and standard deviation 1, and the mean
    ψ is positive: γ is high where models do well, as in the reference. The rates do not depend on this.

    Args:
        preferences: from 0 to 1, NaN where there is no judgement; shape (instructions, models), two models at least.
        lengths: `length_terms` by model; shape (instructions, models).
        is_row: where a model has a row, judged or not: its rate is the mean over these; shape (instructions, models).

    Returns:
        A result a model, and the difficulties, shape (instructions,).
    """
    terms = np.where(is_row, lengths, 0.0)
    fit = _Joint(preferences, terms, _prior(preferences, terms))
    fit.maximise(_TOLERANCE)
    found = fit.results(is_row)
    shift, scale = float(fit.gamma.mean()), float(fit.gamma.std()) or 1.0
    scale *= 1.0 if fit.beta[:, 2].sum() >= 0 else -1.0
    found = [
        replace(one, quality=one.quality + (psi := one.difficulty or 0.0) * shift, difficulty=psi * scale)
        for one in found
    ]  # fmt: skip
    return found, (fit.gamma - shift) / scale


def _prior(preferences: Array, lengths: Array) -> float:
    """The weakest ridge on difficulty whose loss on left-out judgements is within 15 % of the smallest."""
    fold = np.random.default_rng(0).integers(0, _FOLDS, preferences.shape)
    chosen, smallest = _PRIORS[0], math.inf
    for prior in _PRIORS:
        loss = 0.0
        for number in range(_FOLDS):
            is_out = (fold == number) & np.isfinite(preferences)
            if is_out.any():
                fit = _Joint(np.where(is_out, np.nan, preferences), lengths, prior)
                fit.maximise(_ROUGHLY)
                logits = fit.logits(fit.beta, fit.gamma)[is_out]
                loss += float((np.logaddexp(0, logits) - preferences[is_out] * logits).sum())
        smallest = min(smallest, loss)
        if loss > _NEARLY * smallest:  # weaker ones follow more noise still, and take longer
            break
        chosen = prior
    return chosen


class _Joint:
    """β = (θ, φ, ψ) of each model, shape (models, 3), and γ of each instruction, shape (instructions,)."""

    def __init__(self, preferences: Array, lengths: Array, prior: float) -> None:
        self.prior = prior
        count, models = preferences.shape
        self.is_judged = np.isfinite(preferences)
        self.wanted = np.where(self.is_judged, preferences, 0.0)
        self.lengths = lengths
        # The two ridges balance where γ has standard deviation 1 and ψ is near 1.
        self.ridge = np.tile([*_RIDGES[:2], prior * count / models], (models, 1))
        judged = self.is_judged.sum(1)
        mean = self.wanted.sum(1) / np.maximum(judged, 1)
        overall = float(self.wanted.sum() / judged.sum())
        spread = float(mean.std()) or 1.0
        self.gamma: Array = np.where(judged > 0, (mean - overall) / spread, 0.0)
        self.beta: Array = np.tile([0.0, 0.0, 1.0], (models, 1))

    def logits(self, beta: Array, gamma: Array) -> Array:
        return np.asarray(beta[:, 0] + beta[:, 1] * self.lengths + np.outer(gamma, beta[:, 2]))

    def loss(self, at: Array) -> float:
        """The penalised negative log-likelihood of all parameters in one vector."""
        beta, gamma = at[: self.beta.size].reshape(self.beta.shape), at[self.beta.size :]
        logits = self.logits(beta, gamma)
        fitted = (self.wanted * logits - self.is_judged * np.logaddexp(0, logits)).sum()
        penalty = (self.ridge * beta**2).sum() + self.prior * (gamma**2).sum()
        return float(0.5 * penalty - fitted)

    def _parts(self, is_observed: bool) -> tuple[Array, Array, Array, Array]:
        """Residuals (n, m) and the information: of γ (n,), crosswise (n, 3m), and of β with γ eliminated (3m, 3m)."""
        count, models = self.wanted.shape
        p = logistic(self.logits(self.beta, self.gamma))
        residual = self.wanted - self.is_judged * p
        v = self.is_judged * p * (1 - p)
        psi = self.beta[:, 2]
        features = self._features()  # (n, m, 3)
        of_gamma = (v * psi**2).sum(1) + self.prior
        cross = features * (v * psi)[:, :, None]
        if is_observed:  # the model is bilinear: scoring leaves this term out, the curvature has it
            cross[:, :, 2] -= residual
        cross = cross.reshape(count, 3 * models)
        information = np.diag(self.ridge.ravel()) - cross.T @ (cross / of_gamma[:, None])
        for m in range(models):
            block = (features[:, m] * v[:, m, None]).T @ features[:, m]
            information[3 * m : 3 * m + 3, 3 * m : 3 * m + 3] += block
        return residual, of_gamma, cross, information

    def _features(self) -> Array:
        ones = np.ones_like(self.lengths)
        return np.stack([ones, self.lengths, np.outer(self.gamma, ones[0])], axis=2)

    def maximise(self, tolerance: float) -> None:
        """Fisher scoring with the difficulties eliminated from each step, until the loss stands still."""
        for _ in range(_STEPS):
            residual, of_gamma, cross, information = self._parts(is_observed=False)
            for_gamma = residual @ self.beta[:, 2] - self.prior * self.gamma
            for_beta = (self._features() * residual[:, :, None]).sum(0) - self.ridge * self.beta
            target = for_beta.ravel() - cross.T @ (for_gamma / of_gamma)
            step_beta = np.linalg.solve(information, target)
            step = np.concatenate([step_beta, (for_gamma - cross @ step_beta) / of_gamma])
            at = np.concatenate([self.beta.ravel(), self.gamma])
            size = _step_size(self.loss, at, step)
            before, at = at, at + size * step
            self.beta, self.gamma = (
                at[: self.beta.size].reshape(self.beta.shape),
                at[self.beta.size :],
            )
            if self.loss(before) - self.loss(at) <= tolerance * self.loss(at):
                return

    def results(self, is_row: NDArray[np.bool_]) -> list[Controlled]:
        """The rates and their errors, in this fit's own scale of difficulty."""
        residual, of_gamma, cross, information = self._parts(is_observed=True)
        scores = (self._features() * residual[:, :, None]).reshape(cross.shape)  # of the profile
        p = logistic(self.logits(self.beta, self.gamma))
        doubt = (self.is_judged * p * (1 - p)).sum(0)
        found = []
        for m, (theta, phi, psi) in enumerate(self.beta):
            at = is_row[:, m]
            rates = logistic(theta + psi * self.gamma)
            weight = at * rates * (1 - rates) / at.sum()
            slope = -(cross / of_gamma[:, None]).T @ (weight * psi)  # β moves γ as well
            slope[3 * m] += weight.sum()
            slope[3 * m + 2] += weight @ self.gamma
            rate = float(rates[at].mean())
            influence = at * (rates - rate) / at.sum()
            direction = np.linalg.solve(information, slope)
            influence = influence + scores @ direction
            is_perfect = doubt[m] < _DOUBTFUL
            curved = math.sqrt(max(0.0, slope @ direction))
            stderr = min(0.5, curved) if is_perfect else _stderr(influence)
            found.append(Controlled(rate, stderr, float(theta), float(phi), float(psi)))
        return found


def _step_size(loss: Callable[[Array], float], at: Array, step: NDArray[Any]) -> float:
    """The first of 1, ½, ¼… that does not make the loss larger; 0 if none."""
    before = loss(at)
    size = 1.0
    for _ in range(_HALVINGS):
        if loss(at + size * step) <= before:
            return size
        size /= 2
    return 0.0


def _stderr(influence: Array) -> float:
    """The standard error of a sum of independent influences."""
    n = int((influence != 0).sum())
    return math.sqrt(float((influence**2).sum()) * n / (n - 1)) if n > 1 else math.nan

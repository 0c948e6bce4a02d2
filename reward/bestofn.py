"""Best-of-n by a proxy reward: what it picks is worth, estimated without bias from N completions of each prompt."""

import math
from collections.abc import Sequence

from reward.looks import Look


def sizes(largest: int) -> list[int]:
    """1, 2, 4, … up to `largest`, and `largest` itself."""
    return [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]


def expected(proxy: Sequence[float], values: Sequence[float], n: int) -> float:
    """The mean of `values` of the completion that the proxy picks out of n, over all subsets of n of the N completions.

    With the completions in ascending order of the proxy, the i-th is the best of C(i − 1, n − 1) of the C(N, n) subsets
    (Nakano et al. 2021, "WebGPT", arXiv 2112.09332; Gao, Schulman and Hilton 2023, arXiv 2210.10760). Among equal
    proxies the pick is random, so that each of them stands for their mean.

    Args:
        proxy, values: of each completion of one prompt, finite; shape (N,).
        n: completions of which the best is picked, from 1 to N.
    """
    total = len(proxy)
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} cannot be estimated from {total} completions")
    order = sorted(range(total), key=lambda place: proxy[place])
    among = math.comb(total, n)
    result, start = 0.0, 0
    while start < total:
        end = start
        while end < total and proxy[order[end]] == proxy[order[start]]:
            end += 1
        # The ties hold places start + 1 … end: the subsets whose best is one of them.
        share = (math.comb(end, n) - math.comb(start, n)) / among
        result += share * math.fsum(values[place] for place in order[start:end]) / (end - start)
        start = end
    return result


def divergence(n: int) -> float:
    """KL of best-of-n from the policy that it picks from, in nats: log n − (n − 1) / n.

    Exact where no two completions are equal in rank; in general an upper bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def looks(
    prompts: Sequence[tuple[Sequence[float], Sequence[float]]], ns: Sequence[int]
) -> list[Look]:
    """A look for each n, over the same prompts.

    Args:
        prompts: proxy and gold of each completion, for each prompt; at least max(ns) completions each.
        ns: how many completions are picked from.
    """
    return [
        Look(
            step=n,
            kl=[divergence(n)] * len(prompts),
            proxy=[expected(proxy, proxy, n) for proxy, _ in prompts],
            gold=[expected(proxy, gold, n) for proxy, gold in prompts],
        )
        for n in ns
    ]

"""What comparing designs find out per request, on simulated judges of known noise.

    python benchmarks/pairs.py [--prompts 1000] [--seed 0]

A prompt has K completions of quality q ~ N(0, 1). A judge sees of each the quality plus noise: Gumbel of scale T, so
that it names the better of two with probability σ(Δq/T), as Bradley and Terry have it, and orders K as Plackett and Luce
do. What is shown first gains `bias` logits over what is shown last. A judge with `blind` δ cannot tell qualities that
differ by less: of a pair it names either, in a ranking it writes "=". All noise is drawn anew for every request.

For each design and budget: Kendall's τ-b and Spearman's ρ of the scores with q, means over prompts. Where all scores tie
both are 0. The designs and scores are the package's own (`dualign.annotate.designs`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import common
from dualign.annotate.designs import all_pairs, bradley_terry, default_rounds, next_round, win_shares

KS, TARGETS = (4, 8, 16), (0.6, 0.7, 0.8)
SHARED, RESPONSE = 300, 150  # tokens: rubric and context, and each response that a request shows


@dataclass(frozen=True)
class Judge:
    noise: float
    bias: float = 0.0
    blind: float = 0.0

    @property
    def name(self) -> str:
        more = [f"{key} {value:g}" for key, value in (("bias", self.bias), ("blind", self.blind)) if value]
        return ", ".join([f"T {self.noise:g}", *more])

    def first_wins(self, gap: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Whether the judge names the one shown first, of quality `gap` above the other."""
        gap = np.where(np.abs(gap) < self.blind, 0, gap)
        return (rng.random(gap.shape) < 1 / (1 + np.exp(-gap / self.noise - self.bias))).astype(float)

    def both_orders(self, gap: np.ndarray, rng: np.random.Generator, samples: int = 1) -> np.ndarray:
        """1 won, 0 lost, 1/2 the orders disagree; each order by the majority of an odd number of samples."""
        shape = (samples, *gap.shape)
        gaps = np.broadcast_to(gap, shape)
        ab = self.first_wins(gaps, rng).mean(0) > 0.5
        ba = self.first_wins(-gaps, rng).mean(0) <= 0.5
        return (ab.astype(float) + ba) / 2

    def ranks(self, q: np.ndarray, order: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
        """(P, K) -> (P, K): a score for each completion by its place in one ranking; equals share one."""
        k = q.shape[1]
        seen = q + noise * self.noise * rng.gumbel(size=q.shape)
        seen = seen + noise * self.noise * self.bias * (1 - order.argsort(1) / (k - 1))
        best = np.argsort(-seen, 1)
        sorted_q = np.take_along_axis(q, best, 1)
        step = np.abs(np.diff(sorted_q, axis=1)) >= self.blind  # neighbours in the order that cannot be told apart tie
        tier = np.concatenate([np.zeros((len(q), 1)), np.cumsum(step, 1)], 1)
        return -np.take_along_axis(tier, best.argsort(1), 1)


JUDGES = [
    Judge(0.25), Judge(0.5), Judge(1.0), Judge(0.5, bias=1.0), Judge(0.5, bias=2.0), Judge(0.5, blind=0.5),
]  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A design at a budget. `requests`, `tokens`: per prompt. The intervals are half widths of 95 %."""

    design: str
    budget: str
    requests: float
    tokens: float
    tau: float
    tau_ci: float
    rho: float


def correlations(q: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kendall's τ-b and Spearman's ρ of each prompt."""
    dq, ds = (np.sign(np.round(x[:, :, None] - x[:, None, :], 8)) for x in (q, score))
    k = q.shape[1]
    untied = np.maximum((ds != 0).sum((1, 2)), 1)
    tau = (dq * ds).sum((1, 2)) / np.sqrt(k * (k - 1) * untied)
    rq, rs = dq.sum(2), ds.sum(2)  # ranks, but for a factor and a shift; equals share their mean
    return tau, (rq * rs).sum(1) / np.maximum(np.sqrt((rq**2).sum(1) * (rs**2).sum(1)), 1e-12)


def point(design: str, budget: str, q: np.ndarray, score: np.ndarray, requests: float, shown: int) -> Point:
    tau, rho = correlations(q, np.nan_to_num(score))
    ci = 1.96 * tau.std(ddof=1) / np.sqrt(len(tau))
    tokens = requests * (SHARED + RESPONSE * shown)
    return Point(design, budget, round(requests, 2), round(tokens), float(tau.mean()), float(ci), float(rho.mean()))


def neighbours(q: np.ndarray, judge: Judge, rng: np.random.Generator) -> Iterator[Point]:
    for samples in (1, 3, 5):
        value = judge.both_orders(q[:, ::2] - q[:, 1::2], rng, samples)
        score = np.stack([value, 1 - value], 2).reshape(q.shape)
        yield point("neighbours", f"{samples} samples", q, score, q.shape[1] * samples, 2)


def every_pair(q: np.ndarray, judge: Judge, rng: np.random.Generator) -> Iterator[Point]:
    i, j = np.array(all_pairs(q.shape[1])).T
    for samples in (1, 3):
        wins = np.zeros((*q.shape, q.shape[1]))
        wins[:, i, j] = judge.both_orders(q[:, i] - q[:, j], rng, samples)
        wins[:, j, i] = 1 - wins[:, i, j]
        yield point(
            "all", f"{samples} samples", q, win_shares(wins), 2 * len(i) * samples, 2
        )  # strengths: the same order


Verdict = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def tournament(
    q: np.ndarray, verdict: Verdict, orders: int, name: str, rng: np.random.Generator, random: bool = False
) -> Iterator[Point]:
    """After every round. `random`: who meets is drawn, whatever was said before."""
    n, k = q.shape
    wins, met, asked = np.zeros((n, k, k)), np.zeros((n, k, k), bool), 0
    for round_ in range(1, k):
        strength = np.zeros((n, k)) if random else np.nan_to_num(bradley_terry(wins))
        pairs = [(p, i, j) for p in range(n) for i, j in next_round(met[p], strength[p], rng)]
        p, i, j = np.array(pairs).T
        value = verdict(q[p, i] - q[p, j], rng)
        wins[p, i, j], wins[p, j, i] = value, 1 - value
        met[p, i, j] = met[p, j, i] = True
        asked += orders * len(pairs)
        yield point(name, f"{round_} rounds", q, bradley_terry(wins), asked / n, 2)
        if name == "tournament":
            yield point("tournament, by wins", f"{round_} rounds", q, win_shares(wins), asked / n, 2)


def ranking(q: np.ndarray, judge: Judge, rng: np.random.Generator, noise: float, name: str) -> Iterator[Point]:
    total, order = np.zeros_like(q), np.zeros(q.shape, int)
    for sample in range(16):
        order = order[:, ::-1] if sample % 2 else rng.permuted(np.tile(np.arange(q.shape[1]), (len(q), 1)), axis=1)
        rank = judge.ranks(q, order, rng, noise)
        total = total + np.sign(rank[:, :, None] - rank[:, None, :]).sum(2)  # share of wins, but for factor and shift
        if sample + 1 in (1, 2, 4, 8, 16):
            yield point(name, f"{sample + 1} orders", q, total, sample + 1, q.shape[1])


def ratings(q: np.ndarray, judge: Judge, rng: np.random.Generator) -> Iterator[Point]:
    """A judge's 1-10 scores, two to a standard deviation of quality, of the same noise; no bias of position."""
    total = np.zeros_like(q)
    for sample in range(1, 17):
        total = total + np.clip(
            np.round(5.5 + 2 * (q + judge.noise * (rng.gumbel(size=q.shape) - np.euler_gamma))), 1, 10
        )
        if sample in (1, 2, 4, 8, 16):
            yield point("1-10 scores", f"{sample} samples", q, total, q.shape[1] * sample, 1)


def points(k: int, judge: Judge, prompts: int, seed: int) -> list[Point]:
    rng = np.random.default_rng([seed, k, JUDGES.index(judge)])
    q = rng.standard_normal((prompts, k))
    found = [*neighbours(q, judge, rng), *every_pair(q, judge, rng)]
    found += tournament(q, judge.both_orders, 2, "tournament", rng)
    if judge.noise == 0.5 and not judge.blind:  # what else a tournament might be
        found += tournament(q, judge.both_orders, 2, "random rounds", rng, random=True)
        found += tournament(q, one_order(judge), 1, "one order", rng)
    found += [*ranking(q, judge, rng, 1, "ranking"), *ranking(q, judge, rng, 2, "ranking, noise × 2")]
    return [*found, *ratings(q, judge, rng)]


def one_order(judge: Judge) -> Verdict:
    def verdict(gap: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which is shown first is drawn."""
        flip = rng.random(gap.shape) < 0.5
        named = judge.first_wins(np.where(flip, -gap, gap), rng)
        return np.where(flip, 1 - named, named)

    return verdict


def needed(curve: list[Point], target: float) -> str:
    """Requests per prompt at which the mean τ-b is `target`, linear between budgets; (from-to) by the intervals; the
    tokens."""
    curve = sorted(curve, key=lambda p: p.requests)

    def at(shift: float, of: Callable[[Point], float]) -> float | None:
        before = None
        for p in curve:
            tau = p.tau + shift * p.tau_ci
            if tau >= target:
                if before is None:
                    return of(p)
                last = before.tau + shift * before.tau_ci
                return of(before) + (of(p) - of(before)) * max(0.0, target - last) / (tau - last)
            before = p
        return None

    requests = [at(shift, lambda p: p.requests) for shift in (0, 1, -1)]
    tokens = at(0, lambda p: p.tokens)
    if requests[0] is None or tokens is None:
        return "-"
    least = "≤ " if requests[0] == curve[0].requests else ""
    low, high = (f"{r:.1f}" if r is not None else "?" for r in requests[1:])
    return f"{least}{requests[0]:.1f} ({low}-{high}), {tokens / 1000:.1f}k"


def needed_by_design(curve: list[Point]) -> dict[str, list[str]]:
    designs = dict.fromkeys(p.design for p in curve)
    return {design: [needed([p for p in curve if p.design == design], t) for t in TARGETS] for design in designs}


def page(found: dict[tuple[int, str], list[Point]], prompts: int) -> str:
    parts = [
        f"{prompts} prompts each. Requests and tokens are per prompt; a request has {SHARED} tokens of rubric and context "
        f"and {RESPONSE} for each response that it shows (assumed). T: noise against a spread of quality of 1; bias: "
        "logits for what stands first over what stands last; blind: differences in quality that the judge cannot see.",
        "## Requests for the same rank correlation",
        "Requests per prompt (by the 95 % interval of τ-b) and thousands of tokens at which the mean τ-b reaches the "
        "target, linear between budgets. ≤: the smallest budget has it. -: the largest has not.",
    ]
    for (k, judge), curve in found.items():
        rows = [[design, *cells] for design, cells in needed_by_design(curve).items()]
        parts += [f"### K = {k}, {judge}", common.table(["design", *(f"τ-b {t}" for t in TARGETS)], rows)]
    parts += [
        "## Each design at its defaults",
        "τ-b ± half its 95 % interval, ρ. A tournament has ⌈log2 K⌉ rounds and is scored by strengths, or by wins.",
    ]
    names = [judge.name for judge in JUDGES]
    for k in KS:
        rows = [
            [design, budget, f"{first.requests:.1f}", f"{first.tokens / 1000:.1f}k", *(cell(p) for p in across)]
            for design, budget in defaults(k)
            for across in [[p for name in names for p in found[k, name] if (p.design, p.budget) == (design, budget)]]
            for first in across[:1]
        ]
        parts += [f"### K = {k}", common.table(["design", "budget", "requests", "tokens", *names], rows)]
    return "\n\n".join(parts)


def cell(p: Point) -> str:
    return f"{p.tau:.2f} ± {p.tau_ci:.2f}, {p.rho:.2f}"


def defaults(k: int) -> list[tuple[str, str]]:
    rounds = f"{default_rounds(k)} rounds"
    return [
        ("neighbours", "1 samples"), ("all", "1 samples"), ("tournament", rounds), ("tournament, by wins", rounds),
        ("ranking", "1 orders"), ("ranking", "2 orders"), ("ranking, noise × 2", "1 orders"),
        ("ranking, noise × 2", "2 orders"), ("1-10 scores", "1 samples"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    machine, start = common.machine(), time.perf_counter()
    found = {}
    for k in KS:
        for judge in JUDGES:
            found[k, judge.name] = points(k, judge, options.prompts, options.seed)
            print(f"K = {k}, {judge.name}: {time.perf_counter() - start:.0f} s", flush=True)
    reached = [{"k": k, "judge": name} | needed_by_design(curve) for (k, name), curve in found.items()]
    record: dict[str, Any] = {
        "machine": machine,
        "options": vars(options),
        "tau_b": TARGETS,
        "requests_needed": reached,
    }
    print(common.save("pairs", record, page(found, options.prompts)))


if __name__ == "__main__":
    main()

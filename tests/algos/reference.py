"""Every system once more, in numpy and in loops, with gradients derived by hand: what the torch code is held against.

Nothing here is shared with `dualign.algos`. A "case" and its expectations have the layout that `golden.py` reads.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

Case = dict[str, Any]
Expected = dict[str, Any]


def make_case(seed: int = 0) -> Case:
    """Groups of 4, 3, 1 and 4 rows (labels were absent), 1 to 7 tokens, one tied group, some rows cut off."""
    rng = np.random.default_rng(seed)
    group = [0] * 4 + [1] * 3 + [2] + [3] * 4
    reward = [1.0, 2.5, 6.0, 9.0, 3.0, 4.0, 4.0, 7.0, 0.3, 0.3, 0.3, 0.3]
    length = rng.integers(1, 8, len(group))
    mask = (np.arange(7) < length[:, None]).astype(float)

    def around(center: np.ndarray | float, spread: float) -> np.ndarray:
        return (center + spread * rng.normal(size=mask.shape)) * mask

    old = -np.abs(around(0.0, 1.2))
    theta, ref = np.minimum(around(old, 0.25), -1e-3) * mask, np.minimum(around(old, 0.3), -1e-3) * mask
    value_old = around(0.0, 1.0)
    value = around(value_old, 0.3)
    return {
        "group": group,
        "reward": reward,
        "mask": mask.tolist(),
        "logp_theta": theta.tolist(),
        "logp_old": old.tolist(),
        "logp_ref": ref.tolist(),
        "value_old": value_old.tolist(),
        "value": value.tolist(),
        "logp_behaviour": (np.minimum(around(old, 0.25), -1e-3) * mask).tolist(),
        "missing_eos": [bool(n == 7) for n in length],
    }


class Reference:
    """One case as arrays; one method per system, each returning what it expects."""

    def __init__(self, case: Case) -> None:
        self.mask, self.r, self.group = (np.array(case[k]) for k in ("mask", "reward", "group"))
        self.theta, self.old, self.ref = (np.array(case[f"logp_{k}"]) for k in ("theta", "old", "ref"))
        self.value, self.value_old = np.array(case["value"]), np.array(case["value_old"])
        self.cut = np.array(case["missing_eos"])
        self.N, self.T = self.mask.shape
        self.length = self.mask.sum(1).astype(int)
        self.members = [np.flatnonzero(self.group == g) for g in dict.fromkeys(case["group"])]
        self.S, self.S_old, self.S_ref = self.theta.sum(1), self.old.sum(1), self.ref.sum(1)
        self.S_mu = np.array(case["logp_behaviour"]).sum(1)

    def of_sequences(self, loss: float, per_row: np.ndarray) -> Expected:
        """From dL/d log π_θ(y_i|x): the same for each of a row's tokens."""
        return {"loss": float(loss), "grad_logp_theta": (per_row[:, None] * self.mask).tolist()}

    def centred(self) -> np.ndarray:
        A = np.zeros(self.N)
        for rows in self.members:
            A[rows] = self.r[rows] - self.r[rows].mean()
            if np.ptp(self.r[rows]) == 0:
                A[rows] = 0
        return A

    def normalised(self, A: np.ndarray) -> np.ndarray:
        return (A - A.mean()) / (A.std(ddof=1) + 1e-8)

    def regression(self, weight: np.ndarray) -> Expected:
        loss = -sum(w * s for w, s in zip(weight, self.S, strict=True)) / self.N
        return self.of_sequences(loss, -weight / self.N) | {"weight": weight.tolist()}

    def dar(self, alpha: float = 0.1, beta: float = 0.05, baseline: str = "group") -> Expected:
        A = self.normalised(self.centred() if baseline == "group" else self.r - self.r.mean())
        log_w = [alpha * (self.S_ref[i] - self.S_old[i]) + A[i] / beta for i in range(self.N)]
        weight = np.array([math.exp(lw) if lw < math.log(20) else 20.0 for lw in log_w])
        return self.regression(weight) | {"advantage": A.tolist()}

    def dar_stale(self, alpha: float = 0.1, beta: float = 0.05) -> Expected:
        """w = π_0^α π_t^(1-α) exp(A/β) / μ."""
        A = self.normalised(self.centred())
        log_w = alpha * self.S_ref + (1 - alpha) * self.S_old - self.S_mu + A / beta
        return self.regression(np.exp(np.minimum(log_w, math.log(20)))) | {"advantage": A.tolist()}

    def dar_trust(self, epsilon: float = 0.5) -> Expected:
        """β by halving an interval of log β."""
        A = self.normalised(self.centred())

        def divergence(beta: float) -> float:
            q = [math.exp((a - A.max()) / beta) for a in A]
            q = [p / sum(q) for p in q]
            return sum(p * math.log(p * self.N) for p in q if p > 0)

        low, high = math.log(1e-2), math.log(1e2)
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if divergence(math.exp(middle)) > epsilon else (low, middle)
        return self.dar(beta=math.exp(low)) | {"beta_found": math.exp(low)}

    def rwr(self) -> Expected:
        return self.regression(np.exp(self.r))

    def awr(self) -> Expected:
        return self.regression(np.minimum(np.exp(self.centred()), 20.0))

    def dao(self, ppo: bool, alpha: float = 0.1, beta: float = 0.05) -> Expected:
        A = self.normalised(self.centred())
        gain = A - beta * (self.S - alpha * self.S_ref - (1 - alpha) * self.S_old)
        if not ppo:
            return self.of_sequences(-(gain * self.S).mean(), -gain / self.N)
        rho = np.exp(self.S - self.S_old)
        return self.of_sequences(-(rho * gain).mean(), -rho * (gain - beta) / self.N)

    def rloo(self, beta: float = 0.03) -> Expected:
        R = self.r - beta * (self.S_old - self.S_ref)
        A = np.zeros(self.N)
        for rows in self.members:
            for i in rows:
                others = [R[j] for j in rows if j != i]
                A[i] = R[i] - np.mean(others) if others else 0.0
        return self.of_sequences(-(A * self.S).mean(), -A / self.N) | {"advantage": A.tolist()}

    def over_group_std(self) -> np.ndarray:
        A = self.centred()
        for rows in self.members:
            A[rows] /= (self.r[rows].std(ddof=1) if len(rows) > 1 and np.ptp(self.r[rows]) > 0 else 0.0) + 1e-4
        return A

    def grpo(
        self,
        beta: float = 0.04,
        clip: tuple[float, float] = (0.2, 0.2),
        A: np.ndarray | None = None,
        each: list[float] | None = None,
    ) -> Expected:
        """`each`: what a token of each row counts for; a completion's mean over N by default."""
        A = self.over_group_std() if A is None else A
        each = [1 / (self.N * n) for n in self.length] if each is None else each
        loss, grad = 0.0, np.zeros((self.N, self.T))
        for i in range(self.N):
            for k in range(self.length[i]):
                rho = math.exp(self.theta[i, k] - self.old[i, k])
                d = self.ref[i, k] - self.theta[i, k]
                bounded = min(max(rho, 1 - clip[0]), 1 + clip[1])
                active = rho * A[i] <= bounded * A[i]
                loss += each[i] * (-min(rho * A[i], bounded * A[i]) + beta * (math.exp(d) - d - 1))
                grad[i, k] = each[i] * (-rho * A[i] * active + beta * (1 - math.exp(d)))
        return {"loss": loss, "grad_logp_theta": grad.tolist(), "advantage": A.tolist()}

    def gspo(self) -> Expected:
        A, loss, grad = self.over_group_std(), 0.0, np.zeros((self.N, self.T))
        for i in range(self.N):
            rho = math.exp((self.S[i] - self.S_old[i]) / self.length[i])
            bounded = min(max(rho, 1 - 3e-4), 1 + 4e-4)
            loss -= min(rho * A[i], bounded * A[i]) / self.N
            if rho * A[i] <= bounded * A[i]:  # d rho / d log π_k = rho / length
                grad[i, : self.length[i]] = -rho * A[i] / self.length[i] / self.N
        return {"loss": loss, "grad_logp_theta": grad.tolist(), "advantage": A.tolist()}

    def cispo(self, most: float = 5.0) -> Expected:
        A, n = self.over_group_std(), self.length.sum()
        push = -np.minimum(np.exp(self.theta - self.old), most) * A[:, None] * self.mask / n
        return {"loss": (push * self.theta).sum(), "grad_logp_theta": push.tolist(), "advantage": A.tolist()}

    def gvpo(self, beta: float = 0.1) -> Expected:
        loss, per_row, rho = 0.0, np.zeros(self.N), self.S - self.S_old
        for rows in self.members:
            gap = beta * (rho[rows] - rho[rows].mean()) - (self.r[rows] - self.r[rows].mean())
            free = max(len(rows) - 1, 1)
            loss += (gap**2).sum() / 2 / free / len(self.members)
            per_row[rows] = beta * (gap - gap.mean()) / free / len(self.members)
        return self.of_sequences(loss, per_row) | {"advantage": self.centred().tolist()}

    def oapl(self, beta1: float = 1.0, beta2: float = 1e-3) -> Expected:
        A, rho = np.zeros(self.N), self.S - self.S_old
        for rows in self.members:
            A[rows] = self.r[rows] - beta1 * math.log(np.mean([math.exp(r / beta1) for r in self.r[rows]]))
        gap = beta2 * rho - A
        return self.of_sequences((gap**2).mean(), 2 * beta2 * gap / self.N) | {"advantage": A.tolist()}

    def pmd(self, tau: float = 0.05) -> Expected:
        A, rho = self.centred(), self.S - self.S_old
        loss = -(A * self.S - 0.5 * tau * rho**2).mean()
        return self.of_sequences(loss, (tau * rho - A) / self.N) | {"advantage": A.tolist()}

    def ppo(self, penalty: np.ndarray, beta: float, clip: float | None) -> Expected:
        """`penalty`: per token, what β multiplies."""
        A, returns = np.zeros((self.N, self.T)), np.zeros((self.N, self.T))
        for i in range(self.N):
            L = self.length[i]
            reward = -beta * penalty[i, :L]
            reward[L - 1] += self.r[i] - (1.0 if self.cut[i] else 0.0)
            V = np.append(self.value_old[i, :L], 0.0)
            delta = reward + V[1:] - V[:-1]
            for k in range(L):
                A[i, k] = sum(0.95 ** (m - k) * delta[m] for m in range(k, L))
                returns[i, k] = A[i, k] + V[k]
        on = self.mask > 0
        n = on.sum()
        white = np.zeros_like(A)
        white[on] = (A[on] - A[on].mean()) / np.sqrt(A[on].var(ddof=1) + 1e-8)
        policy, value, grad, grad_value = 0.0, 0.0, np.zeros_like(A), np.zeros_like(A)
        for i, k in zip(*np.nonzero(on), strict=True):
            rho, a = math.exp(self.theta[i, k] - self.old[i, k]), white[i, k]
            bounded = rho if clip is None else min(max(rho, 1 - clip), 1 + clip)
            policy -= min(rho * a, bounded * a)
            grad[i, k] = -rho * a if rho * a <= bounded * a else 0.0
            v, v_old, R = self.value[i, k], self.value_old[i, k], returns[i, k]
            near = v_old + min(max(v - v_old, -0.2), 0.2)
            value += 0.5 * max((v - R) ** 2, (near - R) ** 2)
            grad_value[i, k] = 10 * (v - R) if (v - R) ** 2 >= (near - R) ** 2 else 0.0
        return {
            "loss": (policy + 10 * value) / n,
            "value_loss": value / n,
            "grad_logp_theta": (grad / n).tolist(),
            "grad_value": (grad_value / n).tolist(),
            "advantage": white.tolist(),
            "returns": returns.tolist(),
        }

    def dual(self, alpha: float, beta: float, clip: float | None = None, forward: bool = False) -> Expected:
        to_old = self.theta - self.old
        if forward:
            to_old = np.exp(self.old - self.theta) * (self.old - self.theta)
        return self.ppo(alpha * (self.theta - self.ref) + (1 - alpha) * to_old, beta, clip)

    def iter_sft(self) -> Expected:
        best = [int(rows[np.argmax(self.r[rows])]) for rows in self.members]
        per_row = np.zeros(self.N)
        per_row[best] = -1 / self.length[best].sum()
        return self.of_sequences(-self.S[best].sum() / self.length[best].sum(), per_row) | {"best": best}

    def sft(self) -> Expected:
        return self.of_sequences(-self.S.sum() / self.length.sum(), np.full(self.N, -1 / self.length.sum()))

    def pairs(self, kind: str, beta: float) -> Expected:
        pairs = [
            (int(rows[np.argmax(self.r[rows])]), int(rows[np.argmin(self.r[rows])]))
            for rows in self.members
            if np.ptp(self.r[rows]) > 0
        ]
        held = self.S_ref if kind != "dual_dpo" else 0.1 * self.S_ref + 0.9 * self.S_old
        score = self.S / self.length if kind == "simpo" else self.S - held
        scale = 1 / self.length if kind == "simpo" else np.ones(self.N)
        loss, per_row = 0.0, np.zeros(self.N)
        for w, l in pairs:  # noqa: E741  (the papers' y_w, y_l)
            h = score[w] - score[l]
            if kind in ("dpo", "dual_dpo", "simpo"):
                x = beta * h - (1.6 if kind == "simpo" else 0.0)
                term, slope = math.log1p(math.exp(-x)), -beta / (1 + math.exp(x))
            elif kind == "ipo":
                term, slope = (h - 0.5 / beta) ** 2, 2 * (h - 0.5 / beta)
            else:
                term, slope = max(0.0, 1 - beta * h), -beta if beta * h < 1 else 0.0
            loss += term / len(pairs)
            per_row[w] += slope * scale[w] / len(pairs)
            per_row[l] -= slope * scale[l] / len(pairs)
        chosen, rejected = zip(*pairs, strict=True)
        return self.of_sequences(loss, per_row) | {"chosen": list(chosen), "rejected": list(rejected)}


def expectations(case: Case) -> dict[str, Expected]:
    ref = Reference(case)
    return {
        "dar": ref.dar(),
        "dar_rlhf": ref.dar(0.5, 0.5),
        "dar_alpha0": ref.dar(0.0),
        "dar_batch_baseline": ref.dar(baseline="batch"),
        "dar_stale": ref.dar_stale(),
        "dar_trust": ref.dar_trust(),
        "dao_reinforce": ref.dao(ppo=False),
        "dao_ppo": ref.dao(ppo=True),
        "ppo": ref.ppo(ref.old - ref.ref, 0.03, 0.2),
        "dual_ppo": ref.dual(0.3, 0.02),
        "dual_ppo_clip": ref.dual(0.9, 0.01, clip=0.2),
        "dual_mix_ppo": ref.dual(0.3, 0.02, forward=True),
        "rloo": ref.rloo(),
        "grpo": ref.grpo(),
        "grpo_batch": ref.grpo(A=ref.normalised(ref.centred())),
        "dapo": ref.grpo(0.0, (0.2, 0.28), each=[1 / ref.length.sum()] * ref.N),
        "dr_grpo": ref.grpo(0.0, A=ref.centred(), each=[1 / (ref.N * 3000)] * ref.N),
        "gspo": ref.gspo(),
        "cispo": ref.cispo(),
        "gvpo": ref.gvpo(),
        "oapl": ref.oapl(),
        "pmd": ref.pmd(),
        "iter_sft": ref.iter_sft(),
        "dpo": ref.pairs("dpo", 0.1),
        "ipo": ref.pairs("ipo", 1.0),
        "slic": ref.pairs("slic", 0.002),
        "offline_dpo": ref.pairs("dpo", 0.1),
        "dual_dpo": ref.pairs("dual_dpo", 0.1),
        "offline_dual_dpo": ref.pairs("dual_dpo", 0.1),
        "simpo": ref.pairs("simpo", 2.0),
        "sft": ref.sft(),
        "rwr": ref.rwr(),
        "awr": ref.awr(),
    }


if __name__ == "__main__":  # python tests/algos/reference.py > tests/golden.json
    made = make_case(1)
    print(json.dumps({"case": made, "expect": expectations(made)}))

"""What a run's summary says of the held-out reward, by hand."""

import numpy as np
import pytest

from dualign.batch import Row
from dualign.heldout import gains
from dualign.types import Label, Prompt, Rollout
from dualign.view import verdict


def rows(values, finishes, parts=None):
    return [
        Row(
            Rollout(i, i // 2, Prompt(str(i // 2), "?"), (1,), (2,), "a", finish, (0.0,)),
            Label(value, parts=parts[i] if parts else {}),
        )
        for i, (value, finish) in enumerate(zip(values, finishes, strict=True))
    ]


BEFORE = rows([1.0, 2.0, 0.0, 3.0], ["length", "eos", "eos", "length"])
AFTER = rows([2.0, 2.0, 4.0, None], ["eos", "eos", "length", "eos"])


def test_one_reward():
    found = gains(BEFORE, AFTER, 0.0)
    assert set(found) == {"gain", "gain_ci", "sd", "gain_sd", "gain_sd_ci"}
    sd = np.std([1, 2, 0, 3], ddof=1)
    assert found["gain"] == pytest.approx((0.5 + 2.5) / 2) and found["gain_sd"] == pytest.approx(1.5 / sd)


def test_as_trained_a_cut_off_answer_is_worth_less():
    found = gains(BEFORE, AFTER, 2.0)
    assert found["gain"] == pytest.approx(1.5), "the reward itself is as it was"
    assert found["trained"]["before"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["trained"]["after"] == pytest.approx((2.0 + 2.0) / 2)
    assert found["trained"]["gain_sd"] == pytest.approx(1.5 / np.std([-1, 2, 0, 1], ddof=1))


def test_each_of_several_rewards():
    parts = [{"a": 1.0, "b": None}, {"a": 2.0}, {"a": 3.0, "b": 1.0}, {"a": 4.0, "b": 2.0}]
    later = [{"a": v["a"] + 1, "b": 5.0} for v in parts]
    values, ends = [0.0] * 4, ["eos"] * 4
    found = gains(rows(values, ends, parts), rows(values, ends, later), 1.0)["rewards"]
    assert set(found) == {"a", "b"}
    assert found["a"]["gain"] == pytest.approx(1.0) and found["a"]["gain_sd"] == pytest.approx(
        1 / np.std([1, 2, 3, 4], ddof=1)
    )
    assert found["b"]["before"] == pytest.approx(1.5) and found["b"]["gain"] == pytest.approx(3.5), "prompt 0 has no b"


def test_the_verdict_names_them():
    record = {"reward": 0.0, "kl": 1.0, "kl_ci": 0.1, "length": 3.0, "missing_eos": 0.5, "prompts": 2}
    said = "\n".join(verdict({"before": record, "after": record, "penalty": 2.0} | gains(BEFORE, AFTER, 2.0)))
    assert "as trained, an answer that is cut off worth 2 less: +0.500 -> +2.000" in said

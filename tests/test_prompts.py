"""The quickstart's prompts: their number, their mix, and a test split that no training prompt gives away."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from itertools import combinations
from typing import Any

import pytest

ENDING = " Answer in one sentence."  # of every prompt, so that an answer can be whole within the quickstart's 40 tokens
SPLITS = {"train": 240, "test": 80}  # at least so many rows


def rows(split: str) -> list[dict[str, Any]]:
    text = (files("dualign.data") / "prompts" / f"quickstart_{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def text(row: dict[str, Any]) -> str:
    """What is asked, without the ending that all prompts share."""
    content = row["prompt"][-1]["content"]
    assert content.endswith(ENDING), row["id"]
    return content.removesuffix(ENDING)


def words(prompt: str) -> list[str]:
    """Lower-case words without punctuation: what is left when casing and typing habits are taken away."""
    return re.findall(r"\w+", prompt.lower().replace("'", ""))


def overlap(a: str, b: str) -> float:
    """Jaccard similarity of two prompts' sets of words, from 0 to 1."""
    one, other = set(words(a)), set(words(b))
    return len(one & other) / len(one | other)


def test_overlap_ignores_case_and_punctuation() -> None:
    assert overlap("Don't boil the egg!", "dont boil the egg") == 1
    assert overlap("boil the egg", "fry the egg") == 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_single_user_turns_in_order(split: str) -> None:
    data = rows(split)
    assert len(data) >= SPLITS[split]
    assert [row["id"] for row in data] == [f"qs-{split}-{i:03d}" for i in range(1, len(data) + 1)]
    for row in data:
        assert set(row) == {"id", "prompt", "kind"}
        assert [set(message) for message in row["prompt"]] == [{"role", "content"}], row["id"]
        assert row["prompt"][-1]["role"] == "user", row["id"]
        assert text(row) == " ".join(text(row).split()), row["id"]


@pytest.mark.parametrize("split", SPLITS)
def test_lengths_are_varied_and_between_6_and_40_words(split: str) -> None:
    lengths = sorted(len(text(row).split()) for row in rows(split))
    assert lengths[0] >= 6 and lengths[-1] <= 40
    assert lengths[0] <= 8 and lengths[-1] >= 28


def test_both_splits_are_six_tenths_everyday() -> None:
    shares = []
    for split in SPLITS:
        kinds = [row["kind"] for row in rows(split)]
        assert set(kinds) == {"everyday", "decline"}
        shares.append(kinds.count("everyday") / len(kinds))
    assert shares == pytest.approx([0.6, 0.6], abs=0.03)


def test_kinds_are_mixed_throughout() -> None:
    """A run that takes only the first rows still meets both kinds."""
    for split in SPLITS:
        kinds = [row["kind"] for row in rows(split)]
        for start in range(0, len(kinds) - 15, 16):
            assert set(kinds[start : start + 16]) == {"everyday", "decline"}, (split, start)


def test_no_two_prompts_are_alike_within_or_across_splits() -> None:
    prompts = [text(row) for split in SPLITS for row in rows(split)]
    assert len({" ".join(words(prompt)) for prompt in prompts}) == len(prompts)
    assert [(a, b) for a, b in combinations(prompts, 2) if overlap(a, b) > 0.7] == []

"""Losses over a few online batches of the tiny model in fp32, as the first version of the loop gave them (commit
d9bacb3, torch 2.13.0), before flat micro-batches, shared prompts, recomputed logits and everything else that made it
fast. None of that may change them. They rest on torch's random initialisation of the tiny model, too.

`python tests/test_loss_curve.py` prints what they are now."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

import dualign
from conftest import save_tiny
from runs_common import metrics, tree, vowels, write_prompts

STORED = json.loads(Path(__file__).parent.joinpath("support", "loss_curve.json").read_text())


def curve(system: str, model: Path, folder: Path) -> list[dict[str, float]]:
    config = tree(model, write_prompts(folder), folder / "run", {"name": system}, online_batches=4)
    records = metrics(dualign.train(config, reward=vowels, quiet=True).folder)
    return [{key: record[key] for key in STORED[system][0]} for record in records]


@pytest.mark.parametrize("system", STORED)
def test_losses_are_those_of_the_first_loop(system, tiny, tmp_path):
    for batch, (now, stored) in enumerate(zip(curve(system, tiny, tmp_path), STORED[system], strict=True)):
        assert now == pytest.approx(stored, rel=1e-4, abs=1e-6), f"online batch {batch}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        model = save_tiny(Path(place, "model"), "llama")
        folders = {system: Path(place, system) for system in STORED}
        for folder in folders.values():
            folder.mkdir()
        json.dump({system: curve(system, model, folder) for system, folder in folders.items()}, sys.stdout, indent=1)

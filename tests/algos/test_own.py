"""A system of the user's own that is wrong: the message names its method, its line and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import dualign
from dualign.algos import Batch
from dualign.common.errors import UserError
from dualign.common.named import run_own
from dualign.config import system_of

WRONG = {
    'prepare: return {"w": torch.ones(3)}, {}': "prepare returned the column 'w' of shape (3,); expected a tensor with a value",
    'prepare: return {"w": [1.0] * 4}, {}': "the column 'w' a list; expected a tensor",
    'prepare: return {"w": batch.reward_N}': "prepare returned a dict; expected (columns, numbers to log)",
    "prepare: return None, {}": "prepare returned a NoneType for its columns",
    "prepare: return {}, None": "prepare returned a NoneType for its numbers to log; expected {name: float}",
    'prepare: return {}, {"m": batch.reward_N.mean()}': "returned the number 'm' as a Tensor; expected a float",
    'prepare: return {"w": batch["x"]}, {}': "prepare raised KeyError: 'x', {file} line 6",
    'prepare: return {"w": batch.seq_ref_N}, {}': "log π_0 is there only with needs_ref, {file} line 6",
    "prepare: return {'w': torch.ones(2) + torch.ones(3)}, {}": "{file} line 6",
    "loss: return logp_NT.sum()": "loss returned a Tensor; expected (the sum of the rows' losses, columns to log)",
    "loss: return logp_NT.sum(-1), {}": "loss returned a Tensor of shape (4,) as its loss; expected one number",
    "loss: return 0.0, {}": "loss returned a float as its loss",
    'loss: return logp_NT.sum(), {"x": logp_NT[:2]}': "the column 'x' of shape (2, 3)",
}


def system(tmp_path: Path, **bodies: str) -> tuple[Path, type]:
    file = tmp_path / "own.py"
    signatures = {"prepare": "self, batch", "loss": "self, logp_NT, rows, value_NT=None"}
    methods = "".join(f"\n    def {name}({signatures[name]}):\n        {body}" for name, body in bodies.items())
    file.write_text(f"import torch\nfrom dualign import Algorithm\n\nclass Mine(Algorithm):{methods or ' pass'}\n")
    return file, system_of({"name": f"{file}:Mine"})


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_amiss_in_a_method_is_named(tmp_path, wrong):
    method, _, body = wrong.partition(": ")
    file, kind = system(tmp_path, **{"prepare": "return {}, {}", "loss": "return logp_NT.sum(), {}"} | {method: body})
    batch = Batch(torch.tensor([0, 0, 1, 1]), torch.ones(4, 3), torch.zeros(4))
    algo = kind(name=f"{file}:Mine")
    given = (batch,) if method == "prepare" else (torch.zeros(4, 3), batch)
    with pytest.raises(UserError) as error:
        getattr(algo, method)(*given)
    assert f"algo {file}:Mine: {method}" in str(error.value)
    assert WRONG[wrong].replace("{file}", str(file)) in str(error.value)


def test_a_decorated_method_is_looked_at_likewise(tmp_path):
    body = "    @torch.no_grad()\n    def prepare(self, batch):\n        return {}, {}['x']\n\n    def loss"
    file, _ = system(tmp_path, loss="return logp_NT.sum(), {}")
    file.write_text(file.read_text().replace("    def loss", body))
    kind = system_of({"name": f"{file}:Mine"})
    with pytest.raises(UserError, match=r"prepare raised KeyError: 'x', .*own\.py line 7"):
        kind(name="mine").prepare(Batch(torch.zeros(4), torch.ones(4, 3), torch.zeros(4)))


def test_a_file_beside_the_package_is_the_users(tmp_path):
    """Though its path begins like the package's."""
    own: dict[str, Callable[[], None]] = {}
    file = f"{Path(dualign.__file__).parent}_rewards/mine.py"
    exec(compile("def reward():\n    raise ValueError", file, "exec"), own)
    with pytest.raises(UserError, match=f"{file} line 2"):
        run_own("reward", own["reward"])


def test_memory_that_is_short_is_for_the_loop_to_answer(tmp_path):
    _, kind = system(tmp_path, loss="raise MemoryError")
    with pytest.raises(MemoryError):
        kind(name="mine").loss(torch.zeros(4, 3), rows=Batch(torch.zeros(4), torch.ones(4, 3), torch.zeros(4)))


def test_a_system_without_a_loss_is_refused_when_it_is_named(tmp_path):
    with pytest.raises(ValidationError, match="has no method `loss`"):
        system(tmp_path)

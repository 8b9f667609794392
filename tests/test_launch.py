"""What launchers' variables make of a process: one of several, the only one, or a launch that lacks something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from dualign.common.errors import UserError
from dualign.common.launch import first, settle
from runs_common import free_port, reward_file, tree, write_prompts

MEET = {"MASTER_ADDR": "h", "MASTER_PORT": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEET}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
       "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(("env", "kept", "said"), [
    ({}, {}, None),
    ({"LOCAL_RANK": "0"}, {}, "LOCAL_RANK set, and nothing else of a launch: this is one process"),
    ({"LOCAL_RANK": "3"}, {}, "LOCAL_RANK set, and nothing else of a launch: this is one process"),
    ({"PMI_SIZE": "2"}, {}, "PMI_SIZE set, and nothing else of a launch: this is one process"),
    ({"WORLD_SIZE": "2"}, {}, "WORLD_SIZE set, and nothing else of a launch: this is one process"),
    ({"PMI_SIZE": "1", "PMI_RANK": "0"}, {}, None),
    ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {}, None),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
    (SRUN, SRUN, "SLURM_STEP_NUM_TASKS=2 without MASTER_ADDR and MASTER_PORT: every task is one process, and a run of its own"),
])  # fmt: skip
def test_one_process_is_one_process(env, kept, said):
    given = dict(env)
    assert first(given)
    assert settle(given) == said and given == kept


@pytest.mark.parametrize(("env", "more"), [
    (TORCHRUN, {}), (TORCHRUN | {"PMI_SIZE": "8", "PMI_RANK": "5"}, {}), (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}, {}),
    (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "PMI_SIZE": "2", "PMI_RANK": "1"}, {}),
    (MPI | MEET, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}),
    ({"PMI_SIZE": "2", "PMI_RANK": "1"} | MEET, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}),
    (SRUN | MEET, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}),
])  # fmt: skip
def test_a_launch_is_as_torch_reads_it(env, more):
    given = dict(env)
    assert settle(given) is None
    expected = {k: v for k, v in env.items() if k.startswith(("SLURM", "MASTER")) or k in TORCHRUN} | more
    assert {k: v for k, v in given.items() if k in expected} == expected
    assert not any(k.startswith(("PMI", "OMPI")) for k in given)
    assert settle(given) is None and first(given) == (given["RANK"] == "0")


@pytest.mark.parametrize(("env", "missing"), [
    (MPI, "MASTER_ADDR and MASTER_PORT are not set"),
    ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "For one process: unset PMI_SIZE"),
    ({"WORLD_SIZE": "2", **MEET}, "RANK and LOCAL_RANK are not set"),
    ({"WORLD_SIZE": "2", "RANK": "0", **MEET}, "LOCAL_RANK is not set"),
    (SRUN | {"MASTER_ADDR": "h"}, "MASTER_PORT is not set"),
    (MPI | MEET | {"OMPI_COMM_WORLD_RANK": "4"}, "the last is 3"),
    ({"PMI_SIZE": "many"}, "PMI_SIZE is a launcher's: 'many' is no whole number"),
])  # fmt: skip
def test_a_launch_that_lacks_something_says_what(env, missing):
    with pytest.raises(UserError, match=missing):
        settle(dict(env))


def test_a_run_under_such_variables(tiny, tmp_path):
    recipe = tmp_path / "r.yaml"
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    recipe.write_text(yaml.safe_dump(config | {"reward": [reward_file()]}))

    def train(name: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "dualign", "train", str(recipe), f"run.dir={tmp_path / name}"], text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    port = str(free_port())
    together = [
        train("two", PMI_SIZE="2", PMI_RANK=r, MPI_LOCALRANKID=r, MASTER_ADDR="localhost", MASTER_PORT=port)
        for r in "01"
    ]
    lone, lacking = train("one", LOCAL_RANK="0"), train("none", PMI_SIZE="2", PMI_RANK="0")
    said = [process.communicate(timeout=240)[1] for process in (*together, lone, lacking)]
    assert [p.returncode for p in (*together, lone, lacking)] == [0, 0, 0, 2], said
    assert "this is one process" in said[2] and "MASTER_ADDR and MASTER_PORT" in said[3]
    assert "Traceback" not in "".join(said) and not (tmp_path / "none").exists()
    assert (tmp_path / "two" / "summary.json").exists() and (tmp_path / "one" / "summary.json").exists()

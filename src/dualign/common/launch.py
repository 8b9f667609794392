"""Which of several processes this one is, by the variables that launchers set.

`torchrun` and `accelerate launch` set all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. mpirun and srun
set a rank and a size under names of their own, and no address at which the processes meet. What a batch system or a
shell left over says nothing: one process is one process.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from dualign.common.errors import UserError

Environment = MutableMapping[str, str]


@dataclass(frozen=True)
class Names:
    """The variables of one kind of launcher."""

    size: str
    rank: str
    local_rank: str
    local_size: str  # "": there is none


TORCH = Names("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = Names("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "")  # srun's, not those of a job
OTHERS = (
    Names("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    Names("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    Names("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    SLURM,
)
MEETING = ("MASTER_ADDR", "MASTER_PORT")


def first(env: Environment = os.environ) -> bool:
    """Whether this process speaks for all."""
    launcher = _launcher(env)
    return launcher is None or env.get(launcher.rank, "0") == "0"


def settle(env: Environment = os.environ) -> str | None:
    """Brings the environment into the form in which torch reads it: all of a launch, or nothing of one. Returns what is
    worth saying. Raises UserError for a launch that lacks something."""
    launcher = _launcher(env)
    if launcher is None:
        return _alone(env)
    size, rank = _number(env, launcher.size, 1), _number(env, launcher.rank, 0)
    wanted = [launcher.rank, *([TORCH.local_rank] if launcher is TORCH else []), *MEETING]
    if missing := [name for name in wanted if not env.get(name)]:
        raise UserError(
            f"{launcher.size}={size} says that there are {size} processes, but {_listed(missing)} not set, and they "
            "cannot meet: start them by `torchrun --nproc-per-node N -m dualign ...` or `accelerate launch`, or set "
            f"these. For one process: unset {launcher.size}"
        )
    if rank >= size:
        raise UserError(f"{launcher.rank}={rank}: of {launcher.size}={size} processes the last is {size - 1}")
    local = {TORCH.local_rank: _number(env, launcher.local_rank, rank)}
    if launcher.local_size:
        local[TORCH.local_size] = _number(env, launcher.local_size, size)
    _forget(env, OTHERS)
    if launcher is not TORCH:
        env.update({name: str(n) for name, n in {TORCH.rank: rank, TORCH.size: size, **local}.items()})
    return None


def _launcher(env: Environment) -> Names | None:
    """What started this process as one of several, or as torchrun does one alone; None where nothing did."""
    if all(env.get(name) for name in (TORCH.size, TORCH.rank, TORCH.local_rank, *MEETING)):
        return TORCH
    for names in (TORCH, *OTHERS):
        meets = bool(env.get(MEETING[0]))
        if _number(env, names.size, 1) > 1 and (meets or (env.get(names.rank) and names is not SLURM)):
            return names
    return None


def _alone(env: Environment) -> str | None:
    """One process: forgets what is left of a launch, and returns what to say of it."""
    one_of_one = any(env.get(names.size) == "1" and env.get(names.rank) == "0" for names in (TORCH, *OTHERS))
    stray = _forget(env, (TORCH, *OTHERS))
    if _number(env, SLURM.size, 1) > 1:  # one of several tasks; each may well be a run of its own
        return f"{SLURM.size}={env[SLURM.size]} without {' and '.join(MEETING)}: every task is one process, and a run of its own"
    if stray and not one_of_one:
        return f"{' and '.join(stray)} set, and nothing else of a launch: this is one process"
    return None


def _forget(env: Environment, kinds: tuple[Names, ...]) -> list[str]:
    """Removes their variables, but for SLURM's, which others read; returns the names of those that were there."""
    names = [name for kind in kinds if kind is not SLURM for name in vars(kind).values()]
    return [name for name in names if env.pop(name, None) is not None]


def _number(env: Environment, name: str, otherwise: int) -> int:
    text = env.get(name) or str(otherwise)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} is a launcher's: {text!r} is no whole number") from None


def _listed(names: list[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"

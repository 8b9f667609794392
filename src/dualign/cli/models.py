"""export, vllm-setup."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(export)
    app.command("vllm-setup")(vllm_setup)


def export(
    run: Annotated[Path, typer.Argument(help="the run's folder")],
    checkpoint: Annotated[str, typer.Option(help="latest, best, or after how many online batches")] = "latest",
    best: Annotated[bool, typer.Option("--best", help="the checkpoint that the run's witness rates highest")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="of adapters, write the whole model")] = False,
    out: Annotated[Path | None, typer.Option(help="where to; default: RUN/export")] = None,
) -> None:
    """Write a run's model into a folder of its own, which from_pretrained and servers open."""
    from dualign.common.errors import UserError
    from dualign.models.export import export as write
    from dualign.run.folder import Run

    if checkpoint not in ("latest", "best") and not checkpoint.isdecimal():
        raise UserError(f"--checkpoint {checkpoint}: expected latest, best, or a number of online batches")
    opened = Run.open(run)
    if best or checkpoint == "best":
        found = opened.checkpoint("best")
    else:
        found = opened.checkpoint("latest" if checkpoint == "latest" else int(checkpoint))
    out = out or opened.folder / "export"
    print(f"{out}: {write(found, out, opened.config.model, merge)}, from {found}")


def vllm_setup(
    python: Annotated[str | None, typer.Option(help="the interpreter to make it with; default: this one")] = None,
    into: Annotated[Path | None, typer.Option(help="its folder; default: where rollout.engine=vllm looks")] = None,
    cpu: Annotated[
        bool | None, typer.Option(help="vLLM's build for CPUs; default: where there is no NVIDIA GPU")
    ] = None,
) -> None:
    """Make an environment with vLLM, for `rollout.options.serve=true`."""
    from dualign.common.paths import cache_dir
    from dualign.rollout.vllm.setup import make_environment

    print(f"ready: {make_environment(into or cache_dir() / 'vllm', python, cpu)}")

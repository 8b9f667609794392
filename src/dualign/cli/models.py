"""export, push, vllm-setup."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualign.cli.printed import AsJson, document

if TYPE_CHECKING:
    from dualign.eval.handing import Handed

RunName = Annotated[str, typer.Argument(help="the run's folder, RUN@best (by its witness) or RUN@3")]
Merge = Annotated[bool, typer.Option("--merge", help="of adapters, write the whole model")]
Base = Annotated[
    str | None, typer.Option(help="of adapters: the hub's name of their base; default: the base beside them")
]


def register(app: typer.Typer) -> None:
    app.command()(export)
    app.command()(push)
    app.command("vllm-setup")(vllm_setup)


def export(
    run: RunName,
    checkpoint: Annotated[str | None, typer.Option(help="latest, best, or after how many online batches")] = None,
    best: Annotated[bool, typer.Option("--best", help="as RUN@best")] = False,
    merge: Merge = False,
    base: Base = None,
    gguf: Annotated[
        Path | None, typer.Option(help="also write GGUF, by llama.cpp's converter: its folder or convert_hf_to_gguf.py")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where to; default: RUN/export")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model into a folder of its own, which from_pretrained and servers open. It is loaded again and its
    log-probs compared with the checkpoint's."""
    from dualign.eval.handing import converter_in, hand_on, served, to_gguf

    script = converter_in(gguf) if gguf else None
    which = "best" if best else checkpoint
    _quiet()
    handed = hand_on(f"{run}@{which}" if which else run, out, merge, base)
    if as_json:
        document(handed.record() | {"gguf": to_gguf(handed, script) if script else None})
        return
    _tell(handed)
    if script:
        print(f"{to_gguf(handed, script)}: for llama.cpp")
    print("serve it by one of:\n  " + "\n  ".join(served(handed)))


def push(
    run: RunName,
    repository: Annotated[str, typer.Argument(help="of the hub: OWNER/NAME")],
    merge: Merge = False,
    base: Base = None,
    public: Annotated[
        bool, typer.Option("--public", help="for everybody to see; default: a private repository")
    ] = False,
    dry: Annotated[bool, typer.Option("--dry", help="write all that would be uploaded, and stop")] = False,
    out: Annotated[Path | None, typer.Option(help="with --dry, where to; default: RUN/push")] = None,
) -> None:
    """Upload a run's model to a hub, with a card made from the run. The token is the hub client's own (HF_TOKEN, or
    `hf auth login`)."""
    from dualign.eval.handing import found, hand_on, token_of_hub
    from dualign.eval.handing import push as upload

    _quiet()
    folder = found(run)[0].folder
    if dry:
        handed = hand_on(run, out or folder / "push", merge, base, repository)
        _tell(handed)
        print(f"not uploaded; the card is {handed.folder / 'README.md'}")
        return
    token_of_hub()  # before a large model is written and checked
    with tempfile.TemporaryDirectory(dir=folder, prefix=".push-") as scratch:
        handed = hand_on(run, Path(scratch) / "model", merge, base, repository)
        _tell(handed)
        print(f"uploaded: {upload(handed.folder, repository, not public)}")


def _tell(handed: Handed) -> None:
    print("\n".join(handed.lines()))


def _quiet() -> None:
    from dualign.cli.train import _quiet as quiet

    quiet()


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

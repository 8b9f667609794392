"""What a run was made from, by sha256: weights, tokenizer, data, templates, rewards. Names and places do not count.

`of_run` is recorded in run.json when a run begins; a resume and `dualign verify` hold it against what is there then.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dualign import assets, data
from dualign.annotate.settings import (
    ClassifierReward,
    FunctionReward,
    HeadReward,
    JudgeReward,
    PreferenceReward,
    RewardConfig,
)
from dualign.common.code_files import with_imports
from dualign.common.errors import UserError
from dualign.common.named import importable, is_place
from dualign.config import Config
from dualign.models.settings import ModelConfig
from dualign.run.manifest import sha256_of

Digests = dict[str, str]  # sha256 by file name, or by what else a thing is told by; empty: cannot be had
LARGE = 2**20  # bytes from which a file's digest is remembered between processes
SETTLED = 2.0  # seconds: a file that changed later than so long ago may change again within its clock's tick
LEFT_OUT = {"state.json", "train.safetensors", "optimizer.safetensors"}  # a checkpoint's training state
OF_MODELS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)
OF_TOKENIZERS = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
OF_TEMPLATES = ("chat_template.*", "additional_chat_templates/*.jinja", "*.tiktoken", "*.py")
IMPORTED = "imported "  # before the names of modules that a reward's own module imports
ASKING = {  # settings of a reward that say how it is asked, and change no label
    "api_key_env", "base_url", "cache", "concurrency", "max_calls", "max_dollars", "max_tokens_total", "name",
    "price_completion", "price_prompt", "requests_per_minute", "retries", "timeout", "tokens_per_minute",
}  # fmt: skip


def of_run(config: Config, functions: Sequence[Callable[..., Any]] = (), near: bool = False) -> dict[str, Digests]:
    """Everything that a run reads, by the key that names it. `functions`: the rewards given as Python functions;
    `near`: without data sets by name, which a hub might be asked for."""
    d, m = config.data, config.model
    found = of_models(m) | {"data.train": of_data(d.train, d.subset, d.split, near)}
    if m.chat_template:
        found["model.chat_template"] = of_file(m.chat_template)
    for key, place in {"algo.name": config.algo.name, "rollout.engine": config.rollout.engine}.items():
        if is_place(place):  # code of the user's own
            found[key] = _of_code_at(place)
    if d.eval:
        found["data.eval"] = of_data(d.eval, d.subset, d.eval_split, near)
    return found | of_rewards(config.reward, functions)


def of_models(m: ModelConfig) -> dict[str, Digests]:
    """The policy's and π_0's."""
    found = {"model.name": of_model(m.name, m.revision)}
    if m.reference:
        found["model.reference"] = of_model(m.reference, m.reference_revision)
    return found


def of_rewards(rewards: Sequence[RewardConfig], functions: Sequence[Callable[..., Any]] = ()) -> dict[str, Digests]:
    """What a run's rewards read, likewise."""
    from dualign.annotate.function import name_of
    from dualign.common.code_digest import modules_of, of_function

    found = {}
    for i, reward in enumerate(rewards):
        key, files = _files_of(reward)
        if key:
            found[f"reward.{i}.{key}"] = files
    for i, function in enumerate(functions):
        code = of_function(function)
        made_of = {"its code": code} | _imported(modules_of(function)) if code else {}
        found[f"reward function {i} ({name_of(function)})"] = made_of
    return found


def of_reward(settings: RewardConfig) -> str:
    """One digest of what decides a reward's labels: its settings, and the function, head, weights or rubric that they
    name, whatever these are called. (Not of a server's model: its name must do.)"""
    key, files = _files_of(settings)
    told = settings.model_dump(mode="json", exclude={*ASKING, key} if key else ASKING)
    if isinstance(settings, FunctionReward):
        told["function"] = settings.path.rpartition(":")[2]
    text = json.dumps([told, sorted(files.values())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changed(old: Digests, new: Digests) -> str | None:
    """What of an input is not what it was, in words; None where nothing is, or it cannot be known."""
    both = old.keys() & new.keys()
    unknown = {name for name in old.keys() ^ new.keys() if name.startswith(IMPORTED)}  # seen from another folder
    unknown |= {name for name in both if ":" in old[name] and _python(old[name]) != _python(new[name])}
    old, new = ({name: sha for name, sha in one.items() if name not in unknown} for one in (old, new))
    if not old or not new or sorted(old.values()) == sorted(new.values()):
        return None
    if len(old) == len(new) == 1:
        (name, was), (now_name, now) = *old.items(), *new.items()
        what = name if name == now_name else f"{now_name} (it was {name})"
        return f"{what} has changed since the run began (sha256 {_short(was)} then, {_short(now)} now)"
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    told = ", ".join(
        f"{name} (sha256 {_short(old[name])} then, {_short(new[name])} now)" if name in old and name in new
        else f"{name} ({'missing' if name in old else 'new'} now)"
        for name in names[:3]
    )  # fmt: skip
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    return f"{told}{more} {'has' if len(names) == 1 else 'have'} changed since the run began"


def _python(digest: str) -> str:
    """That compiled the code which the digest is of: those of two cannot be compared."""
    return digest.partition(":")[0]


def _short(digest: str) -> str:
    return digest.rpartition(":")[2][:12]


# --- models ---


def of_model(name: str, revision: str | None = None) -> Digests:
    """A model's or adapter's weights, settings, tokenizer and templates; of a hub's, its commit. Fetches nothing."""
    embedded = name in assets.EMBEDDED and not Path(name).exists()
    folder = assets.cache_dir() / name if embedded else Path(name).expanduser()
    if not folder.is_dir():
        return _of_hub(name, revision)
    found = {str(p.relative_to(folder)): _sha256(p) for p in _files(folder)}
    if "adapter_config.json" in found:
        found |= {f"base/{path}": sha256 for path, sha256 in _of_base(folder).items()}
    return found


def _files(folder: Path) -> Iterator[Path]:
    for pattern in (*OF_MODELS, *OF_TOKENIZERS, *OF_TEMPLATES):
        yield from sorted(p for p in folder.glob(pattern) if p.is_file() and p.name not in LEFT_OUT)


def _of_base(folder: Path) -> Digests:
    try:
        adapter = assets.adapter_of(str(folder))
    except UserError:
        return {}
    return of_model(adapter.base, adapter.base_revision) if adapter else {}


def _of_hub(name: str, revision: str | None) -> Digests:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "adapter_config.json"):
        try:
            path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            return {}
        if isinstance(path, str):
            return {"commit": Path(path).parent.name}  # .../snapshots/COMMIT/config.json
    return {}


# --- data and rewards ---


def of_data(source: str, subset: str | None = None, split: str = "train", near: bool = False) -> Digests:
    """A file's bytes; of a data set by folder or name, its rows (`near`: by folder alone)."""
    try:
        file = data.local_file(source, split)
    except UserError:
        return {}
    if file is not None:
        return of_file(file)
    folder = Path(source).expanduser()
    if near and not folder.is_dir():
        return {}
    return _of_rows(str(folder) if folder.is_dir() else source, subset, split)


def _of_rows(source: str, subset: str | None, split: str) -> Digests:
    try:
        rows = data.load_dataset(source, subset, split)
    except UserError:
        return {}
    found = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(1000):
        for column in batch.column_names:
            found.update(f"{column} {batch.schema.field(column).type}\0".encode())
            found.update(json.dumps(batch[column].to_pylist(), default=repr).encode())
    return {"rows": found.hexdigest()}


def of_file(path: str | Path) -> Digests:
    file = Path(path).expanduser()
    return {file.name: _sha256(file)} if file.is_file() else {}


def _files_of(reward: RewardConfig) -> tuple[str, Digests]:
    """The key of a reward that names what it is made of, and that; "" where none does."""
    from dualign.annotate import rubric

    match reward:
        case FunctionReward():
            return "path", _of_code_at(reward.path)
        case HeadReward():
            from dualign.annotate.head import file_of

            try:
                return "path", of_file(file_of(reward.path))
            except UserError:
                return "path", {}
        case ClassifierReward():
            return "model", of_model(reward.model, reward.revision)
        case JudgeReward() | PreferenceReward():
            shipped = resources.files("dualign.annotate") / "rubrics" / f"{reward.rubric}.yaml"
            return "rubric", of_file(str(shipped) if reward.rubric in rubric.BUILT_IN else reward.rubric)
    return "", {}


def _of_code_at(path: str) -> Digests:
    """The file of FILE.py:FUNCTION or package.module:FUNCTION, and those of the user's own modules that it imports."""
    place = path.rpartition(":")[0]
    if place.endswith(".py"):
        return _with_imported(place)

    importable(Path(os.getcwd()))
    try:
        found = importlib.util.find_spec(place)
    except Exception:  # whatever a user's package raises: whoever loads the function says so
        return {}
    return _with_imported(found.origin) if found and found.origin else {}


def _with_imported(path: str) -> Digests:
    file = Path(path).expanduser().absolute()
    others = {name: other for name, other in with_imports([file]).items() if other != file}
    return of_file(file) | _imported(others)


def _imported(files: dict[str, Path]) -> Digests:
    return {f"{IMPORTED}{name}": _sha256(file) for name, file in files.items()}


# --- files ---


def _sha256(path: Path) -> str:
    """Of a large file as remembered, while the file is the very same by its inode, size and times."""
    s = os.stat(path)
    if s.st_size < LARGE:
        return sha256_of(path)
    about = [str(path.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]
    note = assets.cache_dir() / "digests" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    try:
        known = note.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    except (OSError, ValueError):
        pass
    found = sha256_of(path)
    if time.time() - max(s.st_mtime, s.st_ctime) > SETTLED:
        _remember(note, found)
    return found


def _remember(note: Path, text: str) -> None:
    aside = note.with_name(f".{note.name}-{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="ascii")
        os.replace(aside, note)
    except OSError:  # a cache that cannot be written costs time and nothing else
        aside.unlink(missing_ok=True)

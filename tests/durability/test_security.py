"""What must never get out, and what must never be obeyed."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

import dualign
from command import dualign as command
from dualign.common.errors import UserError, clean
from dualign.common.yaml_text import parse_yaml
from dualign.config import build
from fault_server import FaultServer
from killing import prepare
from runs_common import reward_file, tree, write_prompts

SECRET = "sk-planted-7f3a9c1e5d2b8f60"
SOURCE = Path(dualign.__file__).parent


def everything(*folders):
    """Every byte of every file under the folders."""
    return b"".join(p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file())


FAULTS = [{}, {"status": 404}, {"faults": 0.3, "kinds": ("500", "cut", "malformed", "refusal")}]


@pytest.mark.parametrize("faults", FAULTS)
def test_a_key_is_in_no_file_and_no_output(faults, tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FaultServer(key=SECRET, retry_after="0.01", **faults) as server:
        config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
        config["data"].pop("eval")
        judge = {"type": "judge", "rubric": "helpfulness", "base_url": server.url, "model": "m"}
        config["reward"] = [judge | {"api_key_env": "JUDGE_KEY"}]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
        said = command("train", tmp_path / "recipe.yaml")
        assert said.code == (2 if "status" in faults else 0), said.text
        assert server.stats.calls > 0
    assert SECRET not in said.text and SECRET not in caplog.text
    assert SECRET.encode() not in everything(tmp_path)


def test_a_key_that_the_server_echoes_is_not_shown(tiny, tmp_path, monkeypatch):
    """The server refuses the key and repeats the request's head in its answer, as some do."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FaultServer(key="another") as server:
        config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
        config["reward"] = [{"type": "judge", "rubric": "helpfulness", "base_url": server.url, "model": "m"}]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
        said = command("train", tmp_path / "recipe.yaml")
    assert said.code == 2 and SECRET not in said.text
    assert SECRET.encode() not in everything(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key_env": SECRET},
        {"api_key_env": "hf_abcdefghij"},
        {"base_url": f"https://me:{SECRET}@host/v1"},
        {"base_url": f"https://host/v1?api_key={SECRET}"},
        {"api_key": SECRET},
    ],
)
def test_a_key_in_the_configuration_is_refused_and_not_repeated(settings, tmp_path):
    judge = {"type": "judge", "rubric": "helpfulness", "base_url": "http://localhost:1/v1", "model": "m", **settings}
    config = tree(tmp_path, tmp_path / "prompts.jsonl", tmp_path / "run", {"name": "dar"}) | {"reward": [judge]}
    with pytest.raises(UserError) as refused:
        build(config)
    assert SECRET not in str(refused.value) and "reward.0" in str(refused.value)


def test_yaml_builds_nothing_but_data():
    with pytest.raises(UserError, match="not readable as YAML"):
        parse_yaml("!!python/object/apply:os.system ['touch /tmp/owned']", "recipe.yaml")


def test_nothing_is_unpickled():
    """No call in the package that could run code from a file: pickle, torch.load, eval, exec, unsafe YAML."""
    banned = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{path.name}: import {n}" for n in names if n.split(".")[0] in banned]
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in {
                    "torch.load",
                    "eval",
                    "exec",
                    "yaml.unsafe_load",
                    "yaml.full_load",
                    "np.load",
                    "numpy.load",
                }:
                    found.append(f"{path.name}:{node.lineno} {name}")
                if name.endswith("AutoModel.from_pretrained") or name.endswith("Classification.from_pretrained"):
                    assert any(k.arg == "use_safetensors" for k in node.keywords), f"{path.name}:{node.lineno}"
    assert found == []


def test_a_model_of_pickled_weights_is_refused(tiny, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(tiny, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = tree(folder, write_prompts(tmp_path), tmp_path / "run", {"name": "iter_sft"}) | {"reward": [reward_file()]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    said = command("train", tmp_path / "recipe.yaml")
    assert said.code == 2 and "model.name" in said.err and "safetensors" in said.err


@pytest.mark.parametrize("name", ["../../../etc/passwd", "../prompts/quickstart", "..//quickstart", "x/../../y"])
def test_builtin_names_lead_nowhere_else(name):
    from dualign.data.rows import load_prompts

    with pytest.raises(UserError, match="no such data in the package"):
        load_prompts(f"builtin:{name}")


def test_builtin_heads_lead_nowhere_else():
    from dualign.annotate.head import load_head

    with pytest.raises(UserError, match="no such head in the package"):
        load_head("builtin:../heads/harmless")


HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/bold red]\u202egpj.exe <script>alert(1)</script>\r"


def test_clean_leaves_words_and_takes_commands():
    shown = clean(HOSTILE)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert "[bold red]x[/bold red]" in shown and clean("wörds\n\tand 表") == "wörds\n\tand 表"


def test_completions_and_data_are_inert_on_the_terminal(tiny, tmp_path, monkeypatch):
    """Prompts, ids and notes come from files that others wrote; they are shown as they are, and obeyed never."""
    monkeypatch.setenv("COLUMNS", "400")
    recipe, run, _ = prepare(tmp_path, tiny, "dar", "run")
    data = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["id"] += HOSTILE
        row["prompt"][0]["content"] += HOSTILE
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command("train", recipe)
    assert said.code == 0, said.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said.text)
    assert "[bold red]x[/bold red]" in said.text
    assert command("verify", run).code == 0


def test_an_error_about_hostile_data_is_inert(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"id": HOSTILE, HOSTILE: 1}) + "\n")
    said = command("sample", tmp_path, path)
    assert said.code == 2 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said.text)

"""What the READMEs of examples/ say to type, typed, in a copy of each folder: on a tiny model, for two online batches."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import yaml

from command import dualign as command
from dualign import Run
from fault_server import FaultServer
from shared import shared
from test_commands import commands

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDERS = sorted(path.parent.name for path in EXAMPLES.glob("*/README.md"))
SERVER = "http://localhost:8000/v1"
SMALL = {
    "train": {"online_batches": 2, "online_batch": 16, "update_size": 8, "micro_batch_tokens": 128},
    "rollout": {"k": 4, "max_new_tokens": 12, "missing_eos_penalty": 0},
    "eval": {"prompts": 8},
}


def smaller(recipe: Path, model: Path) -> None:
    """The recipe on a tiny model, for two online batches. The rest stays as it is."""
    tree = yaml.safe_load(recipe.read_text())
    if "systems" in tree:
        tree |= {"seeds": [0], "systems": {name: {**each, "axes": {}} for name, each in tree["systems"].items()}}
    elif "train" in tree:
        tree |= {section: tree.get(section, {}) | values for section, values in SMALL.items()}
        if "base" not in tree:
            tree["model"] |= {"name": str(model), "precision": "fp32"}
    recipe.write_text(yaml.safe_dump(tree))


@pytest.fixture
def typed(tiny, tmp_path, monkeypatch):
    """Types every command of a folder's README, and says what each said."""
    copy = Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def type_all(name: str, url: str = SERVER) -> list[str]:
        monkeypatch.chdir(copy / name)
        for recipe in Path().glob("*.yaml"):
            smaller(recipe, tiny)
            recipe.write_text(recipe.read_text().replace(SERVER, url))
        said = []
        for words in commands(EXAMPLES / name / "README.md"):
            here = [word.replace(SERVER, url).replace("smollm2-135m-instruct", str(tiny)) for word in words]
            answer = command(*here)
            assert answer.code == 0, f"dualign {' '.join(here)}: {answer.text}"
            said.append(answer.text)
        return said

    return type_all


def test_each_folder_is_whole():
    assert len(FOLDERS) >= 9
    for name in FOLDERS:
        text = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
        assert name == "notebook" or ("What to expect" in text and commands(EXAMPLES / name / "README.md"))
        assert f"({name}/README.md)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FOLDERS} - {"judge", "notebook", "summaries"}))
def test_its_commands_do_what_the_readme_says(typed, name):
    said = typed(name)
    runs = [Run.open(folder.parent) for folder in Path("runs").rglob("config.yaml")]
    assert runs and all(len(run.metrics()) == 2 and run.summary is not None for run in runs)
    if name == "own_reward":
        row = runs[0].batch(0).rows[0]
        assert set(row.label.parts) == {"one_sentence", "relevance"}
    if name == "preferences":
        assert len(Path("pairs.jsonl").read_text().splitlines()) > 1
        assert Run.open("runs/online").config.model.reference is not None
    if name == "lora":
        assert Path("adapter/adapter_config.json").is_file() and not Path("whole-model/adapter_config.json").exists()
    if name == "sweep":
        assert Path("runs/sweep/report/report.md").is_file() and "grpo" in said[-1] + said[-2]


@pytest.mark.slow
def test_the_judge_and_its_witness(typed):
    with FaultServer() as server:
        said = typed("judge", server.url)
        assert server.stats.calls > 30
    assert "SCORE" in said[1] and "dollars" in said[2]
    run = Run.open("runs/judge")
    assert run.witness().looks and run.batch(1).rows[0].label.value in range(1, 11)


@pytest.mark.slow
def test_summaries_of_papers(typed, tmp_path):
    for name in ("train", "dev"):
        packed = shared(f"data/summarization/scitldr_{name}.jsonl.gz")
        lines = gzip.decompress(packed.read_bytes()).decode().splitlines()[:40]
        rows = [json.loads(line) for line in lines]
        for row in rows:  # the tiny model reads a byte as a token
            row["prompt"][0]["content"] = row["prompt"][0]["content"][:100]
        target = tmp_path / "examples" / "summaries" / f"{name}.jsonl"
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed("summaries")
    rows = Run.open("runs/summaries").batch(0).rows
    assert all(0 <= row.label.parts["overlap"] <= 1 for row in rows)
    assert all(row.rollout.prompt.columns["references"] for row in rows)

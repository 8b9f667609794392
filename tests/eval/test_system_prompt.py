"""An evaluation puts prompts to the model as the run did, to both sides alike, and says so."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import dualign
from command import dualign as command
from dualign.cli import application
from dualign.common.errors import UserError
from dualign.eval.asking import Asking
from dualign.eval.evaluate import mean_reward, win_rate
from runs_common import reward_file, tree

PIRATE = "Answer like a pirate."
SEEN = []


def seen(prompts, completions, **columns):
    """Remembers what it was shown."""
    SEEN.extend(prompts)
    return [float(len(c[0]["content"])) for c in completions]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("system")
    prompts = write(folder / "p.jsonl", [{"prompt": f"number {i}", "question": f"number {i}"} for i in range(4)])
    runs = []
    for name, system_prompt in (("pirate", PIRATE), ("plain", None)):
        config = tree(tiny, prompts, folder / name, {"name": "dar"}, online_batches=1)
        config["data"] |= {"chat": True, "system_prompt": system_prompt}
        runs.append(str(dualign.train(config, reward=seen, quiet=True).folder))
    return {"prompts": prompts, "pirate": runs[0], "plain": runs[1]}


def shown(evaluate, *arguments, **options):
    """The system messages that the reward was shown, None for a conversation without one; and the result."""
    SEEN.clear()
    result = evaluate(*arguments, reward=seen, **options)
    return {p[0]["content"] if p[0]["role"] == "system" else None for p in SEEN}, result.record["systems"]


@pytest.mark.parametrize("evaluate", [win_rate, mean_reward])
def test_an_evaluation_uses_the_runs_system_prompt_and_says_so(world, evaluate, tmp_path):
    asking = Asking(str(world["prompts"]), max_new_tokens=4)
    asked, (system,) = shown(evaluate, [world["pirate"]], asking=asking, out=tmp_path / "x.json")
    assert asked == {PIRATE} and system["sampling"]["system_prompt"] == PIRATE and system["sampling"]["chat"]
    for text, used in (("Be brief.", "Be brief."), ("", None)):
        other = Asking(str(world["prompts"]), max_new_tokens=4, system_prompt=text)
        asked, (system,) = shown(evaluate, [world["pirate"]], asking=other, out=tmp_path / "x.json")
        assert asked == {used} and system["sampling"]["system_prompt"] == used


def test_runs_of_different_system_prompts_are_not_compared_unasked(world, tmp_path):
    asking = Asking(str(world["prompts"]), max_new_tokens=4)
    with pytest.raises(UserError, match=r"the runs differ in data\.system_prompt: say --system-prompt"):
        win_rate([world["pirate"]], against=world["plain"], asking=asking, reward=seen, out=tmp_path / "x.json")
    alike = Asking(str(world["prompts"]), max_new_tokens=4, system_prompt="Both.")
    arguments = {"against": world["plain"], "asking": alike, "out": tmp_path / "x.json"}
    assert shown(win_rate, [world["pirate"]], **arguments)[0] == {"Both."}
    with pytest.raises(UserError, match="same questions were asked in different conversations"):
        win_rate([world["pirate"]], against=world["plain"], reward=seen, out=tmp_path / "x.json")


def test_outputs_from_elsewhere_are_answers_to_the_same_conversation(world, tmp_path):
    """A file that knows of no system prompt, plain or AlpacaEval's, still meets the run's answers."""
    rows = [json.loads(line) for line in world["prompts"].read_text().splitlines()]
    plain = write(tmp_path / "o.jsonl", [{"prompt": row["prompt"], "completion": "abc"} for row in rows])
    alpaca = tmp_path / "o.json"
    alpaca.write_text(json.dumps([{"instruction": row["prompt"], "output": "abc"} for row in rows]))
    for file in (plain, alpaca):
        asked, (system,) = shown(win_rate, [world["pirate"]], against=str(file), out=tmp_path / "x.json")
        assert asked == {PIRATE} and system["points"][0]["win_rate"]["n"] == 4


def test_the_benchmarks_use_it_too(world, tmp_path):
    out = tmp_path / "a.json"
    rows = [json.loads(line) | {"instruction": f"number {i}", "reference_gpt4_1106_preview": "an answer"}
            for i, line in enumerate(world["prompts"].read_text().splitlines())]  # fmt: skip
    instructions = write(tmp_path / "i.jsonl", rows)
    for options, used in (([], PIRATE), (["--system-prompt", ""], None)):
        arguments = ["eval", "alpaca", world["pirate"], "--instructions", instructions, "--max-new-tokens", 4,
                     "--judge", f"{Path(__file__)}:seen", "--out", out, *options]  # fmt: skip
        assert CliRunner().invoke(application(), [str(a) for a in arguments], catch_exceptions=False).exit_code == 0
        (system,) = json.loads(out.read_text())["systems"]
        assert system["sampling"]["system_prompt"] == used
        rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
        assert {row["prompt"][0]["content"] == PIRATE for row in rows} == {used == PIRATE}


def test_another_prompt_column_can_be_named(world, tmp_path):
    other = write(tmp_path / "q.jsonl", [{"question": f"number {i}"} for i in range(4)])
    with pytest.raises(UserError, match="--prompt-column"):
        mean_reward([world["pirate"]], asking=Asking(str(other)), reward=seen, out=tmp_path / "x.json")
    asking = Asking(str(other), max_new_tokens=4, prompt_column="question")
    assert shown(mean_reward, [world["pirate"]], asking=asking, out=tmp_path / "x.json")[0] == {PIRATE}


def test_a_system_prompt_that_would_not_be_used_is_refused_or_said(tiny, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"number {i}", "question": f"number {i}"} for i in range(4)])
    config = tree(tiny, prompts, tmp_path / "run", {"name": "dar"}, online_batches=1)
    config["data"] |= {"system_prompt": PIRATE}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config | {"reward": [reward_file()]}))
    said = command("train", tmp_path / "recipe.yaml")
    assert said.code == 0 and "system_prompt is not used; it needs data.chat=true" in " ".join(said.text.split())
    run, out = str(tmp_path / "run"), tmp_path / "x.json"
    result = mean_reward([run], out=out)
    assert result.record["systems"][0]["sampling"]["system_prompt"] is None, "its own evaluations did not use it"
    tokens = ["--max-new-tokens", 4]
    own = ["eval", "reward", run, "--prompts", prompts, *tokens]
    instructions = ["--prompt-column", "prompt", "--column", "question", "--instructions", prompts]
    for refused in (own, [*own, "--system-prompt", "Be terse."],
                    ["sample", tiny, prompts, "--system-prompt", "Be terse.", *tokens],
                    ["eval", "alpaca", run, *instructions, "--no-chat", *tokens]):  # fmt: skip
        said = command(*refused, "--out", out)
        assert said.code == 2 and "--system-prompt needs --chat" in said.text, said.text
    for options, used in ((["--chat"], PIRATE), (["--system-prompt", ""], None)):
        assert command(*own, *options, "--out", out).code == 0
        assert json.loads(out.read_text())["systems"][0]["sampling"]["system_prompt"] == used

"""Whole runs against a real vLLM server (`make test-vllm`): weights that arrive, and are seen not to; seeds; adapters; a
server that is killed. A server takes about a minute to start, so tests share them, and the last one kills its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import dualign
from command import dualign as command
from dualign.common import lines
from dualign.common.child import Child, free_port, vllm_command
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Prompt
from dualign.models.load import load_model
from dualign.models.policy import Policy
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling
from dualign.rollout.settings import VLLMSettings
from dualign.rollout.vllm.client import Server
from dualign.rollout.vllm.sampler import VLLMSampler
from runs_common import launch, metrics, reward_file, tree, vowels, write_prompts
from tiny import make_tokenizer

pytestmark = pytest.mark.vllm
PYTHON = Path(os.environ.get("DUALIGN_VLLM", Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"))


def save(folder: Path, tied: bool) -> Path:
    """A small Llama with random weights whose attention vLLM has kernels for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.1,
            eos_token_id=eos, pad_token_id=eos, bos_token_id=None,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("tied"), tied=True)


def start(model: Path, folder: Path, *options: str) -> Child:
    """As a person would start one."""
    assert PYTHON.is_file(), f"{PYTHON}: `make test-vllm` makes it"
    options = (
        "--max-model-len",
        "512",
        "--dtype",
        "float32",
        "--generation-config",
        "vllm",
        "--enforce-eager",
        "--gpu-memory-utilization",
        "0.1",
        *options,
    )
    more = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    child = Child("the vLLM server", folder / "server.log", free_port(), more)

    def answers() -> bool:
        import asyncio

        async def ask() -> bool:
            async with Server(child.url, "", 10) as server:
                return await server.alive()

        return asyncio.run(ask())

    child.start(vllm_command(PYTHON, str(model), child.port, options), answers, 300)
    return child


@pytest.fixture(scope="module")
def server(untied, tmp_path_factory) -> Iterator[Child]:
    child = start(untied, tmp_path_factory.mktemp("server"))
    yield child
    child.stop()


@pytest.fixture(scope="module")
def lora_server(tied, tmp_path_factory) -> Iterator[Child]:
    child = start(tied, tmp_path_factory.mktemp("lora"), "--enable-lora", "--max-lora-rank", "8")
    yield child
    child.stop()


def configured(model: Path, folder: Path, **options) -> dict:
    config = tree(model, write_prompts(folder), folder / "run", {"name": "dar"}, lr=1e-3)
    config["rollout"] |= {"engine": "vllm", "options": options, "max_new_tokens": 24}
    return config


def sampler_of(model: Path, url: str) -> tuple[VLLMSampler, Policy]:
    hf, tokenizer = load_model(ModelConfig(name=str(model), precision="fp32"))
    policy = Policy(hf, "fp32")
    return VLLMSampler(VLLMSettings(url=url), policy, tokenizer), policy


def drawn(sampler: VLLMSampler, prompts: int = 4, k: int = 4, temperature: float = 1.3, top_p: float = 1.0) -> dict:
    requests = []
    for g in range(prompts):
        prompt = Prompt(f"p{g}", f"say something {g}")
        requests.append(Request(g, prompt, sampler.tokenizer.prompt(prompt)))
    found: dict[int, tuple] = {}

    def done(rollout):
        found[rollout.index] = rollout.completion_ids, rollout.sampler_logp, rollout.finish

    sampler.sample(requests, Sampling(k, 24, temperature, top_p), (7, 0), done)
    return found


def test_three_online_batches(server, untied, tmp_path):
    """Every check after a sync passes; what is sampled is the policy's; log-probs are untempered; a run ends as planned."""
    config = configured(untied, tmp_path, url=server.url)
    config["rollout"]["temperature"] = 1.3
    run = dualign.train(config, reward=vowels, quiet=True)
    records = metrics(run.folder)
    assert len(records) == 3 and all(r["sampler_gap"] / r["length"] < 1e-3 for r in records)
    assert run.summary is not None and command("verify", run.folder).code == 0
    for step in range(3):
        for row in run.batch(step).rows:
            ids = row.rollout.completion_ids
            assert (row.rollout.finish == "eos") == (ids[-1] == make_tokenizer().eos_token_id)
            assert len(ids) == len(row.rollout.sampler_logp) <= 24
    assert len({row.rollout.text for row in run.batch(0).rows}) > 12


def test_the_same_batch_twice_has_the_same_tokens(server, untied):
    sampler, policy = sampler_of(untied, server.url)
    sampler.sync(lambda: policy.model.state_dict().items())
    one, two = drawn(sampler), drawn(sampler)
    assert {i: row[0] for i, row in one.items()} == {i: row[0] for i, row in two.items()}
    assert len({row[0] for row in one.values()}) > 8
    cold = drawn(sampler, temperature=0.0)
    assert all(len({cold[g * 4 + k][0] for k in range(4)}) == 1 for g in range(4))


def test_old_weights_are_seen(server, untied, monkeypatch):
    sampler, policy = sampler_of(untied, server.url)
    loaded, load = [], Server.load

    def move_and_sync(lr: float) -> None:
        with torch.no_grad():
            for layer in policy.model.model.layers:
                layer.mlp.up_proj.weight.add_(lr * torch.randn_like(layer.mlp.up_proj.weight))
        sampler.sync(lambda: policy.model.state_dict().items())

    async def remember(self, folder):
        loaded.append(folder)
        await load(self, folder)

    monkeypatch.setattr(Server, "load", remember)
    move_and_sync(0.01)
    drawn(sampler, 1, 1)
    move_and_sync(0.01)

    async def the_one_before(self, folder):
        await load(self, loaded[-1])

    monkeypatch.setattr(Server, "load", the_one_before)
    with pytest.raises(StopRun, match=r"old weights|not have the policy's weights"):
        move_and_sync(0.002)
    monkeypatch.setattr(Server, "load", load)
    move_and_sync(0.002)
    assert len(drawn(sampler, 1, 2)) == 2


@pytest.mark.slow
def test_two_processes_with_shares_of_the_policy(untied, tmp_path):
    """A server of the run's own gets weights that no process holds as a whole; they are checked after every sync."""
    serve = {"serve": True, "python": str(PYTHON), "max_model_len": 512, "gpu_memory": 0.1, "args": ["--enforce-eager"]}
    config = configured(untied, tmp_path, **serve) | {"reward": [reward_file()]}
    config["train"] |= {"shard": "full", "online_batches": 2}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    done = launch(recipe, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    records = metrics(tmp_path / "run")
    assert len(records) == 2 and all(r["sampler_gap"] / r["length"] < 1e-3 for r in records)
    assert records[-1]["kl"] > 0 and command("verify", tmp_path / "run").code == 0


@pytest.mark.slow
def test_adapters_alone_are_sent(lora_server, tied, tmp_path):
    config = configured(tied, tmp_path, url=lora_server.url)
    config["model"]["lora"] = {"r": 4}
    config["train"]["lr"] = 1e-2
    run = dualign.train(config, reward=vowels, quiet=True)
    assert all(r["sampler_gap"] / r["length"] < 1e-3 for r in metrics(run.folder))
    assert metrics(run.folder)[-1]["kl"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="of vLLM's CPU build")
def test_tied_embeddings_that_do_not_arrive_are_refused(lora_server, tied, tmp_path):
    with pytest.raises(UserError, match="does not take the weights"):
        dualign.train(configured(tied, tmp_path, url=lora_server.url), reward=vowels, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_server_costs_no_label(server, untied, tmp_path):
    """Killed within the second batch: the run stops and keeps what was drawn; with a server of its own it ends."""
    reward, log = tmp_path / "reward.py", tmp_path / "labels"
    reward.write_text(
        "def score(completions, id, **columns):\n"
        f"    with open({str(log)!r}, 'a') as log:\n"
        "        log.writelines(f'{i} {ascii(c[0][\"content\"])}\\n' for c, i in zip(completions, id))\n"
        "    return [float(len(set(c[0]['content']))) for c in completions]\n"
    )
    config = configured(untied, tmp_path, url=server.url, concurrency=2)
    config["reward"] = [{"type": "function", "path": f"{reward}:score"}]
    config["data"]["eval"] = None
    config["rollout"]["max_new_tokens"] = 200
    batches = tmp_path / "run" / "batches"

    def kill() -> None:
        while sum(f.read_bytes().count(b'"index"') for f in batches.glob("000001.*.journal")) < 4:
            time.sleep(0.01)
        os.killpg(server._process.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(StopRun, match="a resume draws those that are missing"):
        dualign.train(config, quiet=True)
    assert len(log.read_text().splitlines()) == 16  # the first batch's
    records, _ = lines.read(next(batches.glob("000001.*.journal")))
    kept = {record["index"]: record["ids"] for record in records if "index" in record}
    options = f"rollout.options={{serve: true, python: '{PYTHON}', max_model_len: 512, gpu_memory: 0.1, args: [--enforce-eager]}}"
    resumed = command("resume", tmp_path / "run", options)
    assert resumed.code == 0, resumed.text
    run = dualign.Run.open(tmp_path / "run")
    assert run.steps() == [0, 1, 2] and len(log.read_text().splitlines()) == 48
    rows = {row.rollout.index: list(row.rollout.completion_ids) for row in run.batch(1).rows}
    assert 3 <= len(kept) < 16 and all(rows[index] == ids for index, ids in kept.items())


def test_a_judge_of_ones_own(untied, tmp_path):
    """vLLM is started for a reward, answers under the name that stands for its weights, and ends with the run."""
    serve = {"model": "smollm2-135m-instruct", "python": str(PYTHON), "dtype": "float32", "gpu_memory": 0.1,
             "max_model_len": 2048, "args": ["--enforce-eager"]}  # fmt: skip
    config = tree(untied, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1, max_absent=1.0)
    config["data"]["eval"] = None
    judge = {"type": "judge", "rubric": "helpfulness", "serve": serve, "max_tokens": 8}
    config["reward"] = [judge | {"cache": str(tmp_path / "labels.sqlite")}]
    run = dualign.train(config, quiet=True)
    labels = [row.label for row in run.batch(0).rows]
    assert run.summary is not None and any(label.value is not None for label in labels)
    assert all(1 <= label.value <= 10 if label.value is not None else label.note for label in labels)
    assert len(list(run.folder.glob("server-smollm2-135m-instruct-*.log"))) == 1

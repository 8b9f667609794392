"""vLLM as the sampler, against a server that speaks its protocol with a small model behind it: what is handed over and
checked, what is refused before work is lost, and what a server's faults cost. tests/vllm has the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

import dualign
from command import dualign as command
from conftest import save_tiny
from dualign.common import lines
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Prompt
from dualign.config import build
from dualign.models.load import load_model
from dualign.models.policy import Policy
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling, seed_of
from dualign.rollout.settings import VLLMSettings
from dualign.rollout.vllm.sampler import VLLMSampler
from fake_vllm import FakeVLLM, interpreter
from runs_common import launch, metrics, reward_file, tree, vowels, weights, write_prompts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A model whose head is not its embedding."""
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path_factory.mktemp("untied"), "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.1)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return folder


def configured(model: Path, folder: Path, name: str = "run", **options) -> dict:
    config = tree(model, write_prompts(folder), folder / name, {"name": "dar"}, lr=1e-2)
    config["rollout"] |= {"engine": "vllm", "options": options}
    config["rollout"]["max_new_tokens"], config["eval"] = 8, {"prompts": 4}
    config["train"] |= {"online_batch": 8, "update_size": 4}
    return config


def sampler_of(model: Path, **options) -> tuple[VLLMSampler, Policy]:
    hf, tokenizer = load_model(ModelConfig(name=str(model), precision="fp32"))
    policy = Policy(hf, "fp32")
    return VLLMSampler(VLLMSettings(**options), policy, tokenizer), policy


def drawn(sampler: VLLMSampler, prompts: int = 3, k: int = 4, held=(), batch: int = 0) -> dict[int, tuple]:
    ids = sampler.tokenizer.prompt(Prompt("p", "say something"))
    requests = [Request(g, Prompt(f"p{g}", "say something"), ids) for g in range(prompts)]
    found: dict[int, tuple] = {}

    def done(rollout):
        assert rollout.index not in found
        found[rollout.index] = rollout.completion_ids, rollout.sampler_logp

    sampler.sample(requests, Sampling(k, 8, 1.3), (7, batch), done, held)
    return found


# --- what it does ---


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_samples_from_the_weights_of_each_batch(tied, tiny, untied, tmp_path):
    """The server's log-probs are those of the policy that the batch is weighted by, to rounding, batch after batch."""
    model = tiny if tied else untied
    with FakeVLLM(model) as server:
        run = dualign.train(configured(model, tmp_path, url=server.url), reward=vowels, quiet=True)
        assert server.calls["collective_rpc"] == 1 + 4  # a trial, three batches, the last evaluation
        assert not list((tmp_path / "cache" / "weights").iterdir())
    records = metrics(run.folder)
    assert [r["sampler_gap"] < 1e-3 for r in records] == [True] * 3
    first, last = (run.batch(i).rows for i in (0, 2))
    logp = [r.rollout.sampler_logp for r in (*first, *last)]
    assert all(len(row) for row in logp)
    stored = {name: value for name, value in weights(run.folder).items() if "embed" in name}
    assert any(not torch.equal(v, server.model.state_dict()["model.embed_tokens.weight"] * 0) for v in stored.values())
    assert command("verify", run.folder).code == 0


def test_a_rows_tokens_depend_on_its_seed_alone(tiny):
    """Twice the same; every row its own; another batch others; what is held is not drawn."""
    with FakeVLLM(tiny) as server:
        sampler, policy = sampler_of(tiny, url=server.url)
        sampler.sync(lambda: policy.model.state_dict().items())
        one, two = drawn(sampler), drawn(sampler)
        assert one == two and len({ids for ids, _ in one.values()}) > 6
        assert drawn(sampler, batch=1) != one
        before = len(server.asked)
        assert drawn(sampler, held={0, 1, 2, 5}) == {i: row for i, row in one.items() if i not in (0, 1, 2, 5)}
        assert len(server.asked) - before == 8
    body = server.asked[0]
    assert {asked["seed"] for asked in server.asked[:12]} == {seed_of((7, 0), row) for row in range(12)}
    assert body["stop_token_ids"] == sorted(sampler.tokenizer.eos_ids)
    assert body["n"] == 1 and body["top_k"] == -1 and body["repetition_penalty"] == 1 and body["min_p"] == 0
    assert len({seed_of((run, batch), row) for run in (0, 1) for batch in (0, 1) for row in range(9)}) == 36


def test_adapters_alone_are_sent(tiny, tmp_path):
    config = configured(tiny, tmp_path, url="")
    config["model"]["lora"] = {"r": 4}
    config["data"]["eval"] = None
    with FakeVLLM(tiny) as server:
        config["rollout"]["options"] = {"url": server.url}
        run = dualign.train(config, reward=vowels, quiet=True)
        assert server.calls["v1/load_lora_adapter"] == 3 and not server.calls["collective_rpc"]
    assert [r["sampler_gap"] < 1e-2 for r in metrics(run.folder)] == [True] * 3
    assert {body["model"] for body in server.asked} == {"policy"}
    said = command("export", run.folder, "--out", tmp_path / "adapter").out
    assert "an adapter of" in said and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "merged" in command("export", run.folder, "--merge", "--out", tmp_path / "whole").out
    hf, tokenizer = load_model(ModelConfig(name=str(tmp_path / "whole")))
    merged, _ = load_model(ModelConfig(name=str(run.checkpoint())))
    ids = torch.tensor([tokenizer.prompt(Prompt("p", "say something"))])
    assert torch.allclose(hf(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)
    assert command("export", run.folder, "--out", tmp_path / "whole").code == 2


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_processes_share_servers_and_weights(shard, tiny, tmp_path):
    with FakeVLLM(tiny) as one, FakeVLLM(tiny) as two:
        place = tmp_path / "weights"
        config = configured(tiny, tmp_path, url=[one.url, two.url], weights_dir=str(place))
        config["reward"] = [reward_file()]
        config["train"]["shard"] = shard
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(config))
        done = launch(recipe, processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert one.calls["collective_rpc"] == two.calls["collective_rpc"] == 5
        assert len(one.asked) == len(two.asked) == (3 * 8 + 2 * 4) // 2
    assert list(place.iterdir()) == []  # one process writes and removes, the other leaves nothing
    assert [r["sampler_gap"] < 1e-3 for r in metrics(tmp_path / "run")] == [True] * 3


def test_two_processes_both_draw_from_the_adapter(tiny, tmp_path):
    with FakeVLLM(tiny) as server:
        config = configured(tiny, tmp_path, url=server.url) | {"reward": [reward_file()]}
        config["model"]["lora"] = {"r": 4}
        config["train"] |= {"shard": "full", "online_batches": 1}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(config))
        done = launch(recipe, processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {body["model"] for body in server.asked} == {"policy"}


# --- what is refused before work is lost ---


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (["no_dev"], "VLLM_SERVER_DEV_MODE=1"),
        (["other_tokens"], "another tokenizer"),
        (["stale"], "it does not take the weights"),
        (["old_head"], "leaves its embedding or head"),
        (["no_ids"], "its vLLM is too old"),
        (["caps"], "--generation-config vllm"),
    ],
)
def test_a_server_that_is_not_fit_is_refused(faults, words, tiny, tmp_path):
    with FakeVLLM(tiny, *faults) as server:
        config = configured(tiny, tmp_path, url=server.url)
        with pytest.raises(UserError, match=words):
            dualign.train(config, reward=vowels, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_server_with_another_model_is_refused(tiny, tmp_path):
    other = save_other(tmp_path / "other")
    with FakeVLLM(other) as server, pytest.raises(UserError, match="size mismatch"):
        dualign.train(configured(tiny, tmp_path, url=server.url), reward=vowels, quiet=True)
    assert not (tmp_path / "run").exists()


def save_other(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    save_tiny(folder, "llama")
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size = 40
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_server_that_is_not_there_is_refused(tiny, tmp_path):
    config = configured(tiny, tmp_path, url="http://127.0.0.1:9", timeout=5.0)
    with pytest.raises(UserError, match=r"127.0.0.1:9: cannot be reached"):
        dualign.train(config, reward=vowels, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_context_that_is_too_small_is_refused(tiny, tmp_path):
    with FakeVLLM(tiny, context=18) as server, pytest.raises(UserError, match="exceed the sampler's context of 18"):
        dualign.train(configured(tiny, tmp_path, url=server.url), reward=vowels, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "more", "words"),
    [
        ({}, {}, "needs url .* or serve: true"),
        ({"url": "http://localhost:1", "serve": True}, {}, "needs url .* or serve: true"),
        ({"url": "localhost:1"}, {}, "is not a URL"),
        ({"url": "http://me:secret@localhost:1"}, {}, "holds a password"),
        ({"url": "http://localhost:1", "api_key_env": "sk-abc"}, {}, "never the key itself"),
        ({"url": "http://localhost:1"}, {"log_probs": "recorded"}, "rollout.log_probs=recomputed"),
        ({"url": "http://localhost:1", "tensor_paralel": 2}, {}, "did you mean rollout.options.tensor_parallel"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, more, words, tiny, tmp_path):
    config = configured(tiny, tmp_path, **options)
    config["rollout"] |= more
    with pytest.raises(UserError, match=words) as refused:
        build(config)
    assert "secret" not in str(refused.value) and "sk-abc" not in str(refused.value)


def test_a_dry_run_says_what_samples_and_what_is_missing(tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(configured(tiny, tmp_path, serve=True) | {"reward": [reward_file()]}))
    said = command("train", recipe, "--dry-run")
    assert (
        said.code == 2 and "sampler: vLLM, a server of the run's own" in said.out and "dualign vllm-setup" in said.err
    )
    far = command("train", recipe, "rollout.options={url: 'http://gpu7:8000'}", "--dry-run")
    assert far.code == 2 and "gpu7:8000 is on another machine; name a folder" in far.err
    near = command("train", recipe, "rollout.options={url: 'http://gpu7:8000', weights_dir: /tmp}", "--dry-run")
    assert near.code == 0 and "sampler: vLLM at http://gpu7:8000" in near.out


def test_a_key_is_sent_and_never_shown(tiny, tmp_path, monkeypatch):
    with FakeVLLM(tiny, key="sk-verysecret") as server:
        monkeypatch.setenv("VLLM_API_KEY", "sk-verysecret")
        sampler, policy = sampler_of(tiny, url=server.url)
        sampler.sync(lambda: policy.model.state_dict().items())
        assert len(drawn(sampler)) == 12
        monkeypatch.setenv("VLLM_API_KEY", "sk-otherwise")
        with pytest.raises(UserError, match="HTTP 401") as refused:
            sampler_of(tiny, url=server.url)
    assert "otherwise" not in str(refused.value) and refused.value.__cause__ is None


# --- what a server's faults cost ---


def test_a_server_that_keeps_old_weights_stops_the_run(tiny):
    """However little the policy has moved, and whichever weights of before they are."""
    with FakeVLLM(tiny) as server:
        sampler, policy = sampler_of(tiny, url=server.url)

        def move_and_sync():
            with torch.no_grad():
                policy.model.model.layers[0].mlp.up_proj.weight.add_(0.0005)
            sampler.sync(lambda: policy.model.state_dict().items())

        move_and_sync()
        drawn(sampler)
        first = server.model.state_dict()
        first = {name: value.clone() for name, value in first.items()}
        move_and_sync()
        server.faults.add("stale")
        with pytest.raises(StopRun, match="it has old weights"):
            move_and_sync()
        server.model.load_state_dict(first)  # those before last
        with pytest.raises(StopRun, match="it has old weights"):
            move_and_sync()
        server.faults.clear()
        move_and_sync()
        assert len(drawn(sampler)) == 12
        with torch.no_grad():
            server.model.model.layers[1].mlp.up_proj.weight.mul_(3)  # somebody else's, behind our back
        with pytest.raises(StopRun, match="it does not have the policy's weights"):
            drawn(sampler)


def test_weights_that_did_not_change_are_no_fault(tiny):
    with FakeVLLM(tiny) as server:
        sampler, policy = sampler_of(tiny, url=server.url)
        for _ in range(3):
            sampler.sync(lambda: policy.model.state_dict().items())
        assert len(drawn(sampler)) == 12


def rewarded(folder: Path) -> tuple[dict, Path]:
    """A reward that leaves a line for each label."""
    log = folder / "labels"
    (folder / "reward.py").write_text(
        "def score(completions, id, **columns):\n"
        f"    with open({str(log)!r}, 'a') as log:\n"
        "        for c, i in zip(completions, id):\n"
        "            print(i, hash(c[0]['content']), file=log)\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    return {"type": "function", "path": f"{folder / 'reward.py'}:score"}, log


@pytest.mark.parametrize(("fault", "within"), [("dies", 60.0), ("hangs", 5.0)])
def test_a_server_lost_within_a_batch_costs_nothing_that_was_drawn(fault, within, tiny, tmp_path):
    reward, _ = rewarded(tmp_path)
    config = configured(tiny, tmp_path, url="") | {"reward": [reward]}
    with FakeVLLM(tiny) as server:
        config["rollout"]["options"] = {"url": server.url, "concurrency": 2, "timeout": within}
        server.dies_after = 4 + 8 + 5 if fault == "dies" else None
        if fault == "hangs":
            config["data"]["eval"] = None

            def hang() -> None:
                while len(server.asked) < 8 + 5:
                    time.sleep(0.01)
                server.faults.add("hangs")

            threading.Thread(target=hang, daemon=True).start()
        with pytest.raises(StopRun, match=r"a resume draws those that are missing"):
            dualign.train(config, quiet=True)
    run = dualign.Run.open(tmp_path / "run")
    assert run.steps() == [0]
    records, _ = lines.read(next(run.batches.glob("000001.*.journal")))
    kept = {row["index"]: row["ids"] for row in records if "index" in row}
    assert 2 <= len(kept) < 8
    with FakeVLLM(tiny) as server:
        resumed = command("resume", run.folder, f"rollout.options.url={server.url}", "rollout.options.timeout=60.0")
        assert resumed.code == 0, resumed.text
        first = len(server.asked) - 8 - (0 if fault == "hangs" else 4)
        assert first == 8 - len(kept)  # of the batch in progress, only what was missing
    rows = {row.rollout.index: list(row.rollout.completion_ids) for row in run.batch(1).rows}
    assert all(rows[index] == ids for index, ids in kept.items()) and len(rows) == 8
    assert run.summary is not None and run.steps() == [0, 1, 2]


# --- a server of the run's own ---


def processes_of(script: Path) -> list[int]:
    """Living processes that run our stand-in for vLLM from that folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "environ").read_bytes() if (entry / "cmdline").read_bytes() else b""
            except OSError:
                continue
            if f"PYTHONPATH={script.parent / 'site'}".encode() in words:
                found.append(int(entry.name))
    return found


def test_a_server_of_ones_own_is_started_and_ended_and_started_again_where_it_dies(tiny, tmp_path):
    """Within a batch: with the weights that it had, for the rows that were not done."""
    script = interpreter(tmp_path, FAKE_DIES_ONCE=str(tmp_path / "died"))
    config = configured(tiny, tmp_path, serve=True, python=str(script), concurrency=2)
    config["data"]["eval"] = None
    seen = []

    def reward(completions, **columns):
        seen.extend([len(processes_of(script))] * len(completions))
        return vowels(completions, **columns)

    run = dualign.train(config, reward=reward, quiet=True)
    assert (tmp_path / "died").exists() and run.summary is not None
    assert seen == [1] * 24 and processes_of(script) == []  # no label twice
    assert [r["sampler_gap"] < 1e-3 for r in metrics(run.folder)] == [True] * 3
    (log,) = (tmp_path / "cache" / "weights").iterdir()
    assert log.read_text().count("fake vLLM") == 2


def test_a_server_that_does_not_start_says_why(tiny, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no free memory for weights\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(UserError, match=r"ended as it started \(exit code 1\)(.|\n)*no free memory for weights"):
        dualign.train(configured(tiny, tmp_path, serve=True, python=str(script)), reward=vowels, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_killed_run_takes_its_server_along_and_the_next_one_its_weights(tiny, tmp_path):
    script = interpreter(tmp_path)
    (tmp_path / "slow.py").write_text("import time\ndef score(completions, **columns):\n    time.sleep(60)\n")
    config = configured(tiny, tmp_path, serve=True, python=str(script))
    config["reward"] = [{"type": "function", "path": f"{tmp_path / 'slow.py'}:score"}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    started = launch(recipe, wait=False)
    place = tmp_path / "cache" / "weights"
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "run").glob("evaluations/*.journal")) or not processes_of(script):
            assert started.poll() is None and time.monotonic() < until, started.communicate()
            time.sleep(0.1)
        assert len(processes_of(script)) == 1 and len(list(place.iterdir())) == 2
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
    until = time.monotonic() + 30
    while processes_of(script) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(script) == []
    with FakeVLLM(tiny) as server:
        sampler, _ = sampler_of(tiny, url=server.url)
        assert [p.name for p in place.iterdir()] == [sampler.folders.place.name]
        sampler.close()


def test_setup_says_what_failed(tmp_path):
    said = command("vllm-setup", "--python", sys.executable + "x", "--into", tmp_path / "env", "--cpu")
    assert said.code == 2 and "cannot be run" in said.err and not (tmp_path / "env").exists()
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no room here >&2\nexit 3\n")
    broken.chmod(0o755)
    assert subprocess.run([broken], capture_output=True).returncode == 3
    said = command("vllm-setup", "--python", broken, "--into", tmp_path / "env", "--cpu")
    assert said.code == 2 and "could not make the environment" in said.err and "no room here" in said.err

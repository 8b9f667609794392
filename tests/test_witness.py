"""A witness: what it is asked, what it says and when, and that it never costs a run anything."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import dualign
from command import dualign as command
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Label, Prompt, Rollout
from dualign.config import build
from dualign.config.sections import WitnessConfig
from dualign.run import parting
from dualign.run.batch import Row
from dualign.run.folder import Run
from dualign.run.witness import Look, Witnessed, chosen, look_of, planned, read
from dualign.training.resume import resumed_config
from dualign.training.witness import Asking
from runs_common import metrics, tree, vowels, weights, write_prompts
from simulated_witness import CASES, fallen, first_spoken

FUNCTIONS = """
def share(completions, of):
    return [sum(ch in of for ch in c[0]["content"]) / max(1, len(c[0]["content"])) for c in completions]

def against(completions, **columns):
    return [-v for v in share(completions, "aeiou")]

def agrees(completions, **columns):
    return share(completions, "aeiou")

def breaks(completions, **columns):
    raise RuntimeError("no such luck")

def some(completions, **columns):
    return [None if i % 3 == 0 else float(i % 5) for i in range(len(completions))]
"""


def config(tiny, folder, name="against", batches=3, witness=(), **train):
    (folder / "witnesses.py").write_text(FUNCTIONS)
    found = tree(tiny, write_prompts(folder, 24), folder / "run", {"name": "dar", "alpha": 0.1, "beta": 0.3})
    found["train"] |= {"online_batches": batches, "online_batch": 32, "update_size": 16} | train
    reward = {"type": "function", "path": f"{folder}/witnesses.py:{name}"}
    return found | {"witness": {"reward": reward, "every": 2, "sample": 8} | dict(witness)}


# --- the test ---


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_false_alarms_over_a_thousand_runs_stay_within_alpha(case):
    spoke = np.isfinite(first_spoken(case, runs=1000, seed=1)).mean()
    assert spoke <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1000)


def test_it_speaks_where_the_witness_falls():
    assert np.isfinite(first_spoken(fallen(1.0, gradual=False), runs=300, seed=2)).mean() > 0.95
    gradual = first_spoken(fallen(2.0, gradual=True), runs=300, seed=2)
    assert np.isfinite(gradual).mean() > 0.95 and np.nanmedian(gradual) > 0.2  # not before there is something to see


def test_p_values_are_those_of_scipy():
    from scipy import stats

    rng = np.random.default_rng(0)
    now, then = rng.normal(-0.5, 1, 30), rng.normal(0, 2, 40)
    missing = np.append(now, [np.nan, np.nan])
    expected = stats.ttest_ind(now, then, equal_var=False, alternative="less").pvalue
    assert parting.below(missing, then) == pytest.approx(expected, rel=1e-9)
    assert parting.below_zero(missing) == pytest.approx(stats.ttest_1samp(now, 0, alternative="less").pvalue, rel=1e-9)
    assert parting.below(now[:7], then) == 1  # too few prompts
    assert parting.below(np.ones(20), np.ones(20) + 1e-13) == 1  # rounding is no difference
    assert parting.parted(now, then, now, then) == pytest.approx(1 - expected, rel=1e-9)  # the reward fell as well


@pytest.mark.parametrize("looks", [1, 9, 40])
def test_levels_never_add_up_to_more_than_alpha_however_often_a_run_is_prolonged(looks):
    spent = 0.0
    for _ in range(5):
        for to_come in range(looks, 0, -1):
            spent += parting.level(0.05, spent, to_come)
        assert spent < 0.05


# --- what it is asked ---


def rows(reward, prompts=16, k=4, of="train"):
    return [
        Row(
            Rollout(g * k + i, g, Prompt(f"{of}{g}", f"{of} {g}"), (1,), (2,), f"{g} {i}", "eos", ()),
            Label(reward(g, i)),
        )
        for g in range(prompts)
        for i in range(k)
    ]


def settings(**more):
    return WitnessConfig.model_validate({"reward": [{"type": "head"}], **more})


def test_a_sample_has_every_prompt_before_it_has_one_twice():
    s, all_rows = settings(sample=20), rows(lambda g, i: 0.0)
    groups = [row.rollout.group for row in chosen(all_rows, "batch", 4, s, seed=0)]
    assert len(groups) == 20 and set(groups) == set(range(16)) and max(map(groups.count, groups)) == 2
    assert len(chosen(all_rows, "batch", 0, s, seed=0)) == 64  # four times as many of π_0's, and no more than there are
    assert (
        chosen(all_rows, "batch", 4, s, 0) == chosen(all_rows, "batch", 4, s, 0) != chosen(all_rows, "batch", 6, s, 0)
    )
    held = [[row.rollout.index for row in chosen(all_rows, "heldout", at, s, 0)] for at in (0, 8)]
    assert held[0] == held[1]


def test_a_look_compares_prompts_and_leaves_out_absent_labels():
    s = settings(sample=16)
    seen = Witnessed(None)
    for step, fall in ((0, 0.0), (4, 2.0), (8, 2.0)):
        batch = rows(lambda g, i, up=fall: up + g / 8 + i, of=f"at {step}, ")
        asked = chosen(batch, "batch", step, s, seed=0)
        labels = {
            row.rollout.index: Label.absent("lost")
            if row.rollout.group == 3
            else Label((row.rollout.group % 5) / 5 - fall)
            for row in asked
        }
        look = look_of("batch", step, "w", batch, labels, seen, 0.01)
        seen = Witnessed(None, [*seen.looks, look])
    first, _, last = seen.looks
    assert first.test is None and first.record()["witness_absent"] == 4
    assert last.test.prompts_0 == 15 and last.test.prompts == 15  # a second batch would make more than π_0 has
    assert last.spoke and last.test.witness_0 - last.test.witness == pytest.approx(2, abs=0.01)
    assert last.test.reward - last.test.reward_0 == pytest.approx(2)


def test_a_preference_cannot_be_a_witness(tiny, tmp_path):
    c = config(tiny, tmp_path)
    c["witness"]["reward"] = {
        "type": "preference",
        "rubric": "helpfulness",
        "base_url": "http://127.0.0.1:9/v1",
        "model": "m",
    }
    with pytest.raises(UserError, match="its mean never changes"):
        build(c)
    c["witness"]["reward"] = {"type": "head", "pth": "x"}
    with pytest.raises(UserError, match=r"witness\.reward\.0\.pth: no such key.*did you mean"):
        build(c)


def test_what_a_killed_look_had_bought_is_not_bought_again(tmp_path):
    (tmp_path / "counted.py").write_text(
        f"def counted(completions, **columns):\n    open({str(tmp_path / 'calls')!r}, 'a').write('x')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    s = settings(reward=[{"type": "function", "path": f"{tmp_path}/counted.py:counted"}])
    plan = [("batch", 0), ("batch", 4)]

    def killed(path, text):
        raise KeyboardInterrupt

    for put in (killed, lambda path, text: path.write_text(text)):
        asking = Asking(s, 0, plan, tmp_path / "witness", put)
        try:
            asking.look("batch", 0, rows(lambda g, i: 0.0), lambda: None)
        except KeyboardInterrupt:
            assert not asking.seen.looks and list((tmp_path / "witness").glob("*.journal"))
    assert (tmp_path / "calls").read_text() == "x" and not list((tmp_path / "witness").glob("*.journal"))
    (look,) = read(tmp_path / "witness").looks
    assert len(look.labels) == 64 and not asking.due("batch", 0) and asking.due("batch", 4)


# --- runs ---


def test_a_witness_changes_no_weight_and_is_shown_everywhere(tiny, tmp_path):
    plain = config(tiny, tmp_path)
    del plain["witness"]
    plain["run"] = {**plain["run"], "dir": str(tmp_path / "plain")}
    other = dualign.train(plain, reward=vowels, quiet=True)
    assert not (other.folder / "witness").exists() and "witness" not in other.summary
    assert "witness:" not in other.config_file.read_text() and "witness" not in other.metrics()[0]["seconds"]
    with pytest.raises(UserError, match="no witness of its own"):
        other.witness()
    none = command("witness", other.folder)
    assert none.code == 2 and "--set" in none.err
    run = dualign.train(config(tiny, tmp_path), reward=vowels, quiet=True)
    held, as_before = weights(run.folder), weights(other.folder)
    assert held.keys() == as_before.keys() and all(torch.equal(held[name], as_before[name]) for name in held)
    told = metrics(run.folder)
    assert [("witness" in record) for record in told] == [True, False, True]
    assert told[0]["witness_n"] == 32 and told[2]["witness_n"] == 8
    found = run.witness()
    assert [(look.kind, look.step) for look in found.looks] == planned(run.config, run.config.witness)
    assert run.summary["witness"]["batches"]["0"]["witness"] == pytest.approx(told[0]["witness"])
    by_index = {row.rollout.index: row.rollout.text for row in run.batch(2).rows}
    for index, label in found.batches[2].labels.items():
        text = by_index[index]
        assert label.value == pytest.approx(-sum(ch in "aeiou" for ch in text) / max(1, len(text)))
    assert run.checkpoint("best") in run.saved()
    verified = command("verify", run.folder)
    assert verified.code == 0, verified.out
    file = run.witness_dir / "batch-000002.json"
    file.write_text(file.read_text().replace("against", "another"))
    assert "batch-000002.json" in command("verify", run.folder).out


def test_it_stops_a_run_once_and_a_resume_goes_on_and_the_report_shows_it(tiny, tmp_path):
    c = config(tiny, tmp_path, batches=8, witness={"stop": True, "sample": 32}, lr=1e-2)
    with pytest.raises(StopRun, match="stopped by the witness in online batch") as stopped:
        dualign.train(c, reward=vowels, quiet=True)
    assert stopped.value.exit_code == 3
    run = Run.open(c["run"]["dir"])
    at = run.witness().spoke.step
    assert 0 < at < 8 and len(metrics(run.folder)) == at
    run = dualign.train(resumed_config(run.folder, []), reward=vowels, resume=True, quiet=True)
    assert len(metrics(run.folder)) == 8 and run.summary["witness"]["spoke"]["step"] == at
    made = command("report", run.folder)
    assert made.code == 0, made.err
    page = (run.folder / "report" / "index.html").read_text()
    assert "reward and witness part" in page and 'id="figure-witness"' in page
    rows_ = (run.folder / "report" / "figures" / "witness.csv").read_text().splitlines()
    assert any(line.split(",")[1:3] == ["witness", "batch"] for line in rows_)
    assert any(line.split(",")[1] == "reward" for line in rows_)


def test_a_witness_that_breaks_does_not_cost_the_run(tiny, tmp_path):
    run = dualign.train(config(tiny, tmp_path, "breaks"), reward=vowels, quiet=True)
    (look,) = run.witness().looks
    assert {label.value for label in look.labels.values()} == {None}
    assert all("no such luck" in label.reason for label in look.labels.values())
    assert len(metrics(run.folder)) == 3 and run.summary["witness"]["best"] is None


def test_absent_labels_are_counted_with_their_reasons(tiny, tmp_path):
    run = dualign.train(config(tiny, tmp_path, "some"), reward=vowels, quiet=True)
    record = metrics(run.folder)[0]
    assert record["witness_n"] + record["witness_absent"] == 32 and record["witness_absent"] == 11
    assert sum(run.summary["witness"]["absent"].values()) == sum(
        look.record()["witness_absent"] for look in run.witness().looks
    )


def test_a_resume_asks_nothing_twice_and_notices_another_witness(tiny, tmp_path, monkeypatch):
    c = config(tiny, tmp_path, batches=2)
    run = dualign.train(c, reward=vowels, quiet=True)
    before = {path.name: path.read_bytes() for path in run.witness_dir.glob("batch-*")}
    run = dualign.train(resumed_config(run.folder, ["train.online_batches=4"]), reward=vowels, resume=True, quiet=True)
    assert [look.step for look in run.witness().looks if look.kind == "batch"] == [0, 2]
    assert all((run.witness_dir / name).read_bytes() == held for name, held in before.items())
    with pytest.raises(UserError, match=r"witness\.every cannot change"):
        resumed_config(run.folder, ["witness.every=1"])
    assert resumed_config(run.folder, ["witness.stop=true"]).witness.stop
    (tmp_path / "witnesses.py").write_text(FUNCTIONS + "\nX = 1\n")
    with pytest.raises(UserError, match=r"witness\.reward\.0\.path: .*changed"):
        dualign.train(resumed_config(run.folder, ["train.online_batches=5"]), reward=vowels, resume=True, quiet=True)


def test_the_best_checkpoint_is_kept(tiny, tmp_path):
    c = config(tiny, tmp_path, batches=8, witness={"sample": 32}, lr=1e-2)
    c["run"] |= {"checkpoints": 4, "keep_last": 1}
    run = dualign.train(c, reward=vowels, quiet=True)
    looks = run.witness().batches
    best = run.checkpoint("best")
    rated = {step: looks[step].record()["witness"] for step in (2, 4, 6)}
    assert int(best.name) == max(rated, key=rated.get) and best != run.saved()[-1]
    out = command("export", run.folder, "--best", "--out", tmp_path / "out")
    assert out.code == 0 and str(best) in out.out and (tmp_path / "out" / "model.safetensors").exists()


def test_of_checkpoints_that_one_look_rates_the_nearest_is_the_best():
    looks = [Look("heldout", step, "w", {}, {"p": (0.0, value)}) for step, value in ((0, 0.0), (2, 2.0), (4, 1.0))]
    assert [Witnessed(None, looks).best(steps)[0] for steps in ([1, 2, 3, 4], [1, 3], [3, 4])] == [2, 1, 3]


# --- afterwards ---


def test_asked_afterwards_it_says_what_it_would_have_said(tiny, tmp_path):
    c = config(tiny, tmp_path)
    run = dualign.train(c, reward=vowels, quiet=True)
    path = c["witness"]["reward"]["path"]
    asking = ("witness", run.folder, "--set", "type=function", "--set", f"path={path}", "--every", "2", "--sample", "8")
    said = command(*asking, "--name", "later")
    assert said.code == 0 and "witness against" in said.out, said.err
    later = Run.open(run.folder).witness("later")
    assert [(look.step, look.labels, look.test) for look in later.looks] == [
        (look.step, look.labels, look.test) for look in run.witness().looks
    ]
    assert command("verify", run.folder).code == 0
    typed = said.out.split("; dualign ")[1].split("\n")[0].split()  # the export that it names
    assert command(*typed, "--out", tmp_path / "out").code == 0
    again = command(*asking, "--name", "later", "--json")  # all looks are there: nothing is asked
    told = json.loads(again.out)
    assert Path(told["folder"]) == run.folder / "witness-later" and "looks: " in again.err
    assert told["batches"] == run.summary["witness"]["batches"] and told["best"] == run.summary["witness"]["best"]
    other = command(*asking[:-1], "4", "--name", "later")
    assert other.code == 2 and "--name" in other.err


def test_a_dry_run_tells_what_a_witness_needs(tiny, tmp_path):
    c = config(tiny, tmp_path)
    c["reward"] = [{"type": "function", "path": f"{tmp_path}/witnesses.py:agrees"}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(c))
    said = command("train", recipe, "--dry-run")
    assert said.code == 0 and "witness: at most" in said.out, said.err
    c["witness"]["reward"]["path"] += "_not"
    recipe.write_text(yaml.safe_dump(c))
    said = command("train", recipe, "--dry-run")
    assert said.code == 2 and "witness.reward.0" in said.err

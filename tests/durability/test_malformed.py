"""Inputs that are wrong in many ways: each ends in a sentence that names the place, with the right exit code. What is
raised past `main` would fail these tests by itself."""
# ruff: noqa: E501, PT017  (tables)

import gzip
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dualign
from command import dualign as command
from dualign.common.errors import UserError
from dualign.common.yaml_text import parse_yaml
from dualign.config import build, dump
from dualign.data.rows import load_examples, load_prompts
from dualign.run.folder import Run
from dualign.run.replay import replay, stored
from runs_common import metrics, reward_file, tree, write_prompts


def clear(said, *words, code=2):
    assert said.code == code, said.text
    assert ("Traceback" not in said.text and said.err.startswith("dualign: ")) or "Usage" in said.err, said.text
    assert len(said.err) < 1500
    for word in words:
        assert word in said.text, said.text


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A recipe that is right, and its folder."""
    folder = tmp_path_factory.mktemp("base")
    config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    return folder / "recipe.yaml"


# --- configurations ---

OVERRIDES = [
    ("train.lr=0", "train.lr"), ("train.lr=-1", "train.lr"), ("train.lr=fast", "train.lr"), ("train.lr=null", "train.lr"),
    ("train.lr=[1]", "train.lr"), ("train.lr={a: 1}", "train.lr"), ("train.lr=true", "train.lr"), ("train.lr=.nan", "train.lr"),
    ("train.online_batches=-1", "train.online_batches"), ("train.online_batches=1.5", "train.online_batches"),
    ("train.online_batches=many", "train.online_batches"), ("train.online_batch=0", "train.online_batch"),
    ("train.online_batch=18", "no whole number of prompts"), ("train.update_size=10", "no whole number of prompts"),
    ("train.update_size=32", "more than train.online_batch"), ("train.micro_batch_tokens=1", "train.micro_batch_tokens"),
    ("train.optimizer=sgd", "train.optimizer"), ("train.warmup=-1", "train.warmup"), ("train.weight_decay=-1", "weight_decay"),
    ("train.max_grad_norm=0", "max_grad_norm"), ("train.max_absent=2", "max_absent"), ("train.learning_rate=1", "no such key"),
    ("train.critic_lr=0", "critic_lr"), ("train.prefix_sharing=maybe", "prefix_sharing"), ("train=5", "train"),
    ("train=null", "train"), ("train=[1, 2]", "train"), ("rollout.k=0", "rollout.k"), ("rollout.k=-3", "rollout.k"),
    ("rollout.k=two", "rollout.k"), ("rollout.k=1", "rollout.k"), ("rollout.temperature=-1", "rollout.temperature"),
    ("rollout.temperature=hot", "rollout.temperature"), ("rollout.top_p=0", "rollout.top_p"), ("rollout.top_p=1.1", "top_p"),
    ("rollout.max_new_tokens=0", "max_new_tokens"), ("rollout.max_new_tokens=100000", "context"),
    ("rollout.log_probs=none", "rollout.log_probs"), ("rollout.rows=0", "rollout.options.decode_batch_size"), ("rollout.engine=magic", "rollout.engine"), ("rollouts.k=4", "no such key"),
    ("algo.name=darr", "did you mean dar"), ("algo.name=null", "algo"), ("algo.alpha=2", "algo.alpha"),
    ("algo.alpha=-0.1", "algo.alpha"), ("algo.beta=0", "algo.beta"), ("algo.beta=-1", "algo.beta"), ("algo.w_clip=0", "w_clip"),
    ("algo.gamma=1", "no such key"), ("algo.alhpa=0.1", "did you mean algo.alpha"), ("algo.baseline=median", "baseline"),
    ("algo.skip_below=1", "skip_below"), ("algo=dar", "algo"), ("algo=7", "algo"), ("algo=[]", "algo"),
    ("model.name=null", "model.name"), ("model.name=/no/such/folder", "no such folder"), ("model.name=''", "model.name"),
    ("model.precision=fp8", "model.precision"), ("model.attention=flash", "model.attention"),
    ("model.chat_template=/no/such/file", "chat_template"), ("model.lora.r=0", "lora.r"), ("model.lora.dropout=1", "dropout"),
    ("model.lora=5", "model.lora"), ("data.train=/no/such/file.jsonl", "no such file"), ("data.train=null", "data.train"),
    ("data.train=5", "data.train"), ("data.train=builtin:nothing", "no such data"), ("data.eval=/no/file.jsonl", "no such file"),
    ("data.format=csv", "data.format"), ("data.prompt_column=question", "question"), ("data.max_prompt_tokens=0", "max_prompt"),
    ("data.max_prompt_tokens=1", "no prompts are left"), ("eval.prompts=0", "eval.prompts"), ("eval.every=-1", "eval.every"),
    ("eval.k=0", "eval.k"), ("run.seed=-1", "run.seed"), ("run.seed=99999999999", "run.seed"), ("run.seed=x", "run.seed"),
    ("run.checkpoints=0", "run.checkpoints"), ("run.keep_last=0", "keep_last"), ("run.trackers=[abacus]", "run.trackers"),
    ("run.dir=5", "run.dir"), ("run.dir=/dev/null/x", "run.dir"), ("run.dir=/proc/x", "run.dir"), ("reward=[]", "reward"),
    ("reward=5", "reward"), ("reward.0=5", "reward.0"), ("reward.7.weight=1", "no position"), ("reward.x.weight=1", "no position"),
    ("reward.0.type=functoin", "reward.0.type"), ("reward.0.path=5", "reward.0.path"), ("reward.0.path=nowhere", "nowhere"),
    ("reward.0.path=/no/such.py:f", "no such file"), ("reward.0.timeout=0", "timeout"), ("reward.0.weight=heavy", "weight"),
    ("nonsense", "key.sub=value"), ("=1", "key.sub=value"), ("train.lr.x=1", "train.lr"), ("a.b.c=1", "no such key"),
    ("train.lr=[", "not readable as YAML"), ("train.lr=!!python/name:os.system", "not readable as YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "word"), OVERRIDES)
def test_a_wrong_setting_is_named(override, word, base):
    clear(command("train", base, override), word)
    assert not (base.parent / "run").exists()  # and no run was begun


RECIPES = {
    "": "mapping", "5": "mapping", "- a\n- b\n": "mapping", "just text": "mapping", "null": "mapping",
    "model: [unclosed": "not readable as YAML", "a: b: c": "line 1", "\tmodel: x": "not readable", "a: &x [*x]": "",
    "model: {name: x}\n": "data: missing", "model: {name: x}\ndata: {train: y}\n": "train: missing", "base: nothing\n": "nothing",
    "1: 2\n": "1", "model: {1: 2}\n": "model", "? [a, b]\n: c\n": "", "base: [1]\n": "base", "base: 5\n": "5",
    "model: {name: x}\ndata: {train: y}\ntrain: {online_batches: 1}\nextra: 1\n": "extra: no such key",
    "run: {seed: 1}\nmodel: {name: x}\nrun: {dir: y}\n": "line 3: not readable as YAML: the key 'run' is given twice",
    "a: !!binary zz": "", "model: 2026-01-01\n": "model", "x: " + "[" * 200: "",
}  # fmt: skip


@pytest.mark.parametrize("text", RECIPES)
def test_a_wrong_recipe_is_named(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    clear(command("train", path, "--dry-run"), RECIPES[text])


@pytest.mark.parametrize("data", [b"\xff\xfe\x00bad", b"\x00" * 50, b"model: \x80"])
def test_a_recipe_that_is_no_text(data, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(data)
    clear(command("train", tmp_path / "recipe.yaml"), "recipe.yaml")


ARGUMENTS = [
    ["train"], ["train", "no_such_recipe"], ["train", "quickstrat"], ["resume"], ["resume", "/no/run"], ["verify"],
    ["verify", "/no/run"], ["replay", "/no/run"], ["what-if", "/no/run", "beta=1"], ["what-if", "/no/run"], ["trian"],
    ["sample"], ["train", "--no-such-option", "quickstart"], ["train", "/"], ["verify", "/dev/null"],
]  # fmt: skip


@pytest.mark.parametrize("argv", ARGUMENTS, ids=" ".join)
def test_a_wrong_command_line(argv):
    clear(command(*argv))


# --- data ---

LINES = {
    "": "no rows", "\n\n": "no rows", "{": "row 1", "[1]": "row 1", "5": "row 1", '"text"': "row 1", "null": "row 1",
    "{}": "row 1", '{"text": "a"}': "prompt", '{"prompt": ""}': "empty", '{"prompt": "  "}': "empty", '{"prompt": null}': "row 1",
    '{"prompt": 5}': "row 1", '{"prompt": []}': "empty", '{"prompt": [5]}': "message 1", '{"prompt": [{}]}': "message 1",
    '{"prompt": {"role": "user"}}': "row 1", '{"prompt": [{"role": "user"}]}': "message 1",
    '{"prompt": [{"role": "user", "content": 5}]}': "message 1", '{"prompt": [{"role": "user", "content": ""}]}': "empty",
    '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}': "assistant",
    '{"prompt": "a"}\n{"prompt"': "row 2", '{"prompt": "a"}\nnull': "row 2", '{"prompt": "a"}\n{"x": 1}': "row 2",
    '{"prompt": "a"}\n{"prompt": ["b"]}': "row 2", "{'prompt': 'a'}": "row 1", '{"prompt": "a",}': "row 1",
    '{"prompt": true}': "row 1", '{"prompt": "' + "x" * 3000 + '"}': "context",
}  # fmt: skip


@pytest.mark.parametrize("text", LINES, ids=range(len(LINES)))
def test_wrong_prompts_are_named(text, base, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    clear(command("train", base, f"data.train={path}", f"run.dir={tmp_path / 'run'}"), LINES[text])


FILES = {
    "a.jsonl": b"\xff\xfe", "b.jsonl.gz": b"not gzip", "c.jsonl.gz": gzip.compress(b'{"prompt": "a"}\n' * 200)[:40],
    "d.parquet": b"PAR1 no", "e.parquet": b"", "f.json": b"{}", "g.json": b"[", "h.json": b"5", "i.csv": b"prompt,a\nb\n",
    "j.json": b"[[1]]", "k.txt": b"hello", "l.jsonl": b'{"prompt": "\xc3\x28"}',
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_wrong_files_are_named(name, base, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    clear(command("train", base, f"data.train={tmp_path / name}", f"run.dir={tmp_path / 'run'}"), name)


PAIRS = {
    '{"prompt": "a"}': "chosen", '{"chosen": "a"}': "", '{"prompt": "a", "chosen": "b"}': "", '{"prompt": "a", "completion": "b"}': "pairs",
    '{"prompt": "a", "chosen": "", "rejected": "b"}': "chosen", '{"prompt": "a", "chosen": 1, "rejected": "b"}': "chosen",
    '{"prompt": "a", "chosen": "b", "rejected": null}': "rejected", '{"chosen": "abc", "rejected": "xyz"}': "in common",
    '{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "a"}]}': "",
}  # fmt: skip


@pytest.mark.parametrize("text", PAIRS, ids=range(len(PAIRS)))
def test_wrong_pairs_are_named(text, base, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    overrides = ("algo.name=offline_dpo", f"data.train={path}", "data.eval=null", f"run.dir={tmp_path / 'run'}")
    clear(command("train", base, *overrides), PAIRS[text])


# --- reward functions ---

REWARDS = {
    "return None": "NoneType", "return 5": "not a list", "return 'text'": "str", "return []": "0 values", "return [1.0]": "1 values",
    "return [1.0] * (len(completions) + 1)": "values for", "return ['1'] * len(completions)": "'1'",
    "return [True] * len(completions)": "True", "return [float('nan')] * len(completions)": "nan",
    "return [float('inf')] * len(completions)": "inf", "return [[1.0]] * len(completions)": "[1.0]",
    "return [1j] * len(completions)": "1j", "return {i: 1.0 for i in range(len(completions))}": "dict",
    "return (x for x in completions)": "generator", "raise ValueError('no')": "ValueError: no", "raise SystemExit(0)": "SystemExit",
    "return 1 / 0": "ZeroDivisionError", "return undefined": "NameError", "return completions[99999]": "IndexError",
    "raise KeyboardInterrupt": "KeyboardInterrupt", "return [10**400] * len(completions)": "",
}  # fmt: skip


@pytest.mark.parametrize("body", REWARDS)
def test_wrong_reward_functions_are_named(body, base, tmp_path):
    (tmp_path / "reward.py").write_text(f"def score(completions, **columns):\n    {body}\n")
    said = command("train", base, f"reward.0.path={tmp_path / 'reward.py'}:score", f"run.dir={tmp_path / 'run'}")
    clear(said, "score", REWARDS[body])


MODULES = {
    "def score(": "SyntaxError", "import no_such_module": "ModuleNotFoundError", "x = 1": "has no 'score'", "score = 5": "is no function",
    "raise RuntimeError('at import')": "at import", "def scroe(completions): pass": "did you mean", "": "has no 'score'",
    "def score(completions, answer): return [1.0] * len(completions)": "answer", "def score(): return []": "",
    "def score(completions, promptss): return []": "did you mean",
}  # fmt: skip


@pytest.mark.parametrize("text", MODULES, ids=range(len(MODULES)))
def test_wrong_reward_modules_are_named(text, base, tmp_path):
    (tmp_path / "reward.py").write_text(text)
    said = command("train", base, f"reward.0.path={tmp_path / 'reward.py'}:score", f"run.dir={tmp_path / 'run'}")
    clear(said, MODULES[text])


# --- run folders ---


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """A run that has batches, a checkpoint, and one more batch to go."""
    folder = tmp_path_factory.mktemp("stopped")
    config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    dualign.train(config, quiet=True)
    return folder / "run"


@pytest.mark.parametrize("seed", range(40))
def test_a_folder_damaged_at_random_is_never_believed(seed, stopped, tmp_path):
    """Some bytes of some file are changed, cut off or doubled. verify says so; replay and resume stop in words or are
    not touched by it, and give the numbers of the undamaged run."""
    draw = random.Random(seed)
    run = shutil.copytree(stopped, tmp_path / "run")
    file = draw.choice(sorted(p for p in run.rglob("*") if p.is_file() and p.name != ".lock" and p.stat().st_size))
    data = bytearray(file.read_bytes())
    at = draw.randrange(len(data))
    how = draw.choice(["flip", "cut", "double", "zeros"])
    if how == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "double":
        data[at:at] = data[: draw.randrange(1, len(data) + 1)]
    else:
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    changed = bytes(data) != file.read_bytes()
    file.write_bytes(bytes(data))
    said = command("verify", run)
    assert said.code == (1 if changed else 0) or (said.code == 2 and "config.yaml" in file.name), (file, how, said.text)
    resume = ["resume", run, "train.online_batches=4"]
    for argv in (["replay", run], ["what-if", run, "beta=1"], *([resume] if seed % 4 == 0 else [])):
        said = command(*argv)
        assert said.code in (0, 1, 2) and "Traceback" not in said.text, (file, how, said.text)
        if said.code == 0 and argv[0] == "replay":
            assert said.out.count("identical") == 3
    if argv[0] == "resume" and said.code == 0:  # it went on: from what was not damaged
        assert metrics(run)[3] == expected_fourth(stopped)


FOURTH = {}


def expected_fourth(stopped):
    if not FOURTH:
        copy = shutil.copytree(stopped, stopped.parent / "fourth")
        assert command("resume", copy, "train.online_batches=4").code == 0
        FOURTH.update(metrics(copy)[3])
    return FOURTH


# --- properties ---

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 50) | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3),
    max_leaves=4,
)
KEYS = ["model", "data", "train", "rollout", "algo", "reward", "eval", "run"]
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("tag", [[], {}, [["dar"]], {"name": "dar"}])
@pytest.mark.parametrize("section", ["model", "algo", "rollout"])
def test_a_tag_that_is_no_word_is_an_error_in_words(section, tag):
    with pytest.raises(UserError, match=section):
        build({section: {"name": tag, "": None}})


@quick
@given(
    st.dictionaries(st.sampled_from([*KEYS, "other"]), PLAIN | st.dictionaries(st.text(max_size=6), PLAIN, max_size=3))
)
def test_any_tree_is_a_configuration_or_an_error_in_words(tree_):
    try:
        config = build(tree_)
    except UserError as error:
        assert str(error)
    else:
        assert build(parse_yaml(dump(config), "again")) == config


@quick
@given(st.text())
def test_any_text_is_yaml_or_an_error_in_words(text):
    try:
        parse_yaml(text, "recipe.yaml")
    except UserError as error:
        assert "recipe.yaml" in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10), lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(["prompt", "chosen", "rejected", "completion", "role", "content", "id", "x"]), x, max_size=4
    ), max_leaves=12,
)  # fmt: skip


@quick
@given(st.lists(JSON, max_size=4))
def test_any_json_lines_are_prompts_or_an_error_that_names_the_row(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for read in (load_prompts, load_examples):
        try:
            found = read(str(path))
        except UserError as error:
            assert "any.jsonl" in str(error)
        else:
            assert len(found) == len(rows)


@quick
@given(st.binary(max_size=300))
def test_any_bytes_are_data_or_an_error_in_words(tmp_path_factory, data):
    for suffix in (".jsonl", ".json", ".parquet", ".jsonl.gz"):
        path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
        path.write_bytes(data)
        with pytest.raises(UserError, match="bytes"):
            load_prompts(str(path))


def test_a_batch_of_nothing_is_no_batch(stopped, tmp_path):
    """A Parquet file that is whole but is no batch."""
    run = shutil.copytree(stopped, tmp_path / "run")
    pq.write_table(pa.table({"x": [1]}), run / "batches" / "000001.parquet")
    for argv in (["replay", run], ["what-if", run, "beta=1"]):
        clear(command(*argv), "000001.parquet", "damaged")
    assert command("verify", run).code == 1
    assert [replay(b, dualign.load(run / "config.yaml").algo).verdict for b in stored(Run.open(stopped))] == [
        "identical"
    ] * 3

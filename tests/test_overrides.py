"""Overrides on the command line and in grids: what they set, and what is said of those that set nothing."""

from __future__ import annotations

import pytest

from dualign.common.errors import UserError
from dualign.config import load
from dualign.config.renamed import _tell
from dualign.eval.compare.grid import cells
from dualign.eval.compare.grid import load as load_grid

RECIPE = "model: {name: m}\ndata: {train: p}\ntrain: {online_batches: 1}\n"


@pytest.fixture
def recipe(tmp_path):
    def write(more: str = "") -> str:
        (tmp_path / "r.yaml").write_text(RECIPE + more)
        return str(tmp_path / "r.yaml")

    return write


def test_settings_without_a_system_are_the_default_systems(recipe, tmp_path):
    for config in (
        load(recipe(), ["algo.alpha=0.3"]),
        load(recipe(), ["algo={alpha: 0.3}"]),
        load(recipe("algo: {alpha: 0.3}\n")),
        load(recipe("algo: {beta: 0.1}\n"), ["algo.alpha=0.3", "algo.beta=0.05"]),
    ):
        assert (config.algo.name, config.algo.alpha, config.algo.beta) == ("dar", 0.3, 0.05)
    assert load(recipe("algo: {alpha: 0.3}\n"), ["algo.beta=0.1", "algo.name=grpo"]).algo.beta == 0.1
    (tmp_path / "base.yaml").write_text(RECIPE + "algo: {name: grpo}\n")
    (tmp_path / "over.yaml").write_text("base: base.yaml\nalgo: {beta: 0.2}\n")
    assert (load(tmp_path / "over.yaml").algo.name, load(tmp_path / "over.yaml").algo.beta) == ("grpo", 0.2)


def test_a_grid_sets_the_default_system_and_names_a_system_first(recipe, tmp_path):
    (tmp_path / "g.yaml").write_text(
        f"base: {recipe()}\nout: {tmp_path / 'out'}\nseeds: [1]\nset: {{algo.alpha: 0.3}}\n"
        "systems: {plain: {}, sections: {algo: {beta: 0.2}}, axes: {axes: {algo.beta: [0.1, 0.2]}}}\n"
    )
    algos = [(c.system, c.config.algo) for c in cells(load_grid(tmp_path / "g.yaml"), {})]
    found = [(system, a.name, a.alpha, a.beta) for system, a in algos]
    assert found == [
        ("plain", "dar", 0.3, 0.05), ("sections", "dar", 0.3, 0.2), ("axes", "dar", 0.3, 0.1), ("axes", "dar", 0.3, 0.2),
    ]  # fmt: skip
    (tmp_path / "g.yaml").write_text(
        f"base: {recipe()}\nout: {tmp_path / 'out'}\nseeds: [1]\nset: {{algo.beta: 0.1, algo.name: grpo}}\n"
    )
    assert [c.config.algo.beta for c in cells(load_grid(tmp_path / "g.yaml"), {})] == [0.1]


@pytest.mark.parametrize(("overrides", "told"), [
    (["algo.alhpa=0.3"], "override algo.alhpa: no such key; did you mean algo.alpha"),
    (["algo.name=grpo", "algo.alpha=0.3"], "override algo.alpha: no such key; grpo has epochs, tie, beta, clip, clip_high"),
    (["algo.mu=1"], "override algo.mu: no such key; dar has epochs, tie, alpha"),
    (["algo.alpha=x"], "override algo.alpha: .*not 'x'"),
    (["trian.lr=1"], "override trian.lr: trian: no such key; did you mean train"),
    (["train.lr=1", "train.rl=1"], "override train.rl: no such key"), (["reward.0.weight=2"], "0 is no position in a list of 0"),
    (["algo.alpha.x=1"], "override algo.alpha.x: algo.alpha"),
])  # fmt: skip
def test_an_override_that_is_wrong_is_named(recipe, overrides, told):
    with pytest.raises(UserError, match=told):
        load(recipe(), overrides)


def test_what_the_file_says_is_said_of_the_file(recipe):
    path = recipe("algo: {alhpa: 0.3}\n")
    for overrides in ([], ["algo.beta=1"]):
        with pytest.raises(UserError, match=r"r\.yaml: algo\.alhpa: no such key; did you mean algo\.alpha"):
            load(path, overrides)


def test_another_sampler_starts_its_options_afresh(recipe, tmp_path):
    """As another system starts its section: one's options are not the other's."""
    path = recipe("rollout: {rows: 8}\n")
    assert load(path).rollout.options.decode_batch_size == 8
    assert load(path, ["rollout.engine=hf"]).rollout.options.decode_batch_size == 8
    assert load(path, ["rollout.options.url=http://a", "rollout.engine=vllm"]).rollout.options.urls == ["http://a"]
    (tmp_path / "over.yaml").write_text("base: r.yaml\nrollout: {engine: vllm, options: {url: 'http://a'}}\n")
    (tmp_path / "back.yaml").write_text("base: over.yaml\nrollout: {engine: hf}\n")
    (tmp_path / "more.yaml").write_text("base: over.yaml\nrollout: {options: {concurrency: 3}}\n")
    assert load(tmp_path / "over.yaml").rollout.engine == "vllm"
    assert load(tmp_path / "back.yaml").rollout.options.decode_batch_size == 256
    assert load(tmp_path / "more.yaml").rollout.options.urls == ["http://a"]


@pytest.mark.parametrize(("overrides", "told"), [
    (["rollout.options.length=3"], "override rollout.options.length: no such key; hf has decode_batch_size, cuda_graphs"),
    (["rollout.engine=vllm", "rollout.options.serve=true", "rollout.options.colour=red"], "vllm has url, serve, python"),
    (["rollout.engine=vlm", "rollout.options.url=http://a"], "override rollout.engine: no 'vlm'; did you mean vllm"),
    (["rollout.engine=vllm", "rollout.options.serve=true", "rollout.log_probs=recorded"], "set rollout.log_probs=recomp"),
])  # fmt: skip
def test_an_option_that_its_sampler_does_not_have_is_named(recipe, overrides, told):
    with pytest.raises(UserError, match=told):
        load(recipe(), overrides)


def test_an_old_name_is_read_with_a_word(recipe, tmp_path, caplog):
    """Once for a recipe; not in a run's folder, where nobody is to change it."""
    _tell.cache_clear()
    path = recipe("rollout: {rows: 8}\n")
    (tmp_path / "run.json").touch()
    assert load(path).rollout.options.decode_batch_size == 8 and not caplog.records
    (tmp_path / "run.json").unlink()
    for overrides in ([], ["train.lr=1"], ["rollout.rows=9"]):
        load(path, overrides)
    assert [r.getMessage() for r in caplog.records] == ["note: rollout.rows is now rollout.options.decode_batch_size"]

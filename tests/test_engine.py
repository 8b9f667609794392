"""What the engine keeps beside the weights follows them, whichever optimizer steps."""

import pytest
import torch

from dualign.batch import Row, labelled
from dualign.config import build
from dualign.engine import Engine
from dualign.models.packing import pack
from dualign.models.policy import Policy, load_model
from dualign.schema import ModelConfig
from dualign.types import Label, Prompt, Rollout
from runs_common import tree, write_demonstrations


def demonstrations():
    rollouts = [
        Rollout(i, i, Prompt(str(i), "p"), (5, 6, 7 + i), tuple(range(20 + i, 26 + 2 * i)), "x", "eos", ())
        for i in range(4)
    ]
    b = labelled(0, [Row(rollout, Label(1.0)) for rollout in rollouts])
    return b.tokens, b.batch


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_after_a_step_log_probs_are_those_of_the_weights_that_are_saved(optimizer, tiny, tmp_path):
    config = tree(tiny, write_demonstrations(tmp_path), tmp_path / "run", {"name": "sft"}, optimizer=optimizer, lr=1e-2)
    config["model"]["precision"] = "bf16"
    config = build(config)
    engine = Engine(config)
    tokens, batch = demonstrations()
    before = engine.score(engine.policy, tokens)
    engine.begin_update(0, 0)
    engine.update(config.algo, tokens, batch)
    after = engine.score(engine.policy, tokens)
    assert not torch.allclose(before, after, atol=0.05)
    weight = engine.policy.head.weight
    assert torch.equal(engine.policy.rounded_head(), weight.detach().to(torch.bfloat16))

    plain, _ = load_model(ModelConfig(name=str(tiny)))
    with engine.masters.whole():
        trained = {name.removeprefix("0.model."): p for name, p in engine.masters.named.items()}
        plain.load_state_dict(trained, strict=False)
    fresh = Policy(plain, "bf16", True)
    with torch.no_grad():
        again = fresh(pack(tokens, range(len(tokens)), tokens.width, 0, share=True))
    assert torch.allclose(after, again, atol=0.02)

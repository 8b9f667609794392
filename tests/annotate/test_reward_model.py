"""Sequence classifiers as rewards: batched equals alone, templates are used, what does not fit is absent."""

from __future__ import annotations

import pytest
import torch

from conftest import make_tokenizer
from dualign.annotate import build
from dualign.annotate.base import Item, label_all
from dualign.annotate.reward_model import ClassifierAnnotator
from dualign.annotate.settings import ClassifierReward
from dualign.common.errors import UserError
from dualign.common.types import Prompt

ITEMS = [
    Item(n, n, Prompt(f"p{n}", ({"role": "user", "content": "Hi! " * (n + 1)},)), "ok " * (7 - 2 * n)) for n in range(4)
]


def save(folder, pad="<|end|>", template=True, labels=1):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    if not template:
        tokenizer.chat_template = None
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=128, num_labels=labels, initializer_range=0.3,
        pad_token_id=None if pad == "none" else tokenizer.convert_tokens_to_ids(pad),
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def alone(folder, item):
    """The model's own answer to one unpadded input."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        chat = [*item.prompt.messages, {"role": "assistant", "content": item.completion}]
        tokens = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    else:
        tokens = tokenizer(item.prompt.text, item.completion, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(**tokens).logits[0, 0])


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("pad", ["<|end|>", "<|s|>", "none"])
def test_batched_equals_alone(tmp_path, pad, template):
    folder = save(tmp_path, pad, template)
    annotator = build([ClassifierReward(model=folder, dtype="float32", batch_size=3)])
    got = [label.value for label in label_all(annotator, ITEMS)]
    assert got == pytest.approx([alone(folder, item) for item in ITEMS], abs=1e-4)
    assert len({round(x, 4) for x in got}) == 4


def test_offloaded_it_scores_the_same_and_holds_nothing(tmp_path):
    settings = ClassifierReward(model=save(tmp_path), dtype="float32", offload=True)
    annotator = ClassifierAnnotator(settings)
    got = [label.value for label in label_all(annotator, ITEMS)]
    assert got == pytest.approx([alone(settings.model, item) for item in ITEMS], abs=1e-4)
    assert {p.device.type for p in annotator._model.parameters()} == {"meta"}


def test_what_is_too_long_is_absent_and_the_rest_is_not(tmp_path):
    annotator = build([ClassifierReward(model=save(tmp_path), dtype="float32", max_tokens=100)])
    long = Item(9, 9, ITEMS[0].prompt, "x" * 130)
    labels = label_all(annotator, [long, *ITEMS])
    assert labels[0].value is None and "more than its limit of 100" in str(labels[0].reason)
    assert all(label.value is not None for label in labels[1:])
    wide = build([ClassifierReward(model=str(tmp_path), dtype="float32")])  # the model itself has 128 positions
    assert "limit of 128" in str(label_all(wide, [long])[0].reason)


def test_a_conversation_that_its_template_refuses_is_absent_and_the_rest_is_not(tmp_path):
    from transformers import AutoTokenizer

    folder = save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    system = Item(9, 9, Prompt("s", ({"role": "system", "content": "Be kind."}, *ITEMS[0].prompt.messages)), "ok")
    labels = label_all(build([ClassifierReward(model=folder, dtype="float32")]), [ITEMS[0], system, *ITEMS[1:]])
    assert labels[1].value is None and "refuses the conversation: no system role" in str(labels[1].reason)
    expected = [alone(folder, item) for item in ITEMS]
    assert [x.value for x in labels if x is not labels[1]] == pytest.approx(expected, abs=1e-4)


def test_models_that_are_no_reward(tmp_path, tiny):
    save(tmp_path, labels=2)
    for model, message in [
        (str(tmp_path), "has 2 outputs"),
        (str(tiny), "not a trained classifier|outputs"),
        (str(tmp_path / "none"), "no such folder"),
    ]:
        with pytest.raises(UserError, match=message):
            build([ClassifierReward(model=model)])


def save_other(folder, family, pad=-1, side="left"):
    """A tiny classifier of another family, with a tokenizer that pads on `side`."""
    import transformers

    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer), "num_labels": 1, "initializer_range": 0.3, "eos_token_id": 256,
              "pad_token_id": tokenizer.convert_tokens_to_ids("<|s|>") if pad == -1 else pad}  # fmt: skip
    sizes = {
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0},
    }.get(family) or {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes, **common)
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "batch"), [("GPT2", 3), ("Bert", 3), ("Llama", 3), ("GPTNeoX", 3), ("FNet", 1), ("T5", 1)]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_does_not_depend_on_its_batch(family, batch, side, tmp_path, caplog):
    folder = save_other(tmp_path, family, side=side)
    annotator = build([ClassifierReward(model=folder, dtype="float32", batch_size=3)])
    got = [label.value for label in label_all(annotator, ITEMS)]
    assert got == pytest.approx([alone(folder, item) for item in ITEMS], abs=1e-4)
    assert annotator._batch_size == batch and ("one row at a time" in caplog.text) == (batch == 1)


def test_in_bf16_on_a_cpu_a_score_is_the_same_to_the_last_bit(tmp_path):
    annotator = build([ClassifierReward(model=save_other(tmp_path, "Llama"), dtype="bfloat16", batch_size=16)])
    if annotator._model.device.type != "cpu":
        pytest.skip("a GPU rounds by the batch's shape")
    together = label_all(annotator, ITEMS)
    assert together == [label_all(annotator, [item])[0] for item in ITEMS]


def test_a_padding_id_that_cannot_be_embedded_pads_nothing(tmp_path, caplog):
    folder = save_other(tmp_path, "Llama", pad=None)
    settings = (tmp_path / "config.json").read_text()
    assert '"pad_token_id": null' in settings
    (tmp_path / "config.json").write_text(settings.replace('"pad_token_id": null', '"pad_token_id": -1'))
    annotator = build([ClassifierReward(model=folder, dtype="float32")])
    assert "it has no padding token" in caplog.text and all(x.value is not None for x in label_all(annotator, ITEMS))


def test_a_token_beyond_the_embedding_is_named(tmp_path):
    from transformers import AutoTokenizer

    folder = save_other(tmp_path, "Llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    annotator = build([ClassifierReward(model=folder, dtype="float32")])
    with pytest.raises(UserError, match=r"<\|new\|>\) is beyond its embedding"):
        label_all(annotator, [Item(0, 0, ITEMS[0].prompt, "<|new|>")])


def test_positions_begin_after_the_padding_id_in_roberta(tmp_path):
    annotator = build([ClassifierReward(model=save_other(tmp_path, "Roberta", pad=1), dtype="float32")])
    short, long = (Item(0, 0, Prompt("p", "a" * n), "b") for n in (200, 254))
    labels = label_all(annotator, [short, Item(1, 1, long.prompt, "b")])
    assert labels[0].value is not None and "limit of 254" in str(labels[1].reason)

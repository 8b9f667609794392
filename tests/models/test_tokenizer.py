"""What fixed data train on is what the chat template has after the prompt: its closing token, its reasoning block, the
tokens of the whole text, one BOS and no EOS before the end."""

from __future__ import annotations

import pytest

from dualign.common.errors import UserError
from dualign.common.types import Example, Prompt
from dualign.models.tokenizer import Tokenizer

PLAIN = (
    "{% for m in messages %}<|{{ m['role'][0] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
TURNS = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
THINKS = (  # as Qwen3's: an empty block before an answer without reasoning, none in turns that are past
    "{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' }}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
USER = ({"role": "user", "content": "Hi"},)


def byte_level(template=None, single=None, **more):
    """One token per byte, and the template's marks as special tokens. `single`: what is put around a text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|u|>", "<|a|>", "<|s|>", "<|bos|>", "<|turn|>", "<|eot|>", "<think>", "</think>"]
    backend.add_special_tokens(special)
    if single:
        known = [(t, backend.token_to_id(t)) for t in ("<|bos|>", "<|end|>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|bos|>", **more)
    fast.chat_template = template
    return fast


def sentence_piece(scheme, template=None):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGH:?\n0123456789 .=+", "<unk>", "=="]
    model = models.BPE(vocab={c: i for i, c in enumerate(marks)}, merges=[("=", "=")], unk_token="<unk>")
    backend = Backend(model)
    if scheme == "legacy":  # Llama 2's
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<|end|>", "<|u|>", "<|a|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    fast.chat_template = template
    return fast


def made(hf, **more):
    return Tokenizer(hf, [hf.eos_token_id], **more)


def encoded(tokenizer, content, *answers, finish="eos"):
    """The prompt's tokens and each answer's, as text."""
    turns = tuple(a for a in answers if isinstance(a, dict))
    texts = tuple(a["content"] if isinstance(a, dict) else a for a in answers)
    prompt, completions = tokenizer.encode(Example(Prompt("p", content), texts, (finish,) * len(texts), turns))
    assert prompt == tokenizer.prompt(Prompt("p", content))
    return [shown(tokenizer, ids) for ids in (prompt, *completions)]


def shown(tokenizer, ids):
    return "".join(tokenizer.hf.convert_ids_to_tokens(list(ids))).replace("Ċ", "\n").replace("Ġ", " ")


def test_an_answer_ends_with_the_templates_closing_token_and_sampling_does_too():
    tokenizer = made(byte_level(TURNS))
    prompt, answer, other = encoded(tokenizer, USER, "Hello", " Bye\n")
    assert prompt == "<|turn|>user\nHi<|eot|>\n<|turn|>assistant\n"
    assert answer == "Hello<|eot|>" and other == "Bye<|eot|>"
    assert {shown(tokenizer, [i]) for i in tokenizer.eos_ids} == {"<|end|>", "<|eot|>"}
    assert encoded(tokenizer, USER, "Hello", finish="length")[1] == "Hello"


ENDINGS = {
    "nothing": ("{{ m.content }}", "Hello<|end|>"),
    "a line break": ("{{ m.content }}\n", "Hello<|end|>"),
    "its EOS after a space": ("{{ m.content }} <|end|>\n", "Hello <|end|>"),
    "two ends": ("{{ m.content }}<|eot|><|end|>", "Hello<|eot|>"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_other_closings(case):
    body, want = ENDINGS[case]
    template = (
        "{% for m in messages %}{{ m.role }}: "
        + body
        + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = made(byte_level(template))
    assert encoded(tokenizer, USER, "Hello")[1] == want
    assert encoded(tokenizer, USER, "Hello", finish="length")[1] == "Hello"


IN_WORDS = {  # an end that is no token of the tokenizer's
    "ChatML": "{{ m.content }}<|im_end|>\n",
    "a mark": "{{ m.content }}<END>",
    "trimmed": "{{ m.content | trim }} <END>\n\n",
}


@pytest.mark.parametrize("case", IN_WORDS)
@pytest.mark.parametrize("said", ["Hello", "END", "Hello<END>"])
def test_an_end_in_words_is_no_part_of_an_answer_that_was_cut_off(case, said):
    body = IN_WORDS[case]
    template = (
        "{% for m in messages %}{{ m.role }}: " + body + "{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
    )
    tokenizer = made(byte_level(template.replace("{{ m.role }}: ", "{{ m.role[0] }}: ")))
    close = body.split("}}")[1]
    assert encoded(tokenizer, USER, said, finish="length")[1] == said
    assert encoded(tokenizer, USER, said)[1] == f"{said}{close.rstrip()}<|end|>"


def test_a_call_that_was_cut_off_has_no_end_in_words():
    template = THINKS.replace("<|eot|>", "<END>")
    call = {"role": "assistant", "content": "Look.", "tool_calls": [{"function": {"name": "w", "arguments": {"a": 1}}}]}
    tokenizer = made(byte_level(template))
    wanted = '<think>\n\n</think>\n\nLook.\n<call>{"a": 1}</call>'
    assert encoded(tokenizer, USER, call, finish="length")[1] == wanted
    assert encoded(tokenizer, USER, call)[1] == wanted + "<END><|end|>"
    thought = {"role": "assistant", "content": "4", "reasoning_content": "two twos"}
    assert encoded(tokenizer, USER, thought, finish="length")[1] == "<think>\ntwo twos\n</think>\n\n4"


def test_an_answer_that_the_next_turn_closes():
    """As GLM's: nothing follows an answer but the next role, which the model ends with."""
    hf = byte_level(
        "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
    )
    tokenizer = Tokenizer(hf, [hf.eos_token_id, hf.convert_tokens_to_ids("<|u|>")])
    assert encoded(tokenizer, USER, "Hello") == ["<|u|>Hi<|a|>", "Hello<|u|>"]


def test_reasoning_is_what_the_template_makes_of_it():
    tokenizer = made(byte_level(THINKS))
    reasoned = {"role": "assistant", "content": "4", "reasoning_content": "two twos"}
    assert encoded(tokenizer, USER, "Hello")[1] == "<think>\n\n</think>\n\nHello<|eot|>"
    assert encoded(tokenizer, USER, reasoned)[1] == "<think>\ntwo twos\n</think>\n\n4<|eot|>"
    past = (*USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}, *USER)
    prompt, answer = encoded(tokenizer, past, "Bye")
    assert "hm" not in prompt and answer == "<think>\n\n</think>\n\nBye<|eot|>"
    assert encoded(tokenizer, USER, "<think>\ncut o", finish="length")[1] == "<think>\ncut o"


def test_a_prompt_that_opens_the_reasoning_is_gone_on_from_or_refused():
    template = PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]").replace("<|a|>", "<|a|><think>\n")
    tokenizer = made(byte_level(template))
    assert encoded(tokenizer, USER, "hm\n</think>\n\n4") == ["<|u|>Hi<|end|><|a|><think>\n", "hm\n</think>\n\n4<|end|>"]
    with pytest.raises(UserError, match=r"prompt p: the chat template shows the model another text.*<think>"):
        encoded(tokenizer, USER, "4")


def test_tool_calls_and_tools_are_rendered_or_missed():
    tokenizer = made(byte_level(THINKS))
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    asks = {"role": "assistant", "content": "Let me look.", "tool_calls": [call]}
    assert encoded(tokenizer, USER, asks)[1].endswith('Let me look.\n<call>{"city": "Paris"}</call><|eot|>')
    for turn, lost in [
        (asks, "tool_calls"),
        ({"role": "assistant", "content": "4", "reasoning_content": "hm"}, "reason"),
    ]:
        with pytest.raises(UserError, match=f"prompt p: the chat template leaves out the answer's {lost}"):
            encoded(made(byte_level(PLAIN)), USER, turn)


@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_details", "thoughts", "function_call"])
def test_reasoning_and_calls_under_any_key_are_rendered_or_refused(key):
    value = [{"type": "reasoning.text", "text": "4"}] if key == "reasoning_details" else "4"
    turn = {"role": "assistant", "content": "4", key: value}
    with pytest.raises(UserError, match=f"prompt p: the chat template leaves out the answer's {key}"):
        encoded(made(byte_level(PLAIN)), USER, turn)
    reads = made(
        byte_level(PLAIN.replace("{{ m['content'] }}", "{{ m.KEY or '' }}{{ m.content }}".replace("KEY", key)))
    )
    assert encoded(reads, USER, turn)[1].endswith("4<|end|>")
    assert encoded(made(byte_level(PLAIN)), USER, turn | {key: value[:0]})[1] == "4<|end|>"  # there is none


def test_reasoning_under_two_keys_is_read_from_one_unless_they_differ():
    same = {"role": "assistant", "content": "4", "reasoning_content": "twos", "reasoning": "twos"}
    tokenizer = made(byte_level(THINKS))
    assert encoded(tokenizer, USER, same)[1] == "<think>\ntwos\n</think>\n\n4<|eot|>"
    with pytest.raises(UserError, match="leaves out the answer's reasoning;"):
        encoded(tokenizer, USER, same | {"reasoning": "another"})


def test_other_keys_that_a_template_leaves_out_are_said_once(caplog):
    tokenizer = made(byte_level(PLAIN))
    asked = ({"role": "user", "content": "Hi", "name": "Ann"},)
    for _ in range(2):
        answer = encoded(tokenizer, asked, {"role": "assistant", "content": "4", "name": "Bot", "weight": 0})[1]
        assert answer == "4<|end|>"
    for part in ("a user message's name", "an assistant message's name", "an assistant message's weight"):
        assert caplog.text.count(f"leaves out {part}:") == 1
    caplog.clear()
    named = made(byte_level(PLAIN.replace("{{ m['content'] }}", "{{ m.name }}{{ m['content'] }}")))
    assert "Ann" in encoded(named, asked, "4")[0] and not caplog.text


def test_what_a_template_leaves_out_of_a_prompt_is_said_once(caplog):
    template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|u|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|a|>"
    )
    tokenizer = made(byte_level(template))
    asked = ({"role": "system", "content": "Be brief."}, *USER)
    for id in "ab":
        prompt = Prompt(id, asked, {"tools": [{"name": "weather"}]})
        assert shown(tokenizer, tokenizer.prompt(prompt)) == "<|u|>Hi<|end|><|a|>"
    assert caplog.text.count("leaves out a system message's text") == 1 == caplog.text.count("leaves out the tools")
    assert "prompt a" in caplog.text and "prompt b" not in caplog.text


def test_templates_that_read_parts_or_json_arguments_get_them():
    parts = "{% for m in messages %}<|u|>{% for p in m.content %}{{ p.text }}{% endfor %}<|end|>{% endfor %}<|a|>"
    assert encoded(made(byte_level(parts)), USER)[0] == "<|u|>Hi<|end|><|a|>"
    glued = PLAIN.replace(
        "<|end|>", "{% for c in m.tool_calls or [] %}{{ '!' + c.function.arguments }}{% endfor %}<|end|>"
    )
    asks = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {"a": "é"}}}]}
    tokenizer = made(byte_level(glued))
    ids = tokenizer.prompt(Prompt("p", (*USER, asks, *USER)))
    assert tokenizer.hf.decode(ids) == '<|u|>Hi<|end|><|a|>!{"a": "é"}<|end|><|u|>Hi<|end|><|a|>'


@pytest.mark.parametrize("scheme", ["always", "first", "never", "legacy"])
def test_tokens_are_those_of_the_whole_text(scheme):
    hf = sentence_piece(scheme, PLAIN)
    tokenizer = made(hf)
    turns = [*USER, {"role": "assistant", "content": "Hello"}]
    whole = hf.apply_chat_template(turns, return_dict=True)["input_ids"]
    prompt, (answer,) = tokenizer.encode(Example(Prompt("p", USER), ("Hello",), ("eos",)))
    assert [*prompt, *answer] == whole and tokenizer.text(answer, chat=True) == "Hello"
    for text, more in [("2+2=", "4"), ("a", " bc"), ("2=", "=4")]:
        prompt, (answer,) = tokenizer.encode(Example(Prompt("p", text), (more,), ("length",)))
        assert "".join(hf.convert_ids_to_tokens([*prompt, *answer])).replace("▁", " ").lstrip() == text + more
        assert prompt == tuple(hf(text)["input_ids"]) and tokenizer.text(answer) == more
        assert text == "2=" or [*prompt, *answer] == hf(text + more)["input_ids"]


@pytest.mark.parametrize("single", ["<|bos|> $A", "$A <|end|>", "<|bos|> $A <|end|>"])
def test_one_bos_and_no_end(single):
    hf = byte_level("{{ bos_token }}" + PLAIN, single)
    tokenizer, bos = made(hf), "<|bos|>" * single.startswith("<|bos|>")
    rendered = hf.apply_chat_template([*USER], tokenize=False, add_generation_prompt=True)
    assert encoded(tokenizer, USER, "Hello") == ["<|bos|><|u|>Hi<|end|><|a|>", "Hello<|end|>"]
    assert shown(tokenizer, tokenizer.prompt(Prompt("p", rendered))) == "<|bos|><|u|>Hi<|end|><|a|>"
    assert encoded(tokenizer, "2+2=", "4") == [bos + "2+2=", "4<|end|>"]
    assert (
        shown(tokenizer, tokenizer.completion("4")) == shown(tokenizer, tokenizer.completion("4<|end|>")) == "4<|end|>"
    )


def test_tokens_that_the_model_has_no_row_for():
    hf = byte_level(TURNS, pad_token="<pad>")
    turn = hf.convert_tokens_to_ids("<|turn|>")
    tokenizer = made(hf, rows=turn)
    assert hf.pad_token_id > turn > tokenizer.pad_id  # padding is masked: any row does
    with pytest.raises(UserError, match=rf"prompt p: the token '<\|turn\|>' has the id {turn}, but .* {turn} rows"):
        tokenizer.prompt(Prompt("p", USER))
    with pytest.raises(UserError, match="prompt p: the token '<think>'"):
        tokenizer.encode(Example(Prompt("p", "Hi"), ("<think>",), ("eos",)))
    assert tokenizer.prompt(Prompt("p", "Hi")) and tokenizer.text([10**6]) == ""


REFUSALS = {
    "{{ raise_exception('Roles must alternate') }}": "prompt p: the chat template refuses it: Roles must alternate",
    "{% for m in messages %}{{ m.content }": "a syntax error in its line 1",
    "{{ messages[0].content.items() }}": "'str object' has no attribute 'items'",
    None: "prompt p: it is a conversation, but the model has no chat template",
}


@pytest.mark.parametrize("template", REFUSALS)
def test_a_template_that_refuses_a_row_is_quoted(template):
    with pytest.raises(UserError) as error:
        made(byte_level(template)).prompt(Prompt("p", USER))
    assert REFUSALS[template] in str(error.value)


def test_a_clock_in_a_template_moves_on_between_prompt_and_answer(monkeypatch):
    template = made(byte_level(PLAIN)).template
    ticks = iter("1112222")
    render = template._text
    monkeypatch.setattr(template, "_text", lambda *a: next(ticks) + render(*a))
    before = template.prompt(Prompt("p", USER))
    template.prompt(Prompt("p", USER))
    now, answer = template.answer(Prompt("p", USER), before, {"role": "assistant", "content": "Hello"})
    assert (before[0], now[0], answer) == ("1", "1", "Hello<|end|>")
    now, answer = template.answer(Prompt("p", USER), before, {"role": "assistant", "content": "Hello"})
    assert (now[0], answer) == ("2", "Hello<|end|>")

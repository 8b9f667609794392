"""Chat templates that write the date (`strftime_now`): a run's prompts are those of the day on which it began."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

DIRECTIVES = [f"%{pad}{letter}" for letter in "aAbBcdDefFGgHhIjklmMnpPrRsStTuUVwWxXyYzZ" for pad in ("-", "_", "")]


def freeze_date(tokenizer: Any, when: datetime | None) -> None:
    """Lets the templates of a Hugging Face tokenizer write `when` on every later day. None: each day its own."""
    template = tokenizer.chat_template
    if when is None or not template or "strftime_now" not in str(template):
        return
    macro, render = _macro(when), tokenizer.apply_chat_template

    def frozen(conversation: Any, tools: Any = None, chat_template: str | None = None, **given: Any) -> Any:
        text = macro + tokenizer.get_chat_template(chat_template, tools)
        return render(conversation, tools=tools, chat_template=text, **given)

    tokenizer.apply_chat_template = frozen


def _macro(when: datetime) -> str:
    """A definition of strftime_now in the template itself: transformers passes text to templates, but no functions."""
    steps = "".join(f" | replace({json.dumps(d)}, {json.dumps(when.strftime(d))})" for d in DIRECTIVES)
    steps = f" | replace('%%', '\\x00'){steps} | replace('\\x00', '%')"
    # an empty expression at the end: a block would take the template's first newline with it
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{steps} -}}}}{{%- endmacro %}}{{{{ '' }}}}"

"""Rows: what people's files say, as prompts, pairs and demonstrations."""

from dualign.data.rows import (
    draw,
    load_dataset,
    load_examples,
    load_prompts,
    local_file,
    lost_system_prompt,
    names_data,
)

__all__ = ["draw", "load_dataset", "load_examples", "load_prompts", "local_file", "lost_system_prompt", "names_data"]

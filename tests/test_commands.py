"""What the documents tell people to type can be typed: commands, options, overrides, recipes and Python."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer.main
import yaml

from dualign.cli import application
from dualign.common.errors import UserError
from dualign.config import Config, load, recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4,}|\t).*\n|^\n)+", re.MULTILINE)
COMMAND = re.compile(r"^(?:\w+=\S+ +)*(?:\S*\bdualign|.*-m dualign) +(?=\S)(.*)")
TAKES_KEYS = {"train": 1, "resume": 1, "sft": 1, "pairs": 1}  # `key.sub=value` after so many arguments
RECOMPUTED = "rollout.log_probs=recomputed"  # as by default, not as in the quickstart
JUDGED = "reward=[{type: judge, rubric: helpfulness, base_url: 'http://localhost:8000/v1', model: m}]"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages ('': none named, and those that are indented)."""
    text = page.read_text(encoding="utf-8")
    found = [textwrap.dedent(body) for _, language, body in FENCED.findall(text) if language in languages]
    plain = FENCED.sub("", text) if "" in languages else ""
    return found + [textwrap.dedent(block) for block in INDENTED.findall(plain)]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `dualign ...` that a page shows."""
    found, variables = [], dict[str, str]()
    for block in blocks(page, "", "bash", "sh", "console"):
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            if assigned := re.fullmatch(r"(\w+)=(\"[^\"]*\"|\S+)", line.strip()):
                variables[assigned[1]] = assigned[2].strip('"')
            for variable, value in variables.items():
                line = line.replace(f"${variable}", value)
            if (match := COMMAND.match(line.strip())) and not line.lstrip().startswith(("#", "...")):
                said = shlex.split(match[1].split(" # ")[0].replace(" [more.jsonl]", ""), comments=True)
                found.append([word for word in said if word not in ("&", "...")])
    return found


def check_keys(command: str, arguments: list[str]) -> None:
    """The overrides of a command name keys that exist and take these values."""
    keys = [word for word in arguments if re.match(r"[a-z]+(\.[\w.]+)?=", word)]
    if not keys or any(re.search(r"\.py:|\.\.\.", word) for word in keys):  # code of one's own is not here
        return
    recipe = arguments[0]
    judged = [JUDGED] if any(key.startswith("reward.0") for key in keys) else []
    shipped = recipe in recipes() and not judged
    if command == "sft":
        recipe, shipped = "small/sft", True
    load(recipe if shipped else "quickstart", [*([] if shipped else [RECOMPUTED, *judged]), *keys])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_can_be_typed(page):
    group = typer.main.get_command(application())
    for words in commands(page):
        command, arguments = group, words
        while arguments and arguments[0] in getattr(command, "commands", {}):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        if words[0][0] in "-$" or (words[0] == "eval" and ".py:" in " ".join(words)):
            continue  # --help, a variable, an evaluation of one's own
        assert not hasattr(command, "commands"), f"{name(page)}: no such command: dualign {' '.join(words)}"
        context = command.context_class(command)
        values, left, _ = command.make_parser(context).parse_args(list(arguments))
        assert not left, f"{name(page)}: dualign {' '.join(words)}: too many arguments: {left}"
        missing = [p.name for p in command.params if p.required and not values.get(p.name)]
        assert not missing, f"{name(page)}: dualign {' '.join(words)}: missing {missing}"
        if words[0] in TAKES_KEYS:
            check_keys(words[0], arguments)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_within_a_sentence_are_commands(page):
    there = typer.main.get_command(application()).commands
    assert [
        said for said in re.findall(r"`dualign ([a-z]\S*?)[\s`]", page.read_text(encoding="utf-8")) if said not in there
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_recipes_are_recipes(page, tmp_path):
    """YAML that has a recipe's sections is one, beside what the quickstart has."""
    for number, block in enumerate(blocks(page, "yaml")):
        tree = None if re.search(r"^ *\.\.\.$", block, re.MULTILINE) else yaml.safe_load(block)
        if not isinstance(tree, dict) or not set(tree) <= {*Config.model_fields, "base"}:
            continue
        if any(".py:" in str(each.get("type")) for each in tree.get("reward", [])):
            continue  # code of one's own is not here
        whole = {"model", "data", "train"} <= set(tree) or "base" in tree
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(tree if whole else {"base": "quickstart", **tree}))
        load(path, [] if whole else [RECOMPUTED, *(["data.eval=null"] if "preference" in str(tree) else [])])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_has_the_targets(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^ *|`)make ([a-z-]+)\b", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_is_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def test_the_table_of_other_libraries_is_what_the_errors_say():
    """docs/moving.md's short table, beside config/foreign.yaml."""
    libraries = yaml.safe_load((ROOT / "src" / "dualign" / "config" / "foreign.yaml").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| (.*) \| (.*) \| (.*) \| (.*) \|$", (ROOT / "docs" / "moving.md").read_text(), re.MULTILINE)
    checked = 0
    for *theirs, ours in (row for row in rows if "`" in row[3]):
        for keys, cell in zip(libraries.values(), theirs, strict=True):
            for key in re.findall(r"`([^`]+)`", cell):
                known = keys.get(key) or keys.get(f"actor_rollout_ref.{key}")
                assert known is not None, key
                assert known["ours"] is None or ours.startswith(f"`{known['ours'].split('.0.')[0]}"), (key, known, ours)
                checked += 1
    assert checked > 40


def test_what_is_wrong_is_found(tmp_path):
    """The tests above are no use if they find nothing, or accept anything."""
    page = tmp_path / "page.md"
    page.write_text(
        "```\ndualign eval winrate R\n```\n\n    dualign train quickstart \\\n        train.lr=1e-5 --dry-run  # a plan\n"
    )
    assert commands(page) == [["eval", "winrate", "R"], ["train", "quickstart", "train.lr=1e-5", "--dry-run"]]
    with pytest.raises(UserError, match=r"train\.lrr: no such key"):
        check_keys("train", ["mine.yaml", "train.lrr=1"])
    assert sum(len(commands(each)) for each in PAGES) > 80

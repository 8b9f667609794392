"""What every section of a configuration is: strict, frozen, with paths that hold from anywhere."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from dualign.common.paths import at_home


def fault_at(key: str, given: Any, error: ValueError) -> ValidationError:
    """What is wrong with one key of a section, for a validator of the whole section to raise."""
    fault = InitErrorDetails(type="value_error", loc=(key,), input=given, ctx={"error": error})
    return ValidationError.from_exception_data("settings", [fault])


def problems(error: ValidationError) -> list[str]:
    """What is wrong with the keys of a section, in words."""
    return [
        f"{'.'.join(map(str, e['loc']))}: {'no such key' if e['type'] == 'extra_forbidden' else e['msg']}"
        for e in error.errors()
    ]


def _names_a_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):  # a key itself must not get into copies of the configuration
        raise ValueError("expected the NAME of an environment variable in capitals, never the key itself")
    return name


VariableName = Annotated[str, AfterValidator(_names_a_variable)]
"""An environment variable's, which holds a secret."""


class Settings(BaseModel):
    """Strict and frozen. Of the keys that may hold a path (PATHS), one that begins with ~/ begins in the user's folder;
    other texts stay as they are."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    PATHS: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _at_home(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        held = {key: at_home(tree[key]) for key in cls.PATHS if isinstance(tree.get(key), str)}
        return {**tree, **held}

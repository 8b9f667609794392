"""A run's whole configuration: YAML recipe + `key.sub=value` overrides -> one strict model; bad keys named."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from dualign.algos import ALGORITHMS
from dualign.errors import UserError
from dualign.schema import Sections

AlgorithmConfig = Annotated[reduce(or_, ALGORITHMS.values()), Field(discriminator="name")]

"""dualign: align language models from online scalar rewards.

import dualign
run = dualign.train(dualign.load("quickstart", ["train.lr=1e-5"]), reward=my_function)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["StopRun", "UserError", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for, so that `import dualign` does not load torch."""
    if name == "train":
        from dualign.common import cpu

        cpu.tune()
        from dualign.trainer import train

        return train
    if name == "load":
        from dualign.config import load

        return load
    if name in ("UserError", "StopRun"):
        from dualign.common import errors

        return getattr(errors, name)
    raise AttributeError(f"module 'dualign' has no attribute {name!r}")

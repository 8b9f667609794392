"""dualign: align language models from online scalar rewards.

import dualign
run = dualign.train(dualign.load("quickstart", ["train.lr=1e-5"]), reward=my_function)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualign.algos import Algorithm, Batch
    from dualign.annotate.base import Annotator
    from dualign.annotate.settings import RewardSettings
    from dualign.common.errors import StopRun, UserError
    from dualign.config import Config, load
    from dualign.eval.evaluation import Evaluation
    from dualign.rollout.base import Sampler
    from dualign.rollout.settings import SamplerSettings
    from dualign.run.folder import Run
    from dualign.trainer import train
    from dualign.training.callbacks import Callback

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "Annotator",
    "Batch",
    "Callback",
    "Config",
    "Evaluation",
    "RewardSettings",
    "Run",
    "Sampler",
    "SamplerSettings",
    "StopRun",
    "UserError",
    "__version__",
    "load",
    "train",
]

if not TYPE_CHECKING:  # imported when they are asked for, so that `import dualign` does not load torch
    _PLACES = {
        "Algorithm": "algos",
        "Annotator": "annotate.base",
        "Batch": "algos",
        "Callback": "training.callbacks",
        "Config": "config",
        "Evaluation": "eval.evaluation",
        "RewardSettings": "annotate.settings",
        "Run": "run.folder",
        "Sampler": "rollout.base",
        "SamplerSettings": "rollout.settings",
        "StopRun": "common.errors",
        "UserError": "common.errors",
        "load": "config",
        "train": "trainer",
    }

    def __getattr__(name):
        if name not in _PLACES:
            raise AttributeError(f"module 'dualign' has no attribute {name!r}")
        from importlib import import_module

        from dualign.common import cpu

        cpu.tune()  # before torch is imported
        return getattr(import_module(f"dualign.{_PLACES[name]}"), name)

    def __dir__():
        return [*globals(), *_PLACES]

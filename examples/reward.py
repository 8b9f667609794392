"""A reward of one's own: an answer of at most `target` words that does not repeat itself.

In a recipe, beside others or alone:

    reward:
      - {type: examples/reward.py:Brevity, target: 40, weight: 0.5}

`dualign keys examples/reward.py:Brevity` prints its settings; `dualign train RECIPE --dry-run` checks them.
"""

from itertools import pairwise

from pydantic import Field

from dualign import RewardSettings


class Brevity(RewardSettings):
    """0 for up to `target` words, -1 for twice as many; less `repeats` for each word that is said again at once."""

    target: int = Field(80, ge=1, description="words that are enough")
    repeats: float = Field(0.5, ge=0, description="what a word costs that is said twice in a row")

    def build(self, run_dir=None):
        """A function in TRL's convention. An object with `name`, `open` and `close` (an Annotator) would do, too."""

        def brevity(completions, **columns):  # columns: every other column of the data, by its name
            return [self.score(c if isinstance(c, str) else c[-1]["content"]) for c in completions]

        return brevity

    def score(self, text):
        words = text.lower().split()
        excess = max(0, len(words) - self.target) / self.target
        stutter = sum(a == b for a, b in pairwise(words))
        return -excess - self.repeats * stutter

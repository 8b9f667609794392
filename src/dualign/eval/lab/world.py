"""A made-up language and its gold reward, both fixed by one seed.

A prompt names nouns. A sentence is clauses (noun verb noun) with a word of joining between them; its nouns keep to a
topic for a while, and often to the prompt's. What is good depends on both: each noun of the prompt likes some nouns
and dislikes others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import numpy as np

TOPICS, PER_TOPIC, VERBS, JOINS = 6, 4, 6, 4
NOUNS = TOPICS * PER_TOPIC
ASKED = 3  # nouns of a prompt
MAIN, BY_TOPIC, BY_NOUN = 0.3, 1.0, 0.3  # spread of how all, a topic's and single nouns of the prompt like a noun
ON_TOPIC, STAYS = 0.4, 0.7  # how often a sentence begins with a topic of the prompt, and a noun keeps the last one's
CONTENT = 0.7  # mean liking of the nouns of a sentence that is worth (1 + tanh 1) of at most 2
MARK = ":"  # ends a prompt


@dataclass(frozen=True)
class World:
    """All that a seed fixes. `clauses`: of the longest sentence of the language."""

    seed: int
    clauses: int
    words: tuple[str, ...]  # nouns by topic, then verbs, then joins
    share_NOUNS: np.ndarray  # of each noun within its topic
    verb_TV: np.ndarray  # how often each topic's nouns have each verb
    liking_PN: np.ndarray  # how a noun of the prompt likes a noun of the answer, within (-1, 1)
    number: dict[str, int] = field(default_factory=dict)  # of each word

    @staticmethod
    def of(seed: int, clauses: int) -> World:
        rng = np.random.default_rng([0x1AB, seed])
        syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
        pairs = rng.permutation(len(syllables) ** 2)[: NOUNS + VERBS + JOINS]
        words = tuple(syllables[i // len(syllables)] + syllables[i % len(syllables)] for i in pairs.tolist())
        share = rng.dirichlet(np.full(PER_TOPIC, 2.0), TOPICS).reshape(-1)
        verb_TV = rng.dirichlet(np.full(VERBS, 0.7), TOPICS)
        main_N = rng.normal(size=NOUNS) * MAIN
        topic_TT = rng.normal(size=(TOPICS, TOPICS)) * BY_TOPIC
        own_NN = rng.normal(size=(NOUNS, NOUNS)) * BY_NOUN
        main_N -= main_N.mean()
        topic_TT -= topic_TT.mean()
        liking_PN = np.tanh(main_N + topic_TT.repeat(PER_TOPIC, 0).repeat(PER_TOPIC, 1) + own_NN)
        return World(seed, clauses, words, share, verb_TV, liking_PN, {word: i for i, word in enumerate(words)})

    @property
    def tokens(self) -> int:
        """Of the longest sentence, with its end."""
        return 4 * self.clauses

    # ---- the language ----

    def prompt(self, rng: np.random.Generator) -> str:
        return " ".join([*(self.words[i] for i in rng.permutation(NOUNS)[:ASKED]), MARK])

    def sentence(self, prompt: str, rng: np.random.Generator) -> str:
        """What π_0 is taught to say."""
        asked = self.nouns(prompt)
        topic = int(rng.choice(asked)) // PER_TOPIC if rng.random() < ON_TOPIC else int(rng.integers(TOPICS))
        said: list[int] = []
        for clause in range(int(rng.integers(max(1, self.clauses // 2), self.clauses + 1))):
            if clause:
                said.append(NOUNS + VERBS + int(rng.integers(JOINS)))
            for part in ("noun", "verb", "noun"):
                if part == "verb":
                    said.append(NOUNS + int(rng.choice(VERBS, p=self.verb_TV[topic])))
                    continue
                topic = topic if rng.random() < STAYS else int(rng.integers(TOPICS))
                share = self.share_NOUNS[topic * PER_TOPIC : (topic + 1) * PER_TOPIC]
                said.append(topic * PER_TOPIC + int(rng.choice(PER_TOPIC, p=share)))
        return " ".join(self.words[i] for i in said)

    def nouns(self, text: str) -> list[int]:
        """The nouns of a text, in its order."""
        return [i for word in text.split() if (i := self.number.get(word, NOUNS)) < NOUNS]

    # ---- what is good ----

    def gold(self, prompt: str, answer: str) -> float:
        """(1 + tanh(liking)) · variety · grammar² - 1, within [-1, 1]. Liking adds up over the different nouns, each as
        the prompt's nouns like it in the mean; variety is the share of nouns that are not said again; grammar the share
        of steps from word to word, and to the end, that the language has."""
        nouns = self.nouns(answer)
        if not nouns:
            return -1.0
        different = sorted(set(nouns))
        liking = float(self.liking_PN[self.nouns(prompt)][:, different].mean(0).sum()) / (CONTENT * self.clauses)
        variety = len(different) / len(nouns)
        return (1 + float(np.tanh(liking))) * variety * self.grammar(answer) ** 2 - 1

    def grammar(self, answer: str) -> float:
        steps = list(self._steps(answer))
        return sum(steps) / len(steps)

    def _steps(self, answer: str) -> Iterator[bool]:
        """Of each word, and of the end, whether it may stand where it stands after the words before it. After a word out
        of place, the sentence goes on from that word."""
        place = 0  # of noun, verb, noun, join
        for word in answer.split():
            number = self.number.get(word, len(self.words))
            fits = (number < NOUNS, NOUNS <= number < NOUNS + VERBS, number < NOUNS, number >= NOUNS + VERBS)
            known = number < len(self.words)
            yield known and fits[place]
            place = ((place if fits[place] else fits.index(True)) + 1) % 4
        yield place == 3

    def best(self, prompt: str) -> str:
        """A sentence that is about as good as can be: the nouns that are liked best, each once."""
        liking_N = self.liking_PN[self.nouns(prompt)].mean(0)
        nouns = [self.words[i] for i in np.argsort(-liking_N)[: 2 * self.clauses].tolist()]
        verb, join = self.words[NOUNS], self.words[NOUNS + VERBS]
        pairs = zip(nouns[::2], nouns[1::2], strict=True)
        return f" {join} ".join(f"{one} {verb} {other}" for one, other in pairs)


@cache
def world(seed: int, clauses: int) -> World:
    return World.of(seed, clauses)


def gold(
    prompts: Sequence[str], completions: Sequence[str], world_seed: Sequence[int], clauses: Sequence[int], **rest: Any
) -> list[float]:
    """The gold reward, as a reward function: the columns of a prompt's row say which world it is of."""
    rows = zip(prompts, completions, world_seed, clauses, strict=True)
    return [world(seed, longest).gold(prompt, answer) for prompt, answer, seed, longest in rows]


def told(
    prompts: Sequence[str],
    completions: Sequence[str],
    world_seed: Sequence[int],
    clauses: Sequence[int],
    noise: Sequence[float],
    **rest: Any,
) -> list[float]:
    """Gold as a person tells it who is not sure: with noise of the extreme-value kind and this scale, so that of two
    answers the better one is preferred with probability σ(difference / noise), the Bradley-Terry model. The same answer
    to the same prompt is always told alike."""
    true = gold(prompts, completions, world_seed, clauses)
    found = []
    for value, scale, seed, prompt, answer in zip(true, noise, world_seed, prompts, completions, strict=True):
        about = np.frombuffer(f"{prompt} {answer}".encode(), np.uint8).tolist()
        found.append(value + scale * float(np.random.default_rng([seed, *about]).gumbel()))
    return found

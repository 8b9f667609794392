"""The shipped reward functions."""

import pytest

from dualign.rewards import own_words, relevance


def test_an_answer_about_the_question_beats_an_apology_and_the_question_said_back():
    question = [{"role": "user", "content": "How do I boil an egg so that the yolk stays soft?"}]
    answers = [
        "For a soft yolk, boil the egg for about six minutes, then cool it in cold water.",
        "I'm sorry, but I can't assist with that.",
        "How do I boil an egg so that the yolk stays soft?",
    ]
    good, apology, echo = relevance([question] * 3, [[{"role": "assistant", "content": a}] for a in answers])
    assert good > apology + 2 and good > echo + 2
    assert relevance([question[0]["content"]], [answers[0]]) == [good]


@pytest.mark.parametrize(
    ("answer", "own"),
    [
        ("Six minutes, then cold water.", "Six minutes, then cold water."),
        ("How do I boil an egg", ""),
        ("HOW DO I BOIL it?", "it"),
        ("To boil an egg so gently, wait.", "To gently wait"),
        ("An egg so warm", "An egg so warm"),  # three words in a row are no copy
        ("", ""),
    ],
)
def test_runs_of_the_questions_words_do_not_count(answer, own):
    assert own_words("How do I boil an egg so that the yolk stays soft?", answer) == own

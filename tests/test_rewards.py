"""The shipped reward functions."""

from dualign.rewards import relevance


def test_an_answer_about_the_question_beats_an_apology_and_repeating_it_gains_little():
    question = [{"role": "user", "content": "How do I boil an egg so that the yolk stays soft?"}]
    answers = [
        "For a soft yolk, boil the egg for about six minutes, then cool it in cold water.",
        "I'm sorry, but I can't assist with that.",
        "How do I boil an egg so that the yolk stays soft?",
    ]
    good, apology, echo = relevance([question] * 3, [[{"role": "assistant", "content": a}] for a in answers])
    assert good > apology + 2
    assert echo == 0 and echo - good < 1
    assert relevance([question[0]["content"]], [answers[0]]) == [good]

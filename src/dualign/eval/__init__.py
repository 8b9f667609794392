"""Evaluation: did the model get better, by how much, how sure is that, and did it cheat."""

"""Systems, settings and seeds side by side: a grid of runs from one YAML, and what they come to."""

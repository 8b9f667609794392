"""A laboratory: a small made-up language, a reward whose truth is known, and one learned from noisy preferences."""

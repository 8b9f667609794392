"""The policy, its log-probs, and the value model."""

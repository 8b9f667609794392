"""Sampling with transformers: our decode loop, and the model's own."""

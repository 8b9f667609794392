"""One optimizer step and all around it: rows in, checkpoints and evaluations out."""

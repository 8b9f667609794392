"""vLLM as the sampler: a server of its own, asked over HTTP."""

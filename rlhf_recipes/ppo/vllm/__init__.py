"""Completions sampled by vLLM: only the LoRA adapter travels, the base stays as it is on both sides."""

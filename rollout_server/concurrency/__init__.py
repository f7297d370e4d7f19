"""Threads, loops, deadlines and signals. Knows nothing of vLLM or of weights."""

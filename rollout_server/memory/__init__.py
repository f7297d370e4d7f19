"""What trainer and engine need of one GPU, reckoned before either has it. Imports no vLLM."""

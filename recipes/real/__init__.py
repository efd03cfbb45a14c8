"""A real language model that runs on a CPU: SmolLM2-135M-Instruct."""

"""Special decoding: compiled, with steered logits, with backtracking."""

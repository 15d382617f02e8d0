"""`finesteer generate` and `finesteer chat`: ask a model, unsteered and steered."""

"""`finesteer list`, `push`, `pull` and `convert`: adapters as files."""

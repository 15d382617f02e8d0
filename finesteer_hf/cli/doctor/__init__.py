"""`finesteer doctor`: what works here, on a model, with an adapter."""

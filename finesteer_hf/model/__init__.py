"""Models with the steering verbs."""

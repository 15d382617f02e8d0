"""`finesteer demo`."""

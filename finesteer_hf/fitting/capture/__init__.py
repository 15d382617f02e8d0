"""States of texts, read once, packed, and kept."""

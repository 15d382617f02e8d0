"""States of texts: read once, in packed rows, and stored."""

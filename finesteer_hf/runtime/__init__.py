"""What happens in a steered call: read the query, decide, update the streams."""

"""What happens in a steered call: the query is read and decided on, and streams are updated."""

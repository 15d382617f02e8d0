"""What an adapter is: its config, its tensors, its files, and the registry of methods. Knows no Hub."""

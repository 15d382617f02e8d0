"""One forward of the decoder: its stream, the window of its prompts, and the sites that it passes."""

"""Code that several methods share: search, strengths, objectives, training on preferences."""

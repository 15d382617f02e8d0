"""The built-in steering methods.

Nothing is imported here, so that methods may import what they need. Whoever asks the registry for a method has the modules
of `BUILT_IN` imported, and each registers its own.
"""

BUILT_IN = (
    "alphasteer",
    "angular",
    "bipo",
    "caa",
    "cast",
    "constant",
    "contrastive",
    "fasb",
    "finesteer",
    "florain",
    "inferaligner",
    "iti",
    "reps",
    "sadi",
    "swai",
    "tad",
    "task_driven",
    "truthflow",
    "was",
)

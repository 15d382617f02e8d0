"""The built-in steering methods.

Nothing is imported here, so that methods may import what they need. The registry imports the modules in `BUILT_IN`
when a method is looked up, and each registers its method.
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

"""The built-in steering methods; importing this package registers them."""

from finesteer_hf.methods import (
    alphasteer,
    angular,
    caa,
    cast,
    constant,
    contrastive,
    fasb,
    finesteer,
    florain,
    inferaligner,
    iti,
    sadi,
    swai,
    tad,
    task_driven,
    truthflow,
    was,
)


__all__ = [
    "alphasteer",
    "angular",
    "caa",
    "cast",
    "constant",
    "contrastive",
    "fasb",
    "finesteer",
    "florain",
    "inferaligner",
    "iti",
    "sadi",
    "swai",
    "tad",
    "task_driven",
    "truthflow",
    "was",
]

"""TAD with a recurrence, fitted on the toy."""

import functools

from finesteer_hf.methods.tad import TADConfig
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


N, NEW = 3, 10


def eager_model():
    model = toy_model()
    model.set_attn_implementation("eager")
    return model


@functools.cache
def fitted(attention=True, **settings):
    config = TADConfig(**{"layer": 1, "strength": 8.0, "recurrence": N, "attention": attention, **settings})
    return fit_on_toy(config, model=eager_model())[2]

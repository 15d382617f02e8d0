"""The page of `finesteer ui` as a Space: a model, and the adapters beside it that fit it."""

from __future__ import annotations

import os
from pathlib import Path

from finesteer_hf.cli.common import load
from finesteer_hf.errors import AdapterMismatchError
from finesteer_hf.ui.page import build_page, launch
from finesteer_hf.ui.workbench import Workbench


MODEL = os.environ.get("FINESTEER_MODEL", "playground")
PORT = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
HERE = Path(__file__).resolve().parent
# In a Space the adapters are in its own folder; in finesteer's repository they are beside this one.
PLACES = (HERE / "adapters", HERE.parent)

model, tokenizer = load(MODEL)
names = []
for config in sorted(file for place in PLACES for file in place.glob("*/steering_config.json")):
    name = config.parent.name
    try:
        model.load_steering(str(config.parent), name)
    except AdapterMismatchError:
        print(f"{name} was fitted for another model and is left out", flush=True)
    else:
        names.append(name)

page = build_page(Workbench(model, tokenizer, Path(MODEL).name, own=tuple(names), folders=False))
print(f"{MODEL} with {names} on {launch(page, host='0.0.0.0', port=PORT)}", flush=True)
page.block_thread()

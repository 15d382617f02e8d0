"""Does a gate read what prompts mean, or their form? AdvBench, XSTest's unsafe and safe prompts, a real model.

XSTest's safe prompts look like its unsafe ones, type by type, so a gate that fires on one and not on the other reads more
than the form. Fitted without XSTest, and with both sides of it, each type held out in turn.

    python -m benchmarks.estimators.gate_form --model FOLDER --gguf-file NAME.gguf --data FOLDER \\
        --out benchmarks/results/gate_form.md

`--data` holds safety/advbench.csv, safety/jailbreakbench.csv, xstest/xstest_v2_prompts.csv, truthfulqa/TruthfulQA.csv and
gsm8k/test.jsonl, as published.
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.estimators.gate_kinds import SITE, Prompts, StateData, doses, scores_of
from finesteer_hf.evaluation.data.safety import load_advbench, load_jailbreakbench, load_xstest
from finesteer_hf.evaluation.data.sources import read_rows
from finesteer_hf.evaluation.data.truthfulqa import load_truthfulqa
from finesteer_hf.fitting.capture.jobs import Job
from finesteer_hf.fitting.capture.reader import StateReader
from finesteer_hf.fitting.data.encoding import encode_prompts
from finesteer_hf.fitting.data.rows import PromptRow
from finesteer_hf.method_api import CaptureRequest
from finesteer_hf.methods.query_gate import GateFit, QueryGateConfig, fit_gate
from finesteer_hf.sites import Site


EPSILON = 0.10
# Types of safe prompts whose unsafe contrasts have another name.
CONTRAST = {
    "nons_group_real_discr": "discr",
    "real_group_nons_discr": "discr",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}
Sets = dict[str, Prompts]


def read_sets(model: Any, tokenizer: Any, data: Path, layers: Sequence[int]) -> dict[int, Sets]:
    """States of all prompts after each block."""
    xstest = load_xstest(data / "xstest" / "xstest_v2_prompts.csv")

    def type_of(category: str | None) -> str:
        plain = str(category).removeprefix("contrast_")
        return CONTRAST.get(plain, plain)

    texts = {
        "advbench": [(item.prompt, "advbench") for item in load_advbench(data / "safety" / "advbench.csv")][:200],
        "jailbreakbench": [
            (item.prompt, "jbb") for item in load_jailbreakbench(data / "safety" / "jailbreakbench.csv")
        ],
        "unsafe": [(item.prompt, type_of(item.category)) for item in xstest if item.harmful],
        "safe": [(item.prompt, type_of(item.category)) for item in xstest if not item.harmful],
        "general": [
            *((item.question, "truthfulqa") for item in load_truthfulqa(data / "truthfulqa" / "TruthfulQA.csv")[::2]),
            *((row["question"], "gsm8k") for row in read_rows(data / "gsm8k" / "test.jsonl")[:150]),
        ],
    }
    sites = tuple(Site("resid_post", layer) for layer in layers)
    reader = StateReader(model, CaptureRequest(sites, ("query",)))
    found: dict[int, Sets] = {layer: {} for layer in layers}
    for name, rows in texts.items():
        passages = encode_prompts(tokenizer, [PromptRow([{"role": "user", "content": text}]) for text, _ in rows])
        states: dict[Any, dict[Any, np.ndarray]] = {site: {} for site in sites}
        for batch in reader.read([Job(passage) for passage in dict.fromkeys(passages)]):
            for site in sites:
                states[site] |= dict(zip(batch.prompts, batch.states[site, "query"], strict=True))
        for site in sites:
            of_set = np.stack([states[site][passage] for passage in passages]).astype(np.float32)
            kinds = np.array([kind for _, kind in rows])
            found[site.layer][name] = Prompts([text for text, _ in rows], of_set, kinds)
    return found


def joined(*sets: Prompts) -> Prompts:
    return Prompts(
        [text for one in sets for text in one.texts],
        np.concatenate([one.states for one in sets]),
        np.concatenate([one.kinds for one in sets]),
    )


def halves(prompts: Prompts) -> tuple[Prompts, Prompts]:
    rows = np.arange(len(prompts.texts))
    return prompts.take(rows[rows % 2 == 0]), prompts.take(rows[rows % 2 == 1])


def judge(gate: GateFit, tests: Sets, figures: dict[str, list[float]]) -> None:
    """Note shares that fire (half a dose or more), and the AUROC of unsafe against safe prompts."""
    for name, prompts in tests.items():
        figures[name].append(float((doses(gate, prompts.states) >= 0.5).mean()))
    both = np.concatenate([scores_of(gate, tests[name].states).numpy() for name in ("unsafe", "safe")])
    truth = np.repeat([1, 0], [len(tests["unsafe"].texts), len(tests["safe"].texts)])
    figures["auroc"].append(float(roc_auc_score(truth, both)))


def fits_of(sets: Sets, config: QueryGateConfig, form: bool, with_xstest: bool) -> tuple[dict[str, list[float]], Any]:
    """Figures of each fit, and the last fit's report on form."""
    figures: dict[str, list[float]] = defaultdict(list)
    (advbench, others), (general, new) = halves(sets["advbench"]), halves(sets["general"])
    tests = {"advbench": others, "jailbreakbench": sets["jailbreakbench"], "general": new}
    if not with_xstest:
        gate = fit_gate(config, StateData(advbench, general, form=form), SITE)
        judge(gate, {**tests, "unsafe": sets["unsafe"], "safe": sets["safe"]}, figures)
        return figures, gate.report
    for kind in np.unique(sets["unsafe"].kinds):
        kept, held = (
            {
                name: sets[name].take(np.flatnonzero((sets[name].kinds == kind) == is_held))
                for name in ("unsafe", "safe")
            }
            for is_held in (False, True)
        )
        data = StateData(joined(advbench, kept["unsafe"]), joined(general, kept["safe"]), form=form)
        gate = fit_gate(config, data, SITE)
        judge(gate, {**tests, **held}, figures)
    return figures, gate.report


def table(found: dict[int, Sets]) -> list[str]:
    lines = [
        "| block | XSTest in the fit | calibrated on | form | AUROC, unsafe against safe | unsafe fire | safe fire "
        "| new AdvBench | JailbreakBench | TruthfulQA, GSM8K | form alone, AUROC |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for layer, sets in found.items():
        for with_xstest, calibration, form in (
            (False, "rows", True),
            (True, "rows", False),
            (True, "rows", True),
            (True, "kinds", False),
            (True, "kinds", True),
        ):
            config = QueryGateConfig(gate_epsilon=EPSILON, gate_calibration=calibration)  # type: ignore[arg-type]
            figures, report = fits_of(sets, config, form, with_xstest)
            names = ("unsafe", "safe", "advbench", "jailbreakbench", "general")
            shares = " | ".join(f"{np.mean(figures[name]):.0%}" for name in names)
            alone = f"{report['form']['auroc']:.3f}" if form else "-"
            lines.append(
                f"| {layer} | {'held out by type' if with_xstest else 'no'} | {calibration} | "
                f"{'weighed' if form else 'ignored'} | {np.mean(figures['auroc']):.2f} | {shares} | {alone} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--gguf-file", default=None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 16])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loading = {} if args.gguf_file is None else {"gguf_file": args.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **loading)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **loading).eval()
    found = read_sets(model, tokenizer, args.data, args.layers)
    name = args.gguf_file or Path(args.model).name
    text = [
        f"{name}: the default gate (score chosen, nominal miss rate {EPSILON:.0%}) fitted on 100 AdvBench requests against "
        "279 questions of TruthfulQA and GSM8K; with XSTest, seven of its eight types are in the fit too, unsafe and "
        "safe, and the eighth is judged (means over types). `form`: whether prompts that their form gives away weigh less "
        "and choices are made on prompts of the same form. The last column is what the form alone "
        "tells of the fit's two classes.",
        "",
        *table(found),
        "",
    ]
    if args.out is not None:
        args.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()

"""A server starts steered, or not at all."""

from __future__ import annotations

import importlib
import logging
import sys
import types

import fake_vllm
import pytest
import torch
from finesteer_vllm.adapters import AdapterError
from finesteer_vllm.seams import EXTENSION, SeamError
from test_vllm_engine import prompts, start

from finesteer_hf.interop import export_vllm
from finesteer_hf.testing.toy import toy_model


CHANGES = {
    "parallel_config.pipeline_parallel_size": 2,
    "parallel_config.use_ubatching": True,
    "parallel_config.prefill_context_parallel_size": 2,
    "parallel_config.worker_extension_cls": "",
    "compilation_config.pass_config.enable_sp": True,
    "speculative_config": object(),
    "kv_transfer_config": object(),
    "model_config.runner_type": "pooling",
    "use_v2_model_runner": True,
}


def runner_of(vllm, config):
    importlib.import_module("finesteer_vllm.worker")
    return vllm.GPUModelRunner(config, torch.device("cpu"))


@pytest.mark.parametrize("path", CHANGES)
def test_what_was_not_thought_through_is_refused_by_both_ends(vllm, exported, path) -> None:
    import finesteer_vllm.plugin

    finesteer_vllm.plugin.register()
    config = fake_vllm.vllm_config(exported, **{path: CHANGES[path]})
    with pytest.raises(SeamError, match=path.replace(".", r"\.")):
        vllm.InputProcessor(config)
    runner = runner_of(vllm, config)
    with pytest.raises(SeamError):
        runner.load_model(toy_model())
        runner._dummy_run(8)


def test_tensor_parallel_is_allowed(vllm, exported) -> None:
    runner_of(vllm, fake_vllm.vllm_config(exported, **{"parallel_config.tensor_parallel_size": 8})).load_model(
        toy_model()
    )


def test_a_setting_that_is_not_there_is_refused(vllm, exported) -> None:
    config = fake_vllm.vllm_config(exported)
    del config.parallel_config.use_ubatching
    with pytest.raises(SeamError, match=r"no parallel_config\.use_ubatching"):
        runner_of(vllm, config).load_model(toy_model())


def test_the_second_runner_is_refused(vllm, exported) -> None:
    importlib.import_module("finesteer_vllm.worker")
    with pytest.raises(SeamError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        vllm.SecondModelRunner(fake_vllm.vllm_config(exported)).load_model()
    vllm.SecondModelRunner(fake_vllm.vllm_config(None)).load_model()


@pytest.mark.parametrize(
    ("module", "name", "member"),
    [
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_prepare_inputs"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_dummy_run"),
        ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs"),
    ],
)
def test_another_vllm_stops_the_worker_at_its_import(vllm, module, name, member, monkeypatch) -> None:
    monkeypatch.setattr(getattr(sys.modules[module], name), member, lambda self, other: None)
    with pytest.raises(SeamError, match=member):
        importlib.import_module("finesteer_vllm.worker")


def test_a_missing_module_stops_the_worker_too(vllm, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.input_processor", types.ModuleType("empty"))
    with pytest.raises(SeamError, match=r"has no vllm\.v1\.engine\.input_processor\.InputProcessor"):
        importlib.import_module("finesteer_vllm.worker")


def test_servers_that_do_not_steer_go_on_with_another_vllm(vllm, monkeypatch, caplog) -> None:
    import finesteer_vllm.plugin

    monkeypatch.setitem(sys.modules, "vllm.v1.engine.input_processor", types.ModuleType("empty"))
    with caplog.at_level(logging.WARNING, logger="vllm.finesteer"):
        finesteer_vllm.plugin.register()
    assert "does nothing in this process" in caplog.text


@pytest.mark.parametrize("path", ["requests", "query_start_loc", "input_batch"])
def test_a_runner_without_its_parts_is_refused(vllm, exported, path) -> None:
    runner = runner_of(vllm, fake_vllm.vllm_config(exported))
    delattr(runner, path)
    with pytest.raises(SeamError, match=path):
        runner.load_model(toy_model())


def test_a_runner_of_another_platform_is_refused(vllm, exported) -> None:
    importlib.import_module("finesteer_vllm.worker")

    class OwnInputs(vllm.GPUModelRunner):
        def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
            pass

    class OwnLoading(vllm.GPUModelRunner):
        def load_model(self, hf_model):
            self.model = hf_model

    config = fake_vllm.vllm_config(exported)
    with pytest.raises(SeamError, match="OwnInputs has a _prepare_inputs of its own"):
        OwnInputs(config, torch.device("cpu")).load_model(toy_model())
    past = OwnLoading(config, torch.device("cpu"))
    past.load_model(toy_model())
    with pytest.raises(SeamError, match="OwnLoading has loaded its model past the plugin"):
        past._dummy_run(8)


def test_an_unknown_block_is_refused(vllm, exported, monkeypatch) -> None:
    runner = runner_of(vllm, fake_vllm.vllm_config(exported))
    monkeypatch.setattr("finesteer_vllm.worker.KNOWN_BLOCKS", ("OtherDecoderLayer",))
    with pytest.raises(SeamError, match=r"0 lists of 3 decoder blocks of a known kind \(OtherDecoderLayer\)"):
        runner.load_model(toy_model())


@pytest.mark.parametrize(
    ("attribute", "value"), [("num_hidden_layers", 4), ("hidden_size", 64), ("model_type", "qwen3")]
)
def test_another_base_is_refused_with_both_sides(vllm, exported, attribute, value) -> None:
    config = fake_vllm.vllm_config(exported)
    runner = runner_of(vllm, config)
    model = toy_model()
    setattr(config.model_config.hf_text_config, attribute, value)
    with pytest.raises((AdapterError, SeamError), match=str(value)):
        runner.load_model(model)


def test_the_extension_alone_is_refused(vllm) -> None:
    config = fake_vllm.vllm_config(None, **{"parallel_config.worker_extension_cls": EXTENSION})
    with pytest.raises(SeamError, match="without adapters: give --additional-config"):
        runner_of(vllm, config).load_model(toy_model())


def test_a_list_of_plugins_without_this_one_is_refused(vllm, exported, monkeypatch) -> None:
    runner = runner_of(vllm, fake_vllm.vllm_config(exported))
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    with pytest.raises(SeamError, match="VLLM_PLUGINS leaves 'finesteer' out"):
        runner.load_model(toy_model())
    monkeypatch.setenv("VLLM_PLUGINS", "other,finesteer")
    runner.load_model(toy_model())


def test_a_request_that_no_front_end_checked_is_not_run(vllm, exported) -> None:
    engine = start(vllm, exported)
    engine.add("one", prompts(1)[0])
    engine.waiting[0].request.sampling_params.extra_args = {"steering": "caa"}
    with pytest.raises(RuntimeError, match="was not checked by a front end with this plugin"):
        engine.run()


def test_front_end_and_worker_have_the_same_files(vllm, exported, toy_adapters, tmp_path) -> None:
    folder = export_vllm(toy_adapters["caa"], tmp_path / "caa")
    engine = start(vllm, {"caa": str(folder)})
    changed = type(toy_adapters["caa"])(toy_adapters["caa"].config, {"vector": torch.ones(32)})
    export_vllm(changed, folder)
    late = vllm.InputProcessor(fake_vllm.vllm_config({"caa": str(folder)}))
    engine.processor = late
    engine.add("one", prompts(1)[0], steering="caa")
    with pytest.raises(RuntimeError, match="with this plugin and these files"):
        engine.run()


def test_compiled_models_are_cached_by_what_is_hooked(vllm, exported) -> None:
    def key(names: list[str]) -> str:
        config = fake_vllm.vllm_config({name: exported[name] for name in names})
        runner_of(vllm, config).load_model(toy_model())
        return config.additional_config["finesteer"]["hooked"]

    assert key(["caa"]) == key(["caa"])
    assert len({key(["caa"]), key(["several"]), key(["caa", "several"])}) == 3

"""Requests are checked as they come in, and are cached under a salt of their own."""

from __future__ import annotations

import math

import fake_vllm
import pytest
from finesteer_vllm.adapters import read_config
from finesteer_vllm.requests import Asked, SteeringRequestError, asked_of, cache_salt


PROMPT = [2, 4, 9, 11, 5]
REFUSED = [
    ({"steering": "truthfull"}, r"no steering adapter 'truthfull' on this server\. Served: \['caa', 'several'\]"),
    ({"steering": ["caa", "several"]}, "must be the name of one adapter"),
    ({"steering": "caa", "steering_scale": math.nan}, "must be a finite number"),
    ({"steering": "caa", "steering_scale": True}, "must be a finite number"),
    ({"steering": "caa", "steering_scale": "2"}, "must be a finite number"),
    ({"steering": "caa", "steering_strength": 2.0}, r"Unknown arguments \['steering_strength'\]"),
    ({"steering": "caa", "steering_admitted": "salt"}, "Unknown arguments"),
    ({"steering_scale": 2.0}, "without 'steering'"),
]


@pytest.fixture
def front_end(vllm, exported):
    import finesteer_vllm.plugin

    finesteer_vllm.plugin.register()
    return vllm.InputProcessor(fake_vllm.vllm_config({name: exported[name] for name in ("caa", "several")}))


def submit(front_end, prompt=PROMPT, **kwargs):
    extra = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("steering")}
    return front_end.process_inputs("id", prompt, fake_vllm.SamplingParams(8, extra or None), **kwargs)


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_request_that_cannot_be_honoured_is_refused(front_end, arguments: dict, message: str) -> None:
    with pytest.raises(SteeringRequestError, match=message):
        submit(front_end, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": {"prompt_embeds": object()}}, "needs a prompt of token ids"),
        ({"resumable": True}, "no last token"),
        ({"lora_request": object()}, "a LoRA cannot go together"),
    ],
)
def test_prompts_that_have_no_query_are_refused(front_end, arguments: dict, message: str) -> None:
    with pytest.raises(SteeringRequestError, match=message):
        submit(front_end, steering="caa", **arguments)
    submit(front_end, **arguments)


def test_a_server_without_adapters_refuses_steering(vllm) -> None:
    import finesteer_vllm.plugin

    finesteer_vllm.plugin.register()
    plain = vllm.InputProcessor(fake_vllm.vllm_config(None))
    with pytest.raises(SteeringRequestError, match=r"Served: \[\]"):
        submit(plain, steering="caa")
    assert submit(plain).cache_salt is None
    # What only begins likewise may be another plugin's.
    assert submit(plain, steering_vector="a").sampling_params.extra_args == {"steering_vector": "a"}


def test_the_plugin_registers_once(vllm, exported) -> None:
    import finesteer_vllm.plugin

    finesteer_vllm.plugin.register()
    wrapped = vllm.InputProcessor.process_inputs
    finesteer_vllm.plugin.register()
    assert vllm.InputProcessor.process_inputs is wrapped


def test_the_callers_parameters_stay_as_they_are(front_end, exported) -> None:
    params = fake_vllm.SamplingParams(8, {"steering": "caa", "other": 1})
    for _ in range(2):
        request = front_end.process_inputs("id", PROMPT, params)
        assert request.sampling_params.extra_args == {
            "steering": "caa",
            "other": 1,
            "steering_admitted": read_config(exported["caa"]).salt,
        }
    assert params.extra_args == {"steering": "caa", "other": 1}


def test_what_is_not_steered_is_shared_as_ever(front_end) -> None:
    assert submit(front_end).cache_salt is None
    assert submit(front_end, steering=None).cache_salt is None
    assert submit(front_end, steering="caa", steering_scale=0).cache_salt is None
    given = {"prompt_token_ids": PROMPT, "cache_salt": "tenant"}
    assert submit(front_end, given).cache_salt == "tenant"


def test_a_salt_is_of_adapter_scale_prompt_and_the_given_salt(front_end) -> None:
    def salt(prompt=tuple(PROMPT), name="caa", scale=1.0, given=None):
        content = {"prompt_token_ids": list(prompt), "cache_salt": given}
        return submit(front_end, content, steering=name, steering_scale=scale).cache_salt

    assert salt() == salt() == salt(scale=1)
    others = [
        salt(),
        salt(name="several"),
        salt(scale=1.5),
        salt((*PROMPT, 7)),
        salt(PROMPT[:-1]),
        salt(given="tenant"),
    ]
    assert None not in others and len(set(others)) == len(others)


def test_salts_do_not_depend_on_the_process() -> None:
    assert cache_salt(Asked("a", 1.0), "salt", [1, 2], None) == (
        "finesteer-78b52b952943e1fc67285129325b7b5ada8f599db1a49b139767a4c98f020b65"
    )


def test_scale_zero_is_no_steering_but_the_name_counts() -> None:
    assert asked_of({"steering": "caa", "steering_scale": 0.0}, ["caa"]) is None
    with pytest.raises(SteeringRequestError, match="'other'"):
        asked_of({"steering": "other", "steering_scale": 0.0}, ["caa"])
    assert asked_of({"steering": "caa"}, ["caa"]) == Asked("caa", 1.0)
    assert asked_of({"kv_transfer_params": {}}, []) is asked_of(None, []) is None

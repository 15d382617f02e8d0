"""WAS against the paper's equations, written out, its sigmoid against the published code's logit, and what is learned."""

import dataclasses

import numpy as np
import pytest
import torch
from planted import PlantedData

from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.fitting import fit_steering
from finesteer_hf.methods.was import WAS, WASConfig, split_layers, train_controller
from finesteer_hf.testing import toy_model, toy_preferences
from finesteer_hf.testing.conformance import fit_on_toy


READS, WRITES, D = [0], [1, 2], 32


def some_adapter(strength=3.0, reads=READS, writes=WRITES, **fields):
    rng = np.random.default_rng(0)
    config = WASConfig(
        read_layers=reads, layers=writes, width=8, strength=strength, hidden_size=D, num_hidden_layers=3, **fields
    )
    shapes = WAS.tensor_shapes(config)
    tensors = {name: torch.from_numpy(0.3 * rng.normal(size=shape)).float() for name, shape in shapes.items()}
    return WAS(config, tensors)


def by_hand(x, tensors, official=False):
    """m w_l in ten lines of numpy."""
    own = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    hidden = np.maximum(x @ own["hidden.weight"].T + own["hidden.bias"], 0)
    out = hidden @ own["out.weight"].T + own["out.bias"]
    sigmoid = 1 / (1 + np.exp(-out))
    m = out[..., :1] if official else sigmoid[..., :1]
    return m * sigmoid[..., 1:]


@pytest.mark.parametrize("compat", [None, "official"])
def test_pushes_are_the_paper_s(compat):
    adapter = some_adapter(compat=compat)
    x = np.random.default_rng(1).normal(size=(5, D))
    got = adapter.pushes(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(got, by_hand(x, adapter.tensors, compat == "official"), atol=1e-5)


def test_the_logit_of_the_published_code_pushes_harmless_prompts_the_other_way():
    paper, code = some_adapter(), some_adapter(compat="official")
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    assert (paper.pushes(x) > 0).all()
    backwards = (code.pushes(x) < 0).all(dim=1)
    assert 0.05 < backwards.float().mean() < 0.95
    # It is negative exactly where the paper's magnitude is below one half.
    own = paper.tensors
    a = torch.relu(x @ own["hidden.weight"].T + own["hidden.bias"]) @ own["out.weight"][0] + own["out.bias"][0]
    assert torch.equal(backwards, torch.sigmoid(a) < 0.5)


def steered_by_hooks(ids, start, processor):
    """Every token from the query on, by hooks on the blocks' outputs."""
    plain, kept = toy_model(), {}
    named = (torch.arange(ids.shape[1]) >= start)[None, :, None]

    def read(module, args, out):
        kept["x"] = out

    def write(number):
        def push(module, args, out):
            pushes = torch.from_numpy(by_hand(kept["x"].double().numpy(), processor.tensors)).float()
            return (
                out + named * processor.strength * pushes[..., number, None] * processor.tensors["directions"][number]
            )

        return push

    plain.model.layers[0].register_forward_hook(read)
    for number, layer in enumerate(WRITES):
        plain.model.layers[layer].register_forward_hook(write(number))
    with torch.no_grad():
        return plain(ids).logits


def test_each_token_is_pushed_by_its_own_states():
    processor = some_adapter()
    ids = torch.randint(6, 54, (2, 9), generator=torch.Generator().manual_seed(1))
    model = SteeredModelForCausalLM.from_model(toy_model())
    with torch.no_grad(), model.steering_with([processor]):
        got = model(ids, prompt_lengths=torch.tensor([5, 5])).logits
    torch.testing.assert_close(got, steered_by_hooks(ids, 4, processor), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        unsteered = toy_model()(ids).logits
    assert torch.equal(got[:, :4], unsteered[:, :4])
    assert not torch.allclose(got[:, 4:], unsteered[:, 4:], atol=0.1)


def test_standardisation_is_folded_into_the_first_layer():
    rng = np.random.default_rng(0)
    wanted = np.repeat([1.0, 0.0], 60).astype(np.float32)
    states = (rng.normal(size=(120, 6)) * 50 + 300 + 40 * wanted[:, None]).astype(np.float32)
    config = WASConfig(width=8, epochs=60, learning_rate=1e-2)
    tensors = train_controller(states, wanted, 2, config, 0)
    mean, scale = states.mean(0), states.std(0, ddof=1)
    moved = train_controller(((states - mean) / scale).astype(np.float32), wanted, 2, config, 0)
    np.testing.assert_allclose(
        by_hand(states.astype(float), tensors), by_hand((states - mean) / scale, moved), atol=1e-3
    )
    weights = by_hand(states.astype(float), tensors, official=True)
    assert ((weights[:60] > 0).mean() > 0.8) and ((weights[60:] < 0).mean() > 0.8)


def test_training_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    states = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    train_controller(states, np.repeat([1.0, 0.0], 10).astype(np.float32), 1, WASConfig(width=4, epochs=2), 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("direction", ["embeddings", "answers"])
def test_the_controller_pushes_the_rows_prompts_and_barely_the_general_ones(direction):
    _, _, adapter = fit_on_toy(WASConfig(strength=20.0, direction=direction, epochs=200))
    figures = adapter.config.fit["report"]["controller"]
    assert adapter.config.read_layers == [0] and adapter.config.layers == [1, 2]
    assert figures["auroc"] > 0.9
    assert figures["queries_mean"] > 2 * figures["general_mean"] > 0
    norms = adapter.tensors["directions"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))


def test_wrapped_requests_are_refused_and_general_prompts_answered_as_before():
    model, tokenizer = playground.load()
    rows = playground.preference_rows("safety", "fit")[::4]
    general = playground.general_rows("fit")[::4]
    adapter = fit_steering(model, tokenizer, rows, WASConfig(strength=38.0), general_dataset=general, progress=False)
    SteeredModelForCausalLM.from_model(model, steering=adapter)
    unseen = {row["id"] for row in playground.preference_rows("safety", "test")}
    items = [item for item in playground.world().harmful if item.id in unseen][::15][:40]
    others = [row["prompt"][0]["content"] for row in playground.general_rows("test")[::15]][:40]

    def ask(prompts):
        return playground.answers(model, tokenizer, prompts, max_new_tokens=24)

    def refused():
        return np.mean(
            [playground.is_refusal(i, a) for i, a in zip(items, ask([i.prompt for i in items]), strict=True)]
        )

    steered, said = refused(), ask(others)
    with model.disable_steering():
        assert refused() < 0.1
        assert np.mean([a == b for a, b in zip(said, ask(others), strict=True)]) > 0.95
    assert steered > 0.8


def test_the_paper_s_direction_is_that_of_the_input_embeddings():
    model, tokenizer, adapter = fit_on_toy(WASConfig(direction="embeddings", strength=1.0))
    table = model.get_input_embeddings().weight.detach()
    sides = []
    for side in ("chosen", "rejected"):
        means = [table[tokenizer(row[side], add_special_tokens=False).input_ids].mean(0) for row in toy_preferences()]
        sides.append(torch.stack(means))
    # The fit leaves validation rows out, so the directions agree only nearly.
    expected = sides[0].mean(0) - sides[1].mean(0)
    assert torch.cosine_similarity(adapter.tensors["directions"][0], expected, dim=0) > 0.95
    assert torch.equal(adapter.tensors["directions"][0], adapter.tensors["directions"][1])


def test_without_general_prompts_there_is_nothing_to_tell_apart():
    with pytest.raises(DatasetError, match="general_dataset"):
        WAS.fit(PlantedData(general=0), WASConfig(width=4, epochs=1))


@pytest.mark.parametrize(
    ("given", "layers", "expected"),
    [
        ({}, 32, ([12, 13, 14, 15], list(range(16, 26)))),
        ({}, 3, ([0], [1, 2])),
        ({}, 2, ([0], [1])),
        ({"layers": [5, 9]}, 12, ([1, 2, 3, 4], [5, 9])),
        ({"read_layers": [2]}, 6, ([2], [3, 4])),
        ({"read_layers": [4]}, 6, ([4], [5])),
    ],
)
def test_reads_come_before_writes(given, layers, expected):
    assert split_layers(WASConfig(**given), layers) == expected


@pytest.mark.parametrize("given", [{"layers": [0]}, {"read_layers": [5]}])
def test_layers_without_a_block_to_read_or_steer_are_refused(given):
    with pytest.raises(ValueError, match="read"):
        split_layers(WASConfig(**given), 6)


def test_the_last_blocks_of_the_published_code_cannot_steer_all_blocks():
    with pytest.raises(ValueError, match="must come before"):
        WASConfig(read_layers=[28, 29, 30, 31], layers=list(range(32)))


def test_files_of_the_published_form_must_be_understood():
    _, _, adapter = fit_on_toy(WASConfig(strength=1.0, compat="official", epochs=1))
    assert adapter.config.requires == ["compat:official"]
    assert WASConfig.understands == {"compat:official"}


def test_missing_tensors_are_named():
    whole = some_adapter()
    tensors = {name: tensor for name, tensor in whole.tensors.items() if name != "out.bias"}
    with pytest.raises(AdapterFileError, match=r"out\.bias"):
        WAS(whole.config, tensors)
    with pytest.raises(AdapterFileError, match="not fitted"):
        WAS(dataclasses.replace(whole.config, layers="auto"), whole.tensors)


@pytest.mark.parametrize("field", [{"direction": "random"}, {"width": 0}, {"weight_pull": -1.0}, {"compat": "code"}])
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        WASConfig(**field)

"""ANGULAR against the papers' formulas, written out."""

import math

import numpy as np
import pytest
import torch

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.methods.angular import Angular, AngularConfig, find_plane, rotate
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


def plane_and_states(width=16, rows=40):
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(width, 2, generator=generator)).Q.T.contiguous()
    return plane, torch.randn(rows, width, generator=generator)


def test_turning_to_an_angle_is_the_paper_s_formula():
    plane, h = plane_and_states()
    b1, b2 = plane
    angle = 2.0
    inside = h @ plane.T @ plane
    direction = math.cos(angle) * b1 + math.sin(angle) * b2
    expected = h - inside + inside.norm(dim=1, keepdim=True) * direction
    torch.testing.assert_close(rotate(h, plane, angle), expected)
    adaptive = torch.where((h @ b1)[:, None] > 0.3, expected, h)
    torch.testing.assert_close(rotate(h, plane, angle, mode="adaptive", threshold=0.3), adaptive)


def test_turning_by_an_angle_is_the_paper_s_matrix():
    plane, h = plane_and_states()
    b1, b2 = plane
    angle = -0.7
    rotation = math.cos(angle) * (torch.outer(b1, b1) + torch.outer(b2, b2))
    rotation = rotation + math.sin(angle) * (torch.outer(b2, b1) - torch.outer(b1, b2))
    expected = h - h @ plane.T @ plane + h @ rotation.T
    torch.testing.assert_close(rotate(h, plane, angle, mode="selective"), expected)


@pytest.mark.parametrize("mode", ["angular", "adaptive", "selective"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_norms_are_kept_at_every_share(mode, share):
    plane, h = plane_and_states()
    turned = rotate(h, plane, 2.5, share, mode=mode)
    torch.testing.assert_close(turned.norm(dim=1), h.norm(dim=1))


def test_half_precision_is_rotated_in_float32():
    plane, h = plane_and_states(width=512)
    turned = rotate(h.bfloat16(), plane, 1.0, mode="selective")
    assert turned.dtype == torch.bfloat16
    expected = rotate(h.bfloat16().float(), plane, 1.0, mode="selective").bfloat16()
    assert torch.equal(turned, expected)


def test_the_plane_is_the_central_direction_and_the_first_component():
    rng = np.random.default_rng(0)
    sides = [(rng.normal(size=(30, 8)) + 2 * np.eye(8)[0], rng.normal(size=(30, 8))) for _ in range(4)]
    plane = find_plane(sides)
    np.testing.assert_allclose(plane @ plane.T, np.eye(2), atol=1e-12)
    candidates = [a.mean(0) - b.mean(0) for a, b in sides]
    candidates = [c / np.linalg.norm(c) for c in candidates]
    likeness = [sum(a @ b for b in candidates) for a in candidates]
    np.testing.assert_allclose(plane[0], candidates[int(np.argmax(likeness))])
    # One layer: the component is that of the rows.
    np.testing.assert_allclose(find_plane(sides[:1]) @ find_plane(sides[:1]).T, np.eye(2), atol=1e-12)


def test_the_model_is_turned_as_a_plain_hook_turns_it():
    _, _, adapter = fit_on_toy(AngularConfig(layers=[0, 1], strength=0.5))
    plain = toy_model()
    plane, angle = adapter.tensors["plane"], math.radians(adapter.config.angle)
    assert adapter.config.angle == 180
    for layer in (0, 1):
        plain.model.layers[layer].register_forward_hook(lambda m, a, out: rotate(out, plane, angle, 0.5))
    steered = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    ids = torch.arange(6, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(steered(ids).logits, plain(ids).logits)


def test_selective_keeps_layers_that_separate_the_sides():
    _, _, adapter = fit_on_toy(AngularConfig(mode="selective", strength=1.0), seed=4)
    table = {row["layer"]: row for row in adapter.config.fit["report"]["layers"]}
    apart = [n for n, row in table.items() if row["chosen_projection"] * row["rejected_projection"] < 0]
    assert adapter.config.layers == apart
    assert len(apart) < len(table)
    with pytest.raises(DatasetError, match="opposite signs"):
        fit_on_toy(AngularConfig(mode="selective", strength=1.0), seed=0)


def test_a_plane_that_would_change_norms_is_refused():
    config = AngularConfig(layers=[0], angle=90.0, strength=1.0, hidden_size=4, num_hidden_layers=2)
    with pytest.raises(AdapterFileError, match="orthonormal"):
        Angular(config, {"plane": torch.ones(2, 4)})


@pytest.mark.parametrize(
    "field", [{"mode": "spin"}, {"layers": [2, 1]}, {"layers": []}, {"angle": "left"}, {"strength": "norm:1"}]
)
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        AngularConfig(**field)

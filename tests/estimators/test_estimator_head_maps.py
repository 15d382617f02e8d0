"""Maps into ellipsoids against FLORAIN's formulas in numpy, and what their training finds."""

import numpy as np
import torch

from finesteer_hf.estimators.head_maps import HeadMap, Regions, WantedStates, region_loss, train_head_maps


def random_map(heads=2, size=5, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(heads, size, rank, generator=generator) for _ in range(3)]
    return HeadMap(*parts, torch.randn(heads, size, generator=generator))


def test_the_map_is_the_paper_s():
    maps, states = random_map(), torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1))
    got = states + maps.displacement(states)
    for head in range(2):
        w, b, r = (part[head].double().numpy() for part in (maps.weight, maps.bias, maps.readout))
        for row in range(4):
            a = states[row, head].double().numpy()
            factor = np.array([[np.tanh(a[i] * w[i, j] + b[i, j]) for j in range(3)] for i in range(5)])
            np.testing.assert_allclose(got[row, head], a + factor @ r.T @ a + maps.shift[head].numpy(), atol=1e-5)


def test_a_map_of_scaled_states_is_converted_back():
    maps, scale = random_map(), torch.tensor([0.5, 3.0])
    states = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1))
    expected = scale[:, None] * maps.displacement(states / scale[:, None])
    torch.testing.assert_close(maps.rescaled(scale).displacement(states), expected)


def few_answers(seed=0):
    """Answers to four questions, with two to four wanted and one or two unwanted ones each."""
    rng = np.random.default_rng(seed)
    questions = np.repeat(np.arange(4), [3, 5, 4, 6])
    wanted = np.concatenate([np.arange(n) < n - 1 - n // 5 for n in (3, 5, 4, 6)])
    return rng.normal(size=(18, 2, 3)) + wanted[:, None, None], wanted, questions


def test_regions_and_loss_are_the_published_ones():
    states, wanted, questions = few_answers()
    common = WantedStates.of(states, wanted, questions)
    regions = common.regions(states, wanted, questions, delta=2.0, alpha=0.2, shrink=1.5)
    loss = region_loss(*(torch.from_numpy(x) for x in (states, regions.centre, regions.radius, common.whitening)))
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    for head in range(2):
        a = states[:, head]
        precision = common.whitening[head].T @ common.whitening[head]
        shift = a[wanted].mean(0) - a[~wanted].mean(0)
        expected = []
        for row, question in enumerate(questions):
            good, bad = a[wanted & (questions == question)], a[~wanted & (questions == question)]
            mean = good.mean(0)
            step = 0.2 * unit(mean - bad.mean(0)) + 0.8 * unit(shift)
            rho = max((x - mean) @ precision @ (x - mean) for x in good) / 1.5
            far = a[row] - (mean + 2.0 * np.linalg.norm(shift) * step)
            expected.append(max(np.sqrt(far @ precision @ far) - np.sqrt(rho), 0) ** 2)
        np.testing.assert_allclose(loss[head], np.mean(expected), rtol=1e-6)


def test_the_covariance_is_that_within_questions():
    rng = np.random.default_rng(0)
    questions = np.repeat(np.arange(200), 11)
    wanted = np.tile(np.arange(11) < 10, 200)
    # Questions lie far apart along the first axis; within them the second is the wide one.
    states = rng.normal(size=(2200, 1, 2)) * [1.0, 3.0] + 50 * rng.normal(size=200)[questions, None, None] * [1.0, 0.0]
    whitening = WantedStates.of(states, wanted, questions).whitening[0]
    np.testing.assert_allclose(np.linalg.inv(whitening.T @ whitening), [[0.9, 0], [0, 8.1]], atol=0.6)


def test_questions_with_one_wanted_answer_aim_at_a_point():
    states, wanted, questions = few_answers()
    one = np.unique(np.stack([questions, wanted]), axis=1, return_index=True)[1]
    common = WantedStates.of(states[one], wanted[one], questions[one])
    regions = common.regions(states[one], wanted[one], questions[one], delta=0.0, alpha=0.2, shrink=1.0)
    assert not regions.radius.any()
    np.testing.assert_allclose(regions.centre[wanted[one]], states[one][wanted[one]])


def test_training_finds_what_a_linear_map_cannot():
    """The wanted state is a + |a_0| e_0: even in a, so constants and linear maps cannot reach it."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 1, 3))
    centre = states + np.abs(states[:, :, :1]) * [1.0, 0.0, 0.0]
    regions = Regions(centre, np.zeros((300, 1)))
    trained = train_head_maps(
        states[:200],
        Regions(centre[:200], regions.radius[:200]),
        states[200:],
        Regions(centre[200:], regions.radius[200:]),
        np.eye(3)[None],
        rank=4,
        epochs=150,
        batch_size=50,
        learning_rate=1e-2,
        generator=torch.Generator().manual_seed(0),
    )
    inputs = np.column_stack([states[:, 0], np.ones(300)])
    linear = np.linalg.lstsq(inputs[:200], centre[:200, 0], rcond=None)[0]
    linear_loss = np.square(inputs[200:] @ linear - centre[200:, 0]).sum(1).mean()
    assert min(trained.held_out) < linear_loss / 20
    assert trained.training[-1] < trained.training[0] / 20

"""Random numbers are functions of a key and the sample."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.core.rng import MASK, SampleRNG, _mix, _mix_tensor, fold_seed, signed

integers = st.integers(0, MASK)


@given(st.lists(integers, min_size=1, max_size=8))
def test_tensors_mix_as_integers_do(values: list[int]) -> None:
    mixed = _mix_tensor(torch.tensor([signed(value) for value in values]))
    assert mixed.tolist() == [signed(_mix(value)) for value in values]


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=2, unique=True), st.integers(0, 2**31))
def test_keys_differ_by_every_part_and_their_order(parts: list[int], seed: int) -> None:
    a, b = parts
    assert len({fold_seed(seed, a, b), fold_seed(seed, b, a), fold_seed(seed, a), fold_seed(seed, a, b, 0)}) == 4


@given(st.permutations(range(6)), st.integers(1, 5), st.integers(1, 9))
def test_a_sample_has_the_same_random_numbers_in_any_batch(order: list[int], cut: int, n: int) -> None:
    def draw(index: list[int]) -> torch.Tensor:
        rng = SampleRNG(3, 1, index=torch.tensor(index))
        return torch.cat([rng.uniform(n), rng.normal(2, n).flatten(1), rng.uniform(1)], dim=1)

    together = draw(list(range(6)))
    parts = torch.cat([draw(order[:cut]), draw(order[cut:])])
    assert torch.equal(parts, together[torch.tensor(order)])


def test_padding_has_the_random_numbers_of_its_sample() -> None:
    assert torch.equal(
        SampleRNG(1, index=torch.tensor([~5])).normal(4), SampleRNG(1, index=torch.tensor([5])).normal(4)
    )


def test_random_numbers_are_uniform_and_normal() -> None:
    index = torch.arange(2000)
    for other in (SampleRNG(0, 0, index=index), SampleRNG(0, 1, index=index), SampleRNG(1, 0, index=index)):
        u = other.uniform(500).double()  # 10^6 numbers: five standard errors allowed
        z = other.normal(500).double()
        assert u.min() >= 0 and u.max() < 1
        for value, mean, variance in ((u, 0.5, 1 / 12), (z, 0.0, 1.0), (z**2, 1.0, 2.0), (z**3, 0.0, 15.0)):
            assert abs(value.mean() - mean) < 5 * (variance / value.numel()) ** 0.5
        # Neither neighbouring samples, nor neighbouring numbers, nor epochs are correlated.
        for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z, SampleRNG(0, 7, index=index).normal(500).double())):
            assert abs((a * b).mean()) < 5 / a.numel() ** 0.5


def test_each_call_gives_new_numbers_without_a_global_generator() -> None:
    before = torch.get_rng_state()
    rng = SampleRNG(0, index=torch.arange(3))
    assert not torch.equal(rng.normal(4), rng.normal(4))
    assert torch.equal(before, torch.get_rng_state())

"""Data order and random numbers that depend on (seed, epoch, index) alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from involution.engine.sampling import RandomStates, ResumableSampler, SampleSeeded


class Indices(Dataset[Any]):
    """Each sample is its index and a random number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, v2.RandomCrop(2)(torch.arange(36.0).view(1, 6, 6)).sum() + torch.rand(())


def read(sampler: ResumableSampler, epoch: int, workers: int = 0) -> list[tuple[int, float]]:
    sampler.set_epoch(epoch)
    loader = DataLoader(SampleSeeded(Indices(), 5), batch_size=3, sampler=sampler, num_workers=workers)
    return [(int(i), float(number)) for indices, numbers in loader for i, number in zip(indices, numbers, strict=True)]


def test_samples_depend_on_seed_epoch_and_index_alone() -> None:
    first, second = (read(ResumableSampler(Indices(), 5), epoch) for epoch in (0, 1))
    assert sorted(index for index, _ in first) == list(range(10))
    assert [index for index, _ in first] != [index for index, _ in second]
    assert not set(first) & set(second)
    assert read(ResumableSampler(Indices(), 5), 1, workers=2) == second
    resumed = ResumableSampler(Indices(), 5)
    resumed.resume(1, 6)
    assert read(resumed, 1) == second[6:]
    assert read(resumed, 0) == first
    state = torch.get_rng_state()
    want = SampleSeeded(Indices(), 5)[0, 3]
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)  # as Lightning does for precision 64-true
    try:
        got = SampleSeeded(Indices(), 5)[0, 3]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == want


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_cover_every_index_and_repeat_few(count: int) -> None:
    parts = [[index for _, index in ResumableSampler(Indices(), 5, count, rank)] for rank in range(count)]
    assert len({len(part) for part in parts}) == 1  # otherwise one would wait for ever
    seen = [index for part in parts for index in part]
    assert set(seen) == set(range(10))
    assert len(seen) - 10 < count


def test_processes_cover_every_index_once() -> None:
    parts = [[index for _, index in ResumableSampler(Indices(), 5, 2, rank)] for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(10))


def test_all_generators_resume_from_the_checkpoint() -> None:
    callback = RandomStates()
    saved = callback.state_dict()
    want = torch.rand(3), np.random.rand(3), random.random()
    callback.load_state_dict(saved)
    callback.on_train_start(None, None)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), want[0])
    assert (np.random.rand(3) == want[1]).all()
    assert random.random() == want[2]


def test_an_error_while_seeding_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the default dtype and torch's generator are set, NumPy refuses the seed."""

    def refuse(seed: Any) -> None:
        raise ValueError("refused")

    torch.manual_seed(1)
    state = torch.get_rng_state()
    monkeypatch.setattr(np.random, "seed", refuse)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match="refused"):
            SampleSeeded(Indices(), 5)[0, 3]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)

"""What each process samples with: streams of their own, also beside those of other seeds."""

import torch

from rlhf_recipes.ppo.setup import process_seed, seed_sampling


def test_no_two_processes_of_neighbouring_seeds_share_a_stream():
    seeds = {process_seed(seed, rank) for seed in range(40, 80) for rank in range(16)}
    assert len(seeds) == 40 * 16
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert [process_seed(seed, 0) for seed in (0, 42)] == [0, 42]


def test_each_process_is_seeded_with_its_own(make_trainer):
    def seeded(rank):
        torch.manual_seed(5)
        seed_sampling(42, rank)
        return torch.initial_seed()

    assert [seeded(rank) for rank in (0, 1, 2)] == [5, process_seed(42, 1), process_seed(42, 2)]
    make_trainer(seed=7)
    assert torch.initial_seed() == 7, "one process keeps TRL's digits"

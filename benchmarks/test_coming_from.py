"""The comparison with other libraries: how it takes code out of files, and how it reads and compares the page."""

import pytest
import torch
from coming_from import differences, written_coefficients, written_formulas, written_on_batches
from coming_from_formulas import LENGTHS, LOSSES
from coming_from_page import PINNED, ROWS, batch, numbers, text
from coming_from_theirs import defaults_of, definitions, lines, masked, openrlhf_arguments

SOURCE = '''
import a_library_that_is_not_installed
@register("half")
def half(values: Tensors, by: int = 2) -> Tensors:
    """A doc."""
    return scale(values) / by

class Trainer:
    clip: float = field(default=0.2)
    name: str = "unset"

    def train(self):
        for row in self.rows:
            # 1. begins
            total = row + 1
            loss = total * args.weight
            loss.backward()
'''


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "library.py"
    path.write_text(SOURCE)
    return path


def test_definitions_run_without_what_their_file_imports(path):
    found = definitions(path, "half", scale=lambda values: 10 * values)
    assert found.half(4) == 20
    assert defaults_of(path, "half") == {"by": 2}
    assert defaults_of(path, "Trainer") == {"clip": 0.2}


def test_lines_of_a_loop_run_alone(path):
    space = lines(path, "total = row", "loss = total", {"row": 2, "args": type("Args", (), {"weight": 5})})
    assert space["loss"] == 15


def test_arguments_of_a_command_line_are_read_by_their_rooms(tmp_path):
    (tmp_path / "openrlhf/cli").mkdir(parents=True)
    (tmp_path / "openrlhf/cli/train_ppo_ray.py").write_text(
        'p.add_argument("--algo.kl.init_coef", type=float, default=0.01)\n'
        'p.add_argument("--reward.clip_range", nargs=2, default=(-10, 10))\n'
        'p.add_argument("--algo.kl.use_loss", action="store_true", default=False)\n'
        'p.add_argument("--local_rank", default=int(rank))\n'
    )
    found = openrlhf_arguments(tmp_path)
    assert (found.algo.kl.init_coef, found.algo.kl.use_loss, found.reward.clip_range) == (0.01, False, (-10, 10))


def test_numbers_are_written_and_read_alike():
    assert text(torch.tensor([[1.0, -0.25], [-1e-9, 2 / 3]])) == "1 -0.25; 0 0.666667"
    assert numbers("1 -0.25; 0 0.666667") == [1.0, -0.25, 0.0, 0.666667]
    assert text(float("nan")) == "nan"
    assert numbers("ValueError") == numbers("the same") == []
    assert masked({"row": torch.ones(1, 2), "loss": torch.ones(())}, torch.tensor([[1, 0]]))["row"].tolist() == [
        [1, 0]
    ]


def test_the_page_is_read_for_every_library():
    assert batch("cut")["mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    for library in PINNED:
        written = written_on_batches(library)
        assert {rows for rows, _ in written} == set(ROWS)
        assert len(numbers(written["whole", "advantages"])) == 6
        assert "whiten" in written_formulas(library)
    assert set(written_coefficients("verl")) == {(rows, "verl") for rows in ROWS}


def test_differences_are_found_on_both_sides():
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    assert len(differences({"a": "1", "b": "2"}, {"a": "0", "c": "3"})) == 3


def test_the_losses_that_are_averaged_are_those_of_the_page():
    assert [LOSSES[row][LENGTHS[row].bool()].tolist() for row in (0, 1)] == [[1.0] * 4 + [10.0], [1.0] * 9 + [10.0]]

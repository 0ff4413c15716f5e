"""What nobody can act on is not said, by its exact text; all else is."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rlhf_recipes.quiet import held_back, quiet_known_messages

MODELING = "transformers.modeling_utils"
OLD = "`is_gradient_checkpointing` is deprecated and will be removed in v6."
KERNELS = logging.getLogger("bitsandbytes.backends.cpu.ops")


@pytest.fixture
def heard():
    """What is heard of warnings with the filters of the library alone."""
    with warnings.catch_warnings(record=True) as records:
        warnings.resetwarnings()
        quiet_known_messages()
        yield records


def warn(text, module=MODELING, category=FutureWarning):
    warnings.warn_explicit(text, category, "file.py", 1, module=module)


def test_the_old_names_of_checkpointing_are_not_heard(heard, tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    assert model.is_gradient_checkpointing is False  # as TRL and PEFT ask
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert not [one for one in heard if "checkpointing" in str(one.message)]


def test_they_are_heard_without_the_filter(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
            assert model.is_gradient_checkpointing is False


@pytest.mark.parametrize(
    "other",
    [
        {"text": "`is_torch_compiled` is deprecated"},
        {"text": OLD, "module": "somebody"},
        {"text": OLD, "category": UserWarning},
        {"text": f"Mind that {OLD}"},
    ],
)
def test_anything_else_is_heard(heard, other):
    warn(**other)
    assert [str(one.message) for one in heard] == [other["text"]]


def test_filters_that_were_set_before_come_first():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_known_messages()
        with pytest.raises(FutureWarning):
            warn(OLD)


def test_a_kernel_that_is_not_downloaded_is_not_heard(caplog):
    text = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure"
    KERNELS.warning(text, "No module named 'kernels'")
    KERNELS.warning("The library could not be loaded")
    logging.getLogger("bitsandbytes.backends.cpu").warning(text, "elsewhere")
    assert [record.getMessage()[:19] for record in caplog.records] == ["The library could n", "Failed to load CPU "]


def test_bitsandbytes_still_says_it_in_these_words():
    source = Path(importlib.util.find_spec("bitsandbytes").origin).parent / "backends" / "cpu" / "ops.py"
    assert '"Failed to load CPU gemm_4bit_forward from kernels-community: ' in source.read_text()
    assert "logger = logging.getLogger(__name__)" in source.read_text()


def test_what_was_held_back_is_heard_if_the_block_fails(caplog):
    logger = logging.getLogger("some.library")

    def load():
        logger.warning("REPORT of %s", "what was loaded")
        raise RuntimeError("see the REPORT above")

    with pytest.raises(RuntimeError), held_back("some.library", "REPORT"):
        load()
    logger.warning("REPORT of the next")
    assert [record.getMessage() for record in caplog.records] == ["REPORT of what was loaded", "REPORT of the next"]

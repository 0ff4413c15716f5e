"""Messages of the libraries below that say nothing to a user and that no option turns off, each by its exact text."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# transformers 5 gave these names a new start, `activation_...`. TRL 1.16 and PEFT 0.21 still call the old ones.
_OLD_NAMES = r"`(is_gradient_checkpointing|gradient_checkpointing_(en|dis)able)` is deprecated"

# bitsandbytes offers a faster kernel for bfloat16 on some CPUs, which would be downloaded when a model is loaded. What
# comes with it computes the same.
_KERNELS = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community")


def quiet_known_messages() -> None:
    """Drop the messages named in this file. What else these libraries say is heard, and filters set before come first.

    Example:
        >>> quiet_known_messages()
    """
    warnings.filterwarnings("ignore", _OLD_NAMES, FutureWarning, r"transformers\.modeling_utils", append=True)
    logging.getLogger(_KERNELS[0]).addFilter(_says_something)


@contextmanager
def held_back(logger_name: str, text: str) -> Iterator[list[logging.LogRecord]]:
    """Keep the records of a logger that hold a text, for one who knows only afterwards whether they say something.

    Args:
        logger_name: The logger, by its exact name.
        text: What their message holds.

    Yields:
        The list of records, to be given to `logging.getLogger(logger_name).handle` where they do. If the block fails,
        all are.

    Example:
        >>> with held_back("library", "REPORT") as reports:
        ...     logging.getLogger("library").warning("REPORT of what was loaded")
        >>> [record.getMessage() for record in reports]
        ['REPORT of what was loaded']
    """
    logger, records = logging.getLogger(logger_name), list[logging.LogRecord]()

    def hold(record: logging.LogRecord) -> bool:
        if text in record.getMessage():
            records.append(record)
            return False
        return True

    logger.addFilter(hold)
    try:
        yield records
    except BaseException:
        logger.removeFilter(hold)
        for record in records:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(hold)


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KERNELS[1])

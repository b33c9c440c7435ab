"""Running a library that seeds, logs, caches and draws progress bars, without letting its caller notice."""

import contextlib
import functools
import io
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import lm_eval.utils
import numpy as np
import torch
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

from ctpd.core.errors import UserError

Progress = Callable[[int, int], None]
"""Called with the number of answered requests and the number of all."""


def shown(progress: Progress) -> Progress:
    """The same, with the standard error of now: what it prints is not swallowed with lm-eval's bars."""
    stderr = sys.stderr

    def report(done: int, total: int) -> None:
        with contextlib.redirect_stderr(stderr):
            progress(done, total)

    return report


@contextlib.contextmanager
def seeded(device: torch.device, *, seeds: Mapping[str, int]) -> Iterator[None]:
    """The seeds ``python``, ``numpy`` and ``torch`` inside; outside, the caller's random states again."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(seeds["python"])
        np.random.seed(seeds["numpy"])
        torch.manual_seed(seeds["torch"])
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """No progress bars and remarks of the library's: ours are shown instead. Errors still come as exceptions."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def dataset_cache(folder: str) -> Iterator[None]:
    """Let ``datasets`` cache in this folder.

    For a folder with a dataset card, the library's own key covers the card's text alone, neither the folder's path nor
    the contents or times of its files (datasets 5.2, measured; a test holds it): two testbed worlds, or a mended file,
    would be answered with the documents of whichever was read first. So each state of a mirror needs a cache of its own.
    """
    usual = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual


@contextlib.contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Let a task's templates read documents, and nothing of Python: lm-eval renders them without a sandbox.

    Raises:
        UserError: a template reaches for something else.
    """
    usual: Any = lm_eval.utils.env
    sandbox = SandboxedEnvironment(
        loader=usual.loader, undefined=usual.undefined, keep_trailing_newline=usual.keep_trailing_newline
    )
    sandbox.filters = usual.filters
    lm_eval.utils.env = sandbox
    try:
        yield
    except SecurityError as error:
        raise UserError(
            f"a template of the task reaches into Python ({error})", fix="Write templates that only read the document"
        ) from error
    finally:
        lm_eval.utils.env = usual


@contextlib.contextmanager
def compiled_templates() -> Iterator[None]:
    """Let lm-eval compile a task's templates once, not once for each document, example and choice: a third of its time."""
    environment: Any = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=1024)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the method of the class is seen again

"""What tests of several areas share."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Started in the background by a shell, a process ignores SIGINT, and so does all that it starts. Here Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _strictly(fn: Callable[..., Any], *args: Any) -> Any:
    import warnings

    warnings.simplefilter("error")
    return fn(*args)


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[Any]]]:
    """Run a function of the test's file on gloo ranks: `ranks(fn, *args, world_size=2)`.

    Returns the values in rank order. Warnings are errors in the ranks too. The function travels by value, so a
    rank imports only what the function itself uses, and neither pytest nor the rest of the file.
    """
    import cloudpickle

    from picotron_mini.launch import launch

    here = __import__(__name__)
    for module in (request.module, here):
        cloudpickle.register_pickle_by_value(module)
    try:
        yield lambda fn, *args, world_size, **options: launch(
            functools.partial(_strictly, fn),
            *args,
            world_size=world_size,
            **{"output": "hide", "timeout": 120} | options,
        )
    finally:
        for module in (request.module, here):
            cloudpickle.unregister_pickle_by_value(module)

"""Gives each test its subject: the learner's file or, with --solutions, the solution."""

import importlib
import logging

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--solutions", action="store_true", help="test exercises/solutions instead")


def pytest_configure(config: pytest.Config) -> None:
    # What a learner need not read: seconds a test, and a remark on an optional kernel.
    config.option.durations = None
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@pytest.fixture
def answer(request: pytest.FixtureRequest):
    """The module that exercises/test_e3_merge.py tests: exercises/e3_merge.py, or its solution."""
    name = request.module.__name__.removeprefix("exercises.test_")
    folder = "exercises.solutions" if request.config.getoption("solutions") else "exercises"
    return importlib.import_module(f"{folder}.{name}")

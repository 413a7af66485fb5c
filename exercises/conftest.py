"""Gives each test the module to test: the learner's file or, with --solutions, the solution."""

import importlib
import logging

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--solutions", action="store_true", help="test exercises/solutions instead")


def pytest_configure(config: pytest.Config) -> None:
    # Hide what a learner need not read: the time of each test, and a note on an optional kernel.
    config.option.durations = None
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@pytest.fixture
def answer(request: pytest.FixtureRequest):
    """The module to test: for test_e3_merge.py it is exercises/e3_merge.py, or its solution."""
    name = request.module.__name__.removeprefix("exercises.test_")
    folder = "exercises.solutions" if request.config.getoption("solutions") else "exercises"
    return importlib.import_module(f"{folder}.{name}")

"""Gives each test its subject: the learner's file or, with --solutions, the solution."""

import importlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--solutions", action="store_true", help="test exercises/solutions instead")


@pytest.fixture
def answer(request: pytest.FixtureRequest):
    """The module that exercises/test_e3_merge.py tests: exercises/e3_merge.py, or its solution."""
    name = request.module.__name__.removeprefix("exercises.test_")
    folder = "exercises.solutions" if request.config.getoption("solutions") else "exercises"
    return importlib.import_module(f"{folder}.{name}")

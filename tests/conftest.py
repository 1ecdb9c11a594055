"""The order of the test files, the longest first, and a Ctrl-C that works also in tests that run in the background."""

import signal

import pytest
from hypothesis import settings

# How long one example takes says how busy the machine is, and nothing of the code.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

# A shell starts what it puts into the background with SIGINT ignored, and every process started from there inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = (
    "test_readme.py",
    "test_pipeline_runner.py",
    "test_training.py",
    "test_data_validation.py",
    "test_pages_browser.py",
    "test_why.py",
    "test_experiment_tracking.py",
    "test_why_changes.py",
    "test_rollout_shadow.py",
    "test_rollout_records.py",
    "test_rollout_page.py",
    "test_monitoring.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of the longest files to the front; the order within a file stays."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))

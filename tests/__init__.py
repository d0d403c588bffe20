import pytest

pytest.register_assert_rewrite("tests.helpers")  # their asserts say as much as those of tests

"""The properties of test_operator_properties, on this device."""

import pytest

pytest.register_assert_rewrite("test_operator_properties")

from test_operator_properties import *  # noqa: E402, F403

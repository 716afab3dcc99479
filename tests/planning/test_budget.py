"""Budgets: what people type, and what is drawn from what is free."""

import pytest

from ooc_ntk.errors import InputError
from ooc_ntk.planning.budget import Budget, Resources

FREE = Resources(host_free=1000, host_taken=300, device_free=500, device_taken=50, disk_free=2000)


def test_automatic_limits_are_80_percent_of_what_is_free_plus_what_is_held():
    limits = Budget().limits(FREE)
    assert (limits.host, limits.device, limits.disk) == (300 + 800, 50 + 400, 1600)
    assert limits.automatic == ("host", "device", "disk")


def test_explicit_limits_are_taken_as_they_are():
    limits = Budget(host="2KiB", disk=77).limits(FREE)
    assert (limits.host, limits.device, limits.disk) == (2048, 450, 77)
    assert limits.automatic == ("device",)
    assert limits.describe("device") == "450 B (automatic)"
    assert limits.describe("disk") == "77 B"


@pytest.mark.parametrize("text", ["", "much", "-3GiB", "0", "4 gigs", "1e400", True])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError):
        Budget(host=text)

"""Which taps of a convolution lie within its input: plain arithmetic that a kernel for a device compiles as it is.

Only ``max``, ``min`` and operators on whole numbers that are not negative where they are divided, which Python and a
compiler round alike.
"""

from __future__ import annotations


def lowest_tap(output: int, stride: int, dilation: int, before: int) -> int:
    """The first tap of an output that does not lie in front of the input.

    Args:
        output: index of the output along one dimension.
        stride: pixels from one output to the next.
        dilation: pixels from one tap to the next.
        before: zeros padded in front; negative crops.

    >>> [lowest_tap(output, 2, 1, 3) for output in range(3)]
    [3, 1, 0]
    """
    return (max(before - output * stride, 0) + dilation - 1) // dilation


def tap_count(output: int, taps: int, size: int, stride: int, dilation: int, before: int) -> int:
    """One past the last tap of an output that does not lie behind the input; other arguments as above.

    Args:
        output: index of the output along one dimension.
        taps: taps of the kernel.
        size: pixels of the input.
        stride: pixels from one output to the next.
        dilation: pixels from one tap to the next.
        before: zeros padded in front.

    >>> [tap_count(output, 3, 4, 1, 1, 1) for output in range(4)]
    [3, 3, 3, 2]
    """
    return min(taps, (max(size + before - output * stride, 0) + dilation - 1) // dilation)

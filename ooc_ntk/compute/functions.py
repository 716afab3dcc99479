"""Named output functions: from the model output of one sample and its target to the scalars that are differentiated.

All take (outputs,) float64 and a target, use no indexing that depends on data, and so run under ``vmap``. A *sequence*
target is a row of token numbers, one per position, with -100 where there is none; the output is then (positions ×
vocabulary,), positions first, as language models give it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from ooc_ntk.errors import InputError

#: A function of one sample's model output (outputs,) float64 and its target, returning a scalar or a 1-D tensor.
SampleFunction = Callable[[Tensor, Tensor | None], Tensor]

#: Target of a position that counts as nothing, as torch's cross-entropy has it.
NOTHING: Final = -100


def loss(output: Tensor, target: Tensor | None) -> Tensor:
    """Loss of one sample: cross-entropy for an integer target, half the squared error for a real one.

    Args:
        output: (outputs,), float64.
        target: () integer class, (outputs,) real values, or a sequence of tokens, whose mean loss is taken.

    Returns:
        (1,).
    """
    target = _needed(target, "loss")
    if target.is_floating_point():
        if target.numel() != output.numel():
            raise InputError(f"loss compares {output.numel()} outputs with {target.numel()} target values")
        return 0.5 * (output - target.reshape(-1).to(output)).square().sum().reshape(1)
    if target.numel() > 1:
        logits, there = _positions(output, target, "loss")
        chances = F.log_softmax(logits, 1).gather(1, target.reshape(-1, 1).clamp(min=0)).reshape(-1)
        return -(chances * there).sum().reshape(1) / there.sum().clamp(min=1)
    _need_classes(output, "loss")
    # −log p = log(1 + e^{−margin}): its derivative p − 1 does not cancel, however sure the network is.
    negative = -margin(output, target)
    return torch.logaddexp(torch.zeros_like(negative), negative)


def margin(output: Tensor, target: Tensor | None) -> Tensor:
    """Margin of one sample, ``z_y − log Σ_{c≠y} exp z_c = log(p_y / (1 − p_y))`` (Park et al. 2023, TRAK).

    Args:
        output: (outputs,), float64.
        target: () integer class.

    Returns:
        (1,).
    """
    target = _needed(target, "margin")
    if target.is_floating_point() or target.numel() > 1:
        got = "real-valued targets" if target.is_floating_point() else f"{target.numel()} labels a sample"
        raise InputError(f"margin needs integer class labels, got {got}; use outputs='loss' or a function")
    _need_classes(output, "margin")
    correct = _one_hot(output, target)
    others = output.masked_fill(correct.bool(), -torch.inf)
    return (output * correct).sum().reshape(1) - torch.logsumexp(others, 0).reshape(1)


def logprob(output: Tensor, target: Tensor | None) -> Tensor:  # noqa: ARG001 - every class has one
    """Log-probabilities of all classes, ``log softmax(z)``.

    Args:
        output: (outputs,), float64.
        target: not used.

    Returns:
        (outputs,).
    """
    _need_classes(output, "logprob")
    return F.log_softmax(output, 0)


def next_token(output: Tensor, target: Tensor | None) -> Tensor:
    """The logit of a sequence's last known token, given what comes before it.

    Args:
        output: (positions × vocabulary,), float64.
        target: the token that follows each position, or -100; (positions,) integers.

    Returns:
        (1,).
    """
    target = _needed(target, "next-token")
    if target.is_floating_point():
        raise InputError("next-token needs token numbers as targets, got real values; read the text with next=1")
    logits, there = _positions(output, target, "next-token")
    last = (there * torch.arange(1, target.numel() + 1, device=there.device)).argmax().reshape(1)
    token = target.reshape(-1).gather(0, last).clamp(min=0)
    row = logits.gather(0, last.reshape(1, 1).expand(1, logits.shape[1]))
    return row.gather(1, token.reshape(1, 1)).reshape(1)


class ClipOutput:
    """The contrastive output function of CLIP-like models against a fixed bank of other pairs (TRAK, section 5.1).

    ``f = −log Σ_b exp(−u·(v − v_b)) − log Σ_b exp(−v·(u − u_b))`` for the image and text embeddings u, v of a sample
    and u_b, v_b of the bank. TRAK draws a new bank for every sample; here it is fixed, so that a kernel is a kernel.

    Attributes:
        images: (pairs, width) image embeddings of the bank, float64 on the CPU.
        texts: (pairs, width) text embeddings of the same pairs.
    """

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        """Keep a bank of pairs.

        Raises:
            InputError: if the shapes differ or are not two-dimensional.
        """
        if images.ndim != 2 or images.shape != texts.shape or not len(images):
            raise InputError(
                f"a bank of embeddings needs images and texts of one shape (pairs, width), got {tuple(images.shape)} "
                f"and {tuple(texts.shape)}"
            )
        self.images, self.texts = images.detach().cpu().double(), texts.detach().cpu().double()

    @property
    def identity(self) -> str:
        """What distinguishes this function from another, for digests."""
        digest = hashlib.blake2b(digest_size=16)
        for bank in (self.images, self.texts):
            digest.update(bank.contiguous().numpy().tobytes())
        return f"clip {tuple(self.images.shape)} {digest.hexdigest()}"

    def __call__(self, output: Tensor, target: Tensor | None) -> Tensor:  # noqa: ARG002 - a pair needs no label
        """See :class:`ClipOutput`; ``output`` is (2 · width,), the image's embedding and then the text's."""
        image, text = output.chunk(2)
        images, texts = self.images.to(output), self.texts.to(output)
        if image.shape[0] != images.shape[1] or text.shape[0] != images.shape[1]:
            raise InputError(
                f"the bank holds embeddings of width {images.shape[1]}, the model gives {output.shape[0]} numbers a "
                "sample; it must return (image embeddings, text embeddings)"
            )
        found = -torch.logsumexp(-(text - texts) @ image, 0) - torch.logsumexp(-(image - images) @ text, 0)
        return found.reshape(1)


#: Named functions that need nothing but the output and the target; ``logits`` is no function at all.
NAMED: Final[dict[str, SampleFunction]] = {
    "logprob": logprob,
    "loss": loss,
    "margin": margin,
    "next-token": next_token,
}


def _positions(output: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Logits (positions, vocabulary) of a sequence, and which positions have a target (1 or 0)."""
    count = target.numel()
    if output.numel() % count or output.numel() <= count:
        raise InputError(
            f"outputs={name!r} needs a row of logits for each of the {count} target tokens, the model has "
            f"{output.numel()} outputs; use a causal language model, or one label a sample"
        )
    return output.reshape(count, -1), (target.reshape(-1) != NOTHING).to(output)


def _one_hot(output: Tensor, target: Tensor) -> Tensor:
    """1 at the target's class, without indexing, so that vmap takes it."""
    return (torch.arange(output.shape[0], device=output.device) == target.reshape(())).to(output)


def _needed(target: Tensor | None, name: str) -> Tensor:
    if target is None:
        raise InputError(f"outputs={name!r} needs a label with every sample; pass train=(inputs, labels)")
    return target


def _need_classes(output: Tensor, name: str) -> None:
    if output.shape[0] < 2:
        raise InputError(
            f"outputs={name!r} with class labels needs at least two logits, the model has {output.shape[0]}; "
            "pass a function as outputs"
        )

"""LSTM, GRU and plain RNN written out in linear layers, so that their rule sees every step's input and gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

#: One step: (gates of the input, hidden state, cell state or None, its gates) → hidden and cell state.
_Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _lstm(given: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    del hidden
    enter, forget, update, leave = (given + recurrent).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(update)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def _gru(given: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    given_reset, given_keep, given_new = given.chunk(3, -1)
    reset, keep, new = recurrent.chunk(3, -1)
    update = torch.tanh(given_new + torch.sigmoid(given_reset + reset) * new)
    share = torch.sigmoid(given_keep + keep)
    return update + share * (hidden - update), cell


def _tanh(given: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    del hidden
    return torch.tanh(given + recurrent), cell


def _relu(given: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    del hidden
    return torch.relu(given + recurrent), cell


#: The step of every recurrent function of torch.
STEPS: Final[dict[Callable[..., Any], _Step]] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}


def recurrent_weights(args: Sequence[Any]) -> Sequence[Tensor] | None:
    """The weights of a recurrent call that can be written out; None for packed sequences and projections."""
    if len(args) != 9 or not isinstance(args[2], list | tuple):
        return None
    weights, biased, layers, bidirectional = args[2], args[3], args[4], args[7]
    per_layer = 4 if biased else 2
    if len(weights) != per_layer * layers * (2 if bidirectional else 1) or args[0].ndim != 3:
        return None
    return weights


def write_out(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Compute a recurrent function step by step through ``F.linear``.

    Args:
        function: ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``.
        args: as it was called, with :func:`recurrent_weights` of them not None.

    Returns:
        What the function returns: outputs, last hidden state and, for an LSTM, last cell state.
    """
    inputs, states, weights, biased, layers, _, _, bidirectional, batch_first = args
    step, has_cell = STEPS[function], function is torch.lstm
    first, cells = (states[0], states[1]) if has_cell else (states, states)
    sequence = inputs.transpose(0, 1) if batch_first else inputs  # (time, samples, features)
    per_layer, directions = (4 if biased else 2), (2 if bidirectional else 1)
    last_hidden, last_cell = [], []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * per_layer : (number + 1) * per_layer]
            bias, recurrent_bias = (own[2], own[3]) if biased else (None, None)
            given = F.linear(sequence, own[0], bias)
            hidden, cell = first[number], cells[number]
            steps = range(given.shape[0])
            found: list[Tensor] = []
            for time in reversed(steps) if direction else steps:
                hidden, cell = step(given[time], F.linear(hidden, own[1], recurrent_bias), hidden, cell)
                found.append(hidden)
            outputs.append(torch.stack(found[::-1] if direction else found))
            last_hidden.append(hidden)
            last_cell.append(cell)
        sequence = torch.cat(outputs, -1) if bidirectional else outputs[0]
    result = sequence.transpose(0, 1) if batch_first else sequence
    if has_cell:
        return result, torch.stack(last_hidden), torch.stack(last_cell)
    return result, torch.stack(last_hidden)

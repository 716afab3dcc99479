"""Eigenvalues of trained and pretrained kernels beside initial ones, and where the labels lie (Wei et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import ooc_ntk
from bench.algebra_kernels import one_hot
from bench.contenders import DEVICE
from bench.sentences import minilm, missing_packages, small_bert, tokenised
from bench.table import aligned
from ooc_ntk import demo
from ooc_ntk.report.pictures import picture

from .figures import BLUE, ORANGE, beside, plain
from .finding import FRESH, Finding, Setting

CLAIM: Final = (
    "what makes pretrained kernels generalise better than initial ones is how the labels lie along their eigenvectors, "
    "and not that their eigenvalues decay faster"
)

#: Ranks at which the labels' share is printed.
RANKS: Final = (10, 100)

Spectrum = Any


@dataclass(frozen=True)
class Pair:
    """Spectra of one network before and after training.

    Attributes:
        title: what it is.
        initial: before.
        trained: after.
    """

    title: str
    initial: Spectrum
    trained: Spectrum


def run(setting: Setting) -> Finding:
    """Compare spectra of the digits' network, trained and initial, and of MiniLM, pretrained and drawn at random."""
    labels = demo.digits(FRESH, FRESH + setting.train_samples)[1].numpy()
    targets = one_hot(labels)
    initial, trained = (
        setting.digits_kernel(trained=flag, fresh=True).centered().eigh(method="full") for flag in (False, True)
    )
    digits = Pair(f"CNN, {len(labels):,} digits it was not trained on", initial, trained)
    pairs, notes = [digits], []
    if missing := missing_packages():
        notes.append(f"MiniLM is left out: {', '.join(missing)} not installed; pip install 'ooc-ntk[bench]'")
    else:
        pairs.append(sentences(setting))
    targets = targets - targets.mean(0)
    shares = {name: getattr(digits, name).alignment(targets).cumulative for name in ("initial", "trained")}
    tails = {name: getattr(digits, name).target_exponent(targets) for name in ("initial", "trained")}
    decays = [{name: getattr(pair, name).decay() for name in ("initial", "trained")} for pair in pairs]
    figure = setting.out / "spectra.png"
    _draw(figure, pairs, shares)
    rank = RANKS[0]
    mine, before = decays[0]["trained"], decays[0]["initial"]
    seen = (
        f"training changes the exponent of the digits' eigenvalues from {before.value:.2f} to {mine.value:.2f} and "
        f"puts {shares['trained'][rank - 1]:.0%} of the labels into the first {rank} eigenvectors in place of "
        f"{shares['initial'][rank - 1]:.0%}"
    )
    if len(pairs) > 1:
        was, now = decays[1]["initial"].value, decays[1]["trained"].value
        seen += f"; MiniLM's exponent is {now:.2f} pretrained and {was:.2f} with random weights"
    aligned_better = shares["trained"][rank - 1] > shares["initial"][rank - 1]
    slower = [each["trained"].value <= each["initial"].value for each in decays]
    agrees = "no" if not aligned_better else "yes" if all(slower) else "partly"
    rows = [("kernel", "exponent α", "ranks", "share of the first", *(f"labels in {rank}" for rank in RANKS), "β")]
    for pair, fits in zip(pairs, decays, strict=True):
        for name, fit in fits.items():
            spectrum = getattr(pair, name)
            cells = ["–", "–", "–"]
            if pair is digits:
                cells = [f"{shares[name][min(rank, len(labels)) - 1]:.1%}" for rank in RANKS]
                cells.append(f"{tails[name].value:.2f} ± {tails[name].error:.2f}")
            first = float(spectrum.values[0]) / spectrum.trace
            window = f"{fit.window[0]}–{fit.window[1]}"
            rows.append((f"{pair.title}: {name}", f"{fit.value:.2f} ± {fit.error:.2f}", window, f"{first:.1%}", *cells))
    return Finding(
        title="Eigenvalues of centred trace kernels, trained or pretrained beside initial networks",
        table=aligned(rows),
        seen=seen,
        agrees=agrees,
        claim=CLAIM,
        figure=figure,
        numbers={
            "decay": {
                pair.title: {name: fit.figures() for name, fit in fits.items()}
                for pair, fits in zip(pairs, decays, strict=True)
            },
            "target_exponent": {name: fit.figures() for name, fit in tails.items()},
            "labels_in_first": {
                name: {str(r): float(each[r - 1]) for r in RANKS if r <= len(each)} for name, each in shares.items()
            },
            "eigenvalues": {
                pair.title: {name: getattr(pair, name).values.tolist() for name in ("initial", "trained")}
                for pair in pairs
            },
        },
        notes=(*notes, "α: μ_i ~ i^−α; β: labels beyond rank i ~ i^−β; ± says how straight the line is"),
    )


def sentences(setting: Setting) -> Pair:
    """MiniLM on sentences, with its published weights and with random ones; in smoke size two small random networks."""
    samples, tokens = (24, 16) if setting.smoke else (96, 32)
    data = tokenised(samples, tokens)
    found = []
    for pretrained in (False, True):
        torch.manual_seed(setting.seed + (1 if setting.smoke and pretrained else 0))
        model = (small_bert(2) if setting.smoke else minilm(2, pretrained=pretrained)).eval()
        job = ooc_ntk.Job(model, data, device=DEVICE)
        kernel = setting.kernel(f"minilm-{'pretrained' if pretrained else 'random'}", job)
        found.append(kernel.centered().eigh(method="full"))
    title = "two random small BERTs (smoke)" if setting.smoke else "all-MiniLM-L6-v2"
    return Pair(f"{title}, {samples} sentences", *found)


def _draw(path: Path, pairs: list[Pair], shares: dict[str, Any]) -> None:
    """Eigenvalues with their power laws, a panel a network, and the labels' share in the first eigenvectors."""
    colours = {"initial": ORANGE, "trained": BLUE}
    with picture(path, 4.3 * (len(pairs) + 1), 4.0) as figure:
        panels = figure.subplots(1, len(pairs) + 1)
        for axis, pair in zip(panels, pairs, strict=False):
            for number, (name, colour) in enumerate(colours.items()):
                spectrum = getattr(pair, name)
                values, fit = spectrum.values[:-1] / spectrum.trace, spectrum.decay()  # centring leaves one at zero
                ranks = np.arange(1, len(values) + 1)
                axis.loglog(ranks, values, "o" if name == "initial" else "s", color=colour, markersize=2.5)
                window = np.arange(fit.window[0], fit.window[1] + 1)
                axis.loglog(window, fit.at(window) / spectrum.trace, color="black", linewidth=1.1)
                word = "pretrained" if pair is not pairs[0] and name == "trained" else name
                axis.text(
                    0.04,
                    0.14 - 0.08 * number,
                    f"{'●■'[number]} {word}: α = {fit.value:.2f}",
                    color=colour,
                    transform=axis.transAxes,
                    fontsize=9,
                )
            plain(axis, pair.title, "rank i of the eigenvalue", "eigenvalue / trace")
        last = panels[-1]
        for name, colour in colours.items():
            ranks = np.arange(1, len(shares[name]) + 1)
            last.semilogx(
                ranks, shares[name], color=colour, linewidth=1.8, linestyle="-" if name == "trained" else "--"
            )
            place = min(len(ranks), 9 if name == "trained" else 30) - 1
            below = (6, -12) if name == "initial" else (-52, 10)
            beside(last, ranks[place], shares[name][place], name, colour, shift=below)
        last.set_ylim(0, 1.03)
        plain(last, "Labels of the digits", "first i eigenvectors", "share of the labels' energy")

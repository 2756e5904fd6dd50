"""Gaussian mixtures with diagonal covariances, one per state of a hidden Markov model.

Shapes: F frames, C coefficients, G states, K components of each.
"""

from __future__ import annotations

import numpy as np

VARIANCE_FLOOR = 0.05  # coefficients have unit variance in their recording
LEAST_FRAMES = 10  # that move a component


class Mixtures:
    """Hard assignments: a frame belongs to its state's likeliest component."""

    def __init__(self, states: int, dims: int) -> None:
        self.means: np.ndarray = np.zeros((states, 1, dims), np.float32)
        self.variances: np.ndarray = np.ones((states, 1, dims), np.float32)
        self.weights: np.ndarray = np.ones((states, 1), np.float32)

    def log_likelihoods(self, frames: np.ndarray) -> np.ndarray:
        """(F, C) -> (F, G), of the likeliest component of each state."""
        states, count, dims = self.means.shape
        flat = self.means.reshape(-1, dims), self.variances.reshape(-1, dims), self.weights.reshape(-1)
        return np.asarray(_scores(frames, *flat).reshape(-1, states, count).max(axis=2), np.float32)

    def split(self, components: int, rng: np.random.Generator) -> None:
        """Double the components up to `components`, apart by two fifths of a standard deviation."""
        while self.means.shape[1] < components:
            shift = 0.2 * np.sqrt(self.variances) * rng.choice([-1.0, 1.0], self.means.shape).astype(np.float32)
            self.means = np.concatenate([self.means - shift, self.means + shift], axis=1)
            self.variances = np.concatenate([self.variances, self.variances], axis=1)
            self.weights = np.concatenate([self.weights, self.weights], axis=1) / 2

    def fit(self, frames: np.ndarray, labels: np.ndarray) -> None:
        """Move every component to the frames (F, C) of its state (labels (F,)) that are likeliest under it."""
        order = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[order], np.arange(len(self.means) + 1))
        for state in range(len(self.means)):
            mine = frames[order[bounds[state] : bounds[state + 1]]]
            if len(mine) < LEAST_FRAMES:
                continue
            likeliest = _scores(mine, self.means[state], self.variances[state], self.weights[state]).argmax(axis=1)
            for component in range(self.means.shape[1]):
                part = mine[likeliest == component]
                if len(part) >= LEAST_FRAMES:
                    self.means[state, component] = part.mean(axis=0)
                    self.variances[state, component] = np.maximum(part.var(axis=0), VARIANCE_FLOOR)
                self.weights[state, component] = max(len(part), 1) / len(mine)


def _scores(frames: np.ndarray, means: np.ndarray, variances: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(F, K) weighted log-densities of (F, C) frames under K components."""
    inverse = 1.0 / variances
    constant = np.log(weights) - 0.5 * (np.log(2 * np.pi * variances) + means**2 * inverse).sum(axis=1)
    return np.asarray(frames @ (means * inverse).T - 0.5 * frames**2 @ inverse.T + constant)

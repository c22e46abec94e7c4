"""Points of many dimensions drawn in two."""

from __future__ import annotations

import importlib.util

import numpy as np

SEED = 42


def project(points: np.ndarray) -> tuple[np.ndarray, str]:  # (n, d) -> (n, 2), and how
    """UMAP where umap-learn is installed, else the first two principal components.

    UMAP keeps neighbours together and says little of distances between groups; PCA keeps distances as far as two axes
    can. Needs three points; UMAP needs more than its 15 neighbours, so fewer are always drawn by PCA.
    """
    if len(points) <= 16:
        return _principal_components(points, "too few points for UMAP")
    if importlib.util.find_spec("umap") is None:
        return _principal_components(points, "umap-learn is not installed")
    return _umap(points), "UMAP (15 neighbours, minimal distance 0.1)"


def _umap(points: np.ndarray) -> np.ndarray:
    import umap

    return umap.UMAP(n_neighbors=15, min_dist=0.1, random_state=SEED, n_jobs=1).fit_transform(points)


def _principal_components(points: np.ndarray, why: str) -> tuple[np.ndarray, str]:
    centred = (points - points.mean(0)).astype(np.float64)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    share = sizes**2 / max(float((sizes**2).sum()), np.finfo(np.float64).tiny)
    pair = (left * sizes)[:, :2]
    return pair, f"PCA ({share[0]:.0%} and {share[1]:.0%} of the variance; {why})"

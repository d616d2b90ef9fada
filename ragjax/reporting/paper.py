"""The figures of Lawton et al. 2025 (arXiv 2510.01600): means over four pipelines on validation data."""

from collections.abc import Mapping

from ragjax.reporting.cells import REFERENCE

SOURCE = "Lawton, Samuel, Kumar, Liu (2025), arXiv 2510.01600"

# By data set and row: EM, F1, Recall@5 in percent, hours of training.
FIGURES: Mapping[str, Mapping[str, tuple[float, float, float, float]]] = {
    "HotPotQA": {
        "none": (10.3, 19.8, 19.1, 0.0),
        "embedder": (11.1, 20.8, 21.4, 3.5),
        "generator": (28.4, 39.4, 19.1, 23.8),
        "independent": (29.3, 40.2, 21.4, 27.4),
        "two_phase": (30.0, 41.3, 25.1, 61.0),
        "rag_sequence": (29.1, 40.2, 24.0, 49.2),
        "rag_token": (29.5, 40.8, 24.3, 49.3),
    },
    "PopQA": {
        "none": (12.6, 18.6, 17.4, 0.0),
        "embedder": (18.2, 26.6, 30.8, 0.4),
        "generator": (32.1, 34.7, 17.4, 2.9),
        "independent": (40.6, 43.2, 30.8, 3.2),
        "two_phase": (41.0, 43.7, 33.3, 9.4),
        "rag_sequence": (41.4, 44.1, 32.8, 7.9),
        "rag_token": (41.6, 44.4, 33.1, 8.0),
    },
}


def relative_cost(data: str, row: str) -> float:
    """Hours of a row's training, the generator's being 1."""
    return FIGURES[data][row][3] / FIGURES[data][REFERENCE][3]

"""Figures of a model on a data set: chunks, feature networks, figures, reports."""

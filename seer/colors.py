"""Colours that every form of colour blindness tells apart."""

from __future__ import annotations

# Okabe and Ito (2008), the faint yellow last.
CONCEPT_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555", "#F0E442")

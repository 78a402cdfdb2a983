"""Masks as graphs and as lifted formulas, beside the whole mask."""

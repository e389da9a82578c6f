"""Attacks on the package: each tries many faults and counts what held."""

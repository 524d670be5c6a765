"""Ranks of a tensor-parallel group and their collectives."""

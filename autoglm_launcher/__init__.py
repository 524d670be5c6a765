"""Installs, starts, probes, restarts and stops the server. Needs only the standard library."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

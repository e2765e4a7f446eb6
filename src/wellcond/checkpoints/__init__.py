"""Checkpoints audited and repaired, and what was found shown as text, data and a page."""

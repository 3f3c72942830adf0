"""Protects a run from signals, from processes that die or hang, and from a second run in the same folder."""

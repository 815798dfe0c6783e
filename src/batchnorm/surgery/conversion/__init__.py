"""Layers of any library turned into ours, and ours into torch's."""

"""The comparison of the three arms: its plan, measures, result and run.json."""

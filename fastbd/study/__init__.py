"""Plans a study and runs it: its grid of runs, the ledger that processes share, and what ends a run early."""

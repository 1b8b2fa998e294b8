"""Tables, plots and pages: pure functions of run folders."""

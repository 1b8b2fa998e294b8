"""Tables, plots and the report: pure functions of run folders."""

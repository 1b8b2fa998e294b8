"""What every verb can be told, and the presets. Imports nothing heavy: `--help` must answer at once."""

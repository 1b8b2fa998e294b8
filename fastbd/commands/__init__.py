"""One module a verb, which cli.VERBS lists; its flags are a dataclass in config/flags.py."""

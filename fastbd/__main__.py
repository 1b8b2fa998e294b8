import sys

from fastbd.cli import program

sys.exit(program())

"""One process of several: runs command lines, each an argument, one after the other; ends with the first that fails."""

from __future__ import annotations

import shlex
import sys
from unittest.mock import patch

from fastbd import cli
from fastbd.base import dist


def main() -> int:
    with patch.object(dist, "leave", lambda: None):  # the processes stay together until all is done
        return next(filter(None, (cli.main(shlex.split(line)) for line in sys.argv[1:])), 0)


if __name__ == "__main__":
    code = main()
    dist.leave()
    sys.exit(code)

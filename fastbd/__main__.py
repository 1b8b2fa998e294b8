import sys

from fastbd.cli import main

sys.exit(main())

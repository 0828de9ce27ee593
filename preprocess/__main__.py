"""`python -m preprocess` is `latentzoom preprocess`."""

import sys

from preprocess.cli import main

sys.exit(main(sys.argv[1:]))

"""`python -m preprocess` is `latentzoom preprocess`."""

import sys

from pipeline.command_log import alone
from preprocess.cli import main

sys.exit(alone("preprocess", main, sys.argv[1:]))

"""`python -m preprocess` is `latentzoom preprocess`."""

import sys

from pipeline.errors import arrived
from pipeline.redact import cleaned_output
from preprocess.cli import main

with cleaned_output(sys.argv[1:]):
    status = arrived(lambda: main(sys.argv[1:]))
sys.exit(status)

"""Lets the tests of this folder import `model_cases` and `make_golden` whatever pytest's import mode."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

"""What all tests share. vmbackup.py and the modules of tests/ can be imported by name."""
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

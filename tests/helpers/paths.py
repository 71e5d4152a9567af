"""Where the checkout is, and the real models beside it."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SCRIPT = ROOT / "decode.py"
SHARED = ROOT.parent / "shared"

"""The page of `real_model.py`, made of its JSON files."""
from pathlib import Path
def page(out: Path) -> str:
    return ""

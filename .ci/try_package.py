"""Try a wheel as a stranger gets it: in an environment of its own, outside this repository.

python -m build --no-isolation --outdir out/package .
python .ci/try_package.py out/package

The dependencies are those of the environment that runs this script, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "finesteer_hf/py.typed",
    "finesteer_hf/hub_cards/adapter_card.md",
    "finesteer_hf/playground/weights/model.safetensors",
)


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check_same_wheel(wheel: Path, folder: Path) -> None:
    """The wheel that came out of the sdist is the one that the tree gives."""
    build = ["-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, stdout=subprocess.DEVNULL)
    ours, theirs = contents(wheel), contents(folder / wheel.name)
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    assert not different, f"the sdist and the tree build different wheels: {different}"
    missing = [name for name in SHIPPED if name not in ours]
    assert not missing, f"{wheel.name} lacks {missing}"


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """Install the wheel in a new environment that borrows its dependencies from this one.

    Returns:
        The folder of its programs.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    programs = folder / "bin"
    where = [str(programs / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(where, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    # Paths in .pth files are searched after the environment's own packages, and .pth files in them are not read:
    # an editable install of this repository stays out of sight.
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    return programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one wheel")
    (wheel,) = parser.parse_args().dist.resolve().glob("*.whl")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example, printed = re.findall(r"```python\n(.*?)```\s*```\n(.*?)```", readme, flags=re.DOTALL)[0]
    with tempfile.TemporaryDirectory() as temporary:
        elsewhere = Path(temporary)
        check_same_wheel(wheel, elsewhere / "from_tree")
        programs = fresh_environment(elsewhere / "venv", wheel)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

        def run(*command: str) -> str:
            """Run a program of the new environment, and give what it prints to stdout."""
            line = [str(programs / command[0]), *command[1:]]
            done = subprocess.run(line, check=True, cwd=elsewhere, env=environment, stdout=subprocess.PIPE, text=True)
            return done.stdout

        place, version = run(
            "python", "-c", "import finesteer_hf; print(finesteer_hf.__file__); print(finesteer_hf.__version__)"
        ).split()
        assert Path(place).is_relative_to(elsewhere / "venv"), f"imported {place}, not the wheel"
        assert f"-{version}-" in wheel.name, f"{wheel.name} says that it is {version}"
        assert version in run("finesteer", "--version")
        assert "FINESTEER" in run("python", "-m", "finesteer_hf", "methods")
        # The README's example fits and saves an adapter; the command line takes it from there.
        assert (got := run("python", "-c", example)) == printed, f"the README's example prints {got!r}"
        assert (elsewhere / "truthful" / "README.md").is_file(), "an adapter is saved without its card"
        question = "Tell me something about cracking knuckles."
        print(run("finesteer", "generate", "playground", "--steering", "truthful", "--prompt", question))
    print(f"{wheel.name} works outside the repository")


if __name__ == "__main__":
    main()

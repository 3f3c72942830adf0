"""`python -m tests.gpu.check`: prints one line if a package is missing, and otherwise calls `cli`."""

import sys


def main() -> int:
    try:
        from tests.gpu.check import cli
    except ModuleNotFoundError as error:
        print(f"gpu: {sys.executable} has no package {error.name}; set PYTHON to a Python that has it", file=sys.stderr)
        return 2
    try:
        return cli.main()
    except KeyboardInterrupt:
        print("gpu: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

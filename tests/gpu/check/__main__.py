"""`python -m tests.gpu.check`: names a package that is missing in one line; the rest is in `cli`."""

import sys


def main() -> int:
    try:
        from tests.gpu.check import cli
    except ModuleNotFoundError as error:
        print(f"gpu: {sys.executable} has no {error.name}; name a Python that has it by PYTHON=", file=sys.stderr)
        return 2
    try:
        return cli.main()
    except KeyboardInterrupt:
        print("gpu: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

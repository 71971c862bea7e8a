"""``python -m bitfloor.cli``."""

from bitfloor.cli.main import run

if __name__ == "__main__":
    run()

"""``python -m bitfloor``: the command line program."""

from bitfloor.cli.main import run

if __name__ == "__main__":
    run()

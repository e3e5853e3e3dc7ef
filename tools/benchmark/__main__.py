"""`python -m tools.benchmark`: see command.py."""

from launch.command import run_command
from tools.benchmark.command import main

if __name__ == "__main__":
    run_command(main)

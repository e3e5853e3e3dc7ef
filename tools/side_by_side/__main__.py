"""`python -m tools.side_by_side`: see command.py."""

from launch.command import run_command
from tools.side_by_side.command import main

if __name__ == "__main__":
    run_command(main)

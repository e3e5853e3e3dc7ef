"""`python -m tools.ports`: see command.py."""

from launch.command import run_command
from tools.ports.command import main

if __name__ == "__main__":
    run_command(main)

"""`python -m tools.audit`: see command.py."""

from launch.command import run_command
from tools.audit.command import main

if __name__ == "__main__":
    run_command(main)

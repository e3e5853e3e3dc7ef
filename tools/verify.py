"""Whether a conversion's shards still hold what was written: `python -m tools.verify DIR` reads all of them."""

from checkpoint.verify import main
from launch.command import run_command

if __name__ == "__main__":
    run_command(main)

"""The command `python -m benchmarks.peers`; see compare_trainers.py."""

from benchmarks.peers.compare_trainers import main

if __name__ == "__main__":
    main()

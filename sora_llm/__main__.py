"""`python -m sora_llm <command>` is `sora-llm <command>`."""

import sys

from sora_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())

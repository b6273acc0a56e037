"""`python -m harness.train`, after breaking the harness if a check is to be seen to fail."""

import sys

from harness.train import main
from tests.gpu.worker import break_as_asked

if __name__ == "__main__":
    break_as_asked()
    sys.exit(main())
